"""A model's head: where it is, what it multiplies with, and whether it does only that."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.classes import plain_forward
from tdpo_ext.integrations.models import evaluating, language_model


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


INSTEAD = (
    "call tdpo_ext.linear_tdpo_loss with your own hidden states, scale and softcap, or use the "
    "logits (tdpo_ext.TDPOLoss)"
)


def check_head(head: nn.Module, name: str) -> None:
    """Raise ValueError unless the head multiplies with its weight and adds its bias."""
    if missing_values(head):
        if plain_forward(head) is not nn.Linear.forward:
            warnings.warn(
                f"the head of {name} is a {type(head).__name__} and its weight is "
                f"{missing_values(head)}, so it could not be compared with a plain linear layer",
                stacklevel=3,
            )
        return
    with evaluating(head), torch.no_grad():
        weight, bias = weight_and_bias(head)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(4, weight.shape[1], generator=generator)
        rows = rows.to(weight.device, weight.dtype)
        wanted = nn.functional.linear(rows, weight, bias)
        try:
            made = head.forward(rows)
        except Exception as error:
            why = f"it fails on {tuple(rows.shape)}: {error}"
            raise ValueError(_no_linear(head, name, why)) from error
    if not isinstance(made, Tensor) or made.shape != wanted.shape:
        what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(_no_linear(head, name, f"it returns {what}, not {tuple(wanted.shape)}"))
    size = wanted.float().abs().amax().clamp(min=1e-6)
    worst = ((made - wanted).float().abs().amax() / size).item()
    # Adapters add their part after the product, rounded once more.
    roundings = 4 if hasattr(head, "base_layer") else 1
    if not worst <= max(roundings * torch.finfo(wanted.dtype).eps, 1e-5):
        why = f"the results differ by {worst:.2g} of the largest"
        raise ValueError(_no_linear(head, name, why))


def _no_linear(head: nn.Module, name: str, why: str) -> str:
    return (
        f"the head of {name} ({type(head).__name__}) does not multiply its input with its weight "
        f"alone: {why}; {INSTEAD}"
    )
