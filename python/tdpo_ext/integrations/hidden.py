"""What a Hugging Face language model gives its head, and the head itself.

The logits of such models are, with h what the head takes, W and b its weight and bias,

    softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

``probe.logit_options_of`` finds a model's scale and softcap.
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
    if isinstance(model, nn.Module):
        peft: Any = model
        inner = peft.get_base_model() if hasattr(model, "get_base_model") else model
        if hasattr(inner, "get_output_embeddings"):
            return inner
    raise TypeError(
        f"model must be a Hugging Face language model or a PEFT model of one, got {named(model)}; "
        f"{_what_instead(model)}"
    )


def _what_instead(model: Any) -> str:
    if isinstance(model, type):
        return "make one of its class: from_pretrained, or its constructor"
    if isinstance(model, str):
        return "load it first: AutoModelForCausalLM.from_pretrained"
    if hasattr(getattr(model, "module", None), "get_output_embeddings"):
        return "attach the model inside, before it is wrapped (here .module)"
    return "with another model call tdpo_ext.linear_tdpo_loss on its hidden states"


def named(value: Any) -> str:
    """What somebody gave, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if isinstance(value, str) else type(value).__name__


def head_of(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits: inside what only wraps it, as a cast."""
    head = language_model(model).get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings; use a class with a head over tokens "
            "(...ForCausalLM), or call tdpo_ext.linear_tdpo_loss on hidden states and weight of "
            "its head"
        )
    assert isinstance(head, nn.Module)
    inner = head
    while not hasattr(inner, "weight"):
        children = [*inner.children()]
        if len(children) != 1 or [*inner.parameters(recurse=False)]:
            raise ValueError(
                f"the head of {type(model).__name__} is a {type(head).__name__} with "
                f"{_listed(children)}, not one linear module; put the plain nn.Linear back (what "
                "only casts the logits is not needed), or use the logits (tdpo_ext.TDPOLoss)"
            )
        inner = children[0]
    return inner


def _listed(modules: list[nn.Module]) -> str:
    names = ", ".join(type(module).__name__ for module in modules)
    return f"{len(modules)} modules inside ({names})" if names else "no module inside"


def parameter_of(head: Any) -> Any:
    """The weight that the head owns, whatever adapters add to it."""
    return getattr(head, "base_layer", head).weight


def missing_values(head: nn.Module) -> str:
    """Where the values of the head's weight are, if not in it; else empty."""
    parameter = parameter_of(head)
    if hasattr(parameter, "ds_id") and parameter.numel() == 0:
        return "partitioned (ZeRO-3)"
    if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
        return "sharded (a DTensor)"
    if getattr(parameter, "is_meta", False):
        return "offloaded" if hasattr(head, "_hf_hook") else "on the meta device"
    return ""


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


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder takes for these labels: itself one token behind them."""
    start, padding = (
        getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")
    )
    for name in ("prepare_decoder_input_ids_from_labels", "_shift_right"):
        if hasattr(model, name):  # of most classes, not of M2M100, Blenderbot and others
            try:
                ids: Tensor = getattr(model, name)(labels)
            except (AttributeError, ValueError) as error:
                raise ValueError(_no_start(model, start, padding)) from error
            return ids
    if start is None or padding is None:
        raise ValueError(_no_start(model, start, padding))
    shifted = labels.masked_fill(labels == -100, padding)
    return torch.cat([torch.full_like(shifted[:, :1], start), shifted[:, :-1]], dim=1)


def _no_start(model: Any, start: Any, padding: Any) -> str:
    return (
        f"the config of {type(model).__name__} needs decoder_start_token_id and pad_token_id, got "
        f"{start} and {padding}"
    )


def router_coefficient(model: Any) -> float:
    """With which a mixture of experts adds its router's loss; 0 where its config has none."""
    config = language_model(model).config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):  # the latter in JetMoe
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return 0.0


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
