"""What a Hugging Face language model gives its head, and what it does to the head's results.

The logits of such models are, with h what the head takes, W and b its weight and bias,

    softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

``LogitOptions.of`` reads scale and softcap from the config; no config says everything, so
``check_rebuilt_logits`` compares four tokens' logits with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LogitOptions(NamedTuple):
    """What a model does to h W^T + b."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitOptions:
        """From the fields in which Hugging Face configs say it."""
        text = (
            config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        )
        scale = 1.0
        for field in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
            value = getattr(text, field, None)  # Cohere; Falcon-H1; Muse. None in MPT: no scale
            scale *= 1.0 if value is None else float(value)
        scaling = getattr(text, "logits_scaling", None)
        if scaling is not None:  # Granite and MiniCPM3 divide by it
            scale *= float(scaling) if text.model_type == "hyperclovax" else 1 / float(scaling)
        return cls(scale, getattr(text, "final_logit_softcapping", None) or None)

    def applied(self, logits: Tensor) -> Tensor:
        """To the results of the head."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadInputs:
    """All that a model's logits are made of.

    A plain class, no tuple and no dataclass: what casts, copies or moves the tensors it finds in a
    model's outputs (accelerate, FSDP2's mixed precision, DDP) looks into those, and would make a
    copy of the whole head at every step.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_options: LogitOptions,
        *,
        autocast: torch.dtype | None = None,
        model: str = "",
    ) -> None:
        self.hidden = hidden
        """[..., H]"""
        self.weight = weight
        """[V, H], the head's own memory where that is not sharded"""
        self.bias = bias
        """[V]"""
        self.logit_options = logit_options
        self.autocast = autocast
        """The dtype of the autocast that the model ran under; None: it ran under none."""
        self.model = model
        """The class of the model that has made this; empty: none has, as with a cache."""

    def replace(self, **changes: Any) -> HeadInputs:
        return HeadInputs(**{**vars(self), **changes})

    def logits(self) -> Tensor:
        """[..., V], as the model itself makes them, under the autocast it ran under."""
        device = self.hidden.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            logits = nn.functional.linear(self.hidden, self.weight, self.bias)
        return self.logit_options.applied(logits)

    def detached(self) -> HeadInputs:
        return self._each(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> HeadInputs:
        """All tensors with ``Tensor.to``: what is there already is not copied."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def _each(self, function: Callable[[Tensor], Tensor]) -> HeadInputs:
        return self.replace(
            hidden=function(self.hidden),
            weight=function(self.weight),
            bias=None if self.bias is None else function(self.bias),
        )

    def __repr__(self) -> str:
        described = {
            name: f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
            if isinstance(value, Tensor)
            else repr(value)
            for name, value in vars(self).items()
        }
        return f"HeadInputs({', '.join(f'{name}={what}' for name, what in described.items())})"


def language_model(model: Any) -> Any:
    """The Hugging Face model inside PEFT's wrapper, or the model itself."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings"):
        raise TypeError(
            f"model must be a Hugging Face language model or a PEFT model of one, got "
            f"{type(model).__name__}; with another model call tdpo_ext.linear_tdpo_loss on its "
            "hidden states"
        )
    return inner


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits."""
    head = language_model(model).get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings; call tdpo_ext.linear_tdpo_loss on "
            "hidden states and weight of its head"
        )
    assert isinstance(head, nn.Module)
    return head


def parameter_of(head: Any) -> Any:
    """The weight that the head owns, whatever adapters add to it."""
    return getattr(head, "base_layer", head).weight


def weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    """Those the head multiplies with at the moment: with its adapters, if it has and uses any."""
    if not hasattr(head, "base_layer"):  # else PEFT's: its ``weight`` leaves the adapters out
        return _matrix(head.weight, head), getattr(head, "bias", None)
    weight, bias = _matrix(head.base_layer.weight, head), getattr(head.base_layer, "bias", None)
    if getattr(head, "disable_adapters", False) or getattr(head, "merged", False):
        return weight, bias
    for adapter in head.active_adapters:
        if adapter in getattr(head, "lora_A", {}):
            _check_adapter(head, adapter)
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
        elif adapter in getattr(head, "adapter_layer_names", ()) or not hasattr(head, "lora_A"):
            raise ValueError(_refusal(head, f"its adapter is a {type(head).__name__}"))
    return weight, bias


def _matrix(weight: Any, head: Any) -> Tensor:
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(_refusal(head, "its weight is no floating matrix (quantised?)"))
    return weight


def _check_adapter(head: Any, adapter: str) -> None:
    dropout = dict(head.lora_dropout.items()).get(adapter)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        raise ValueError(_refusal(head, "its LoRA adapter has dropout; set lora_dropout=0"))
    variant = getattr(head, "lora_variant", {})
    if adapter in variant or getattr(head, "use_dora", {}).get(adapter, False):
        raise ValueError(_refusal(head, "its adapter is a variant of LoRA (DoRA?)"))
    if getattr(head, "lora_bias", {}).get(adapter, False):
        raise ValueError(_refusal(head, "its LoRA adapter has a bias; set lora_bias=False"))


def _refusal(head: nn.Module, why: str) -> str:
    return (
        f"the head ({type(head).__name__}) cannot be fused: {why}. Take it out of target_modules "
        "and train it by modules_to_save, or use the logits (tdpo_ext.TDPOLoss)"
    )


# --- the probe ------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def probe_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences of two tokens."""
    inner = language_model(model)
    device = next(inner.get_input_embeddings().parameters()).device
    vocabulary = inner.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, 5, device=device).remainder(vocabulary).view(2, 2)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def check_rebuilt_logits(model: nn.Module, logits: Tensor, rebuilt: Tensor) -> None:
    """Raise ValueError unless both are the same up to rounding of the model's type."""
    name = type(language_model(model)).__name__
    if logits.shape != rebuilt.shape:
        raise ValueError(
            f"the logits of {name} have shape {tuple(logits.shape)}, those rebuilt from what its "
            f"head takes {tuple(rebuilt.shape)}; {_INSTEAD}"
        )
    size = logits.float().abs().amax().clamp(min=1e-6)
    error = ((logits - rebuilt).float().abs().amax() / size).item()
    # The same products and roundings, but for a scale that one divides by and the other multiplies
    # with; and in float32 for their order.
    if not error <= max(2 * torch.finfo(rebuilt.dtype).eps, 1e-5):
        raise ValueError(
            f"the logits of {name}, rebuilt from what its head takes, differ from its own by "
            f"{error:.2g} of the largest: it does something to them that no known field of its "
            f"config says; {_INSTEAD}"
        )


_INSTEAD = (
    "call tdpo_ext.linear_tdpo_loss with your own hidden states, scale and softcap, or use the "
    "logits (tdpo_ext.TDPOLoss)"
)
