"""A model's head: where it is, what it multiplies with, and whether it does only that."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.classes import plain_forward
from tdpo_ext.integrations.models import evaluating, language_model
from tdpo_ext.integrations.parameters import where_values_are

INSTEAD = (
    "call tdpo_ext.linear_tdpo_loss with your own hidden states, scale and softcap, or use the "
    "logits (tdpo_ext.TDPOLoss)"
)


def head_of(model: nn.Module) -> nn.Module:
    """The linear module that turns hidden states into logits.

    A module around it that has no parameters, such as one that casts the logits, is taken off.

    Raises:
        ValueError: the model has no head over tokens, or one of several modules.
    """
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
    """The weight that the head owns, without what adapters add to it."""
    return getattr(head, "base_layer", head).weight


def missing_values(head: nn.Module) -> str:
    """Where the values of the head's weight are if it does not hold them; else empty."""
    where = where_values_are(parameter_of(head))
    return "offloaded" if where == "on the meta device" and hasattr(head, "_hf_hook") else where


def weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    """What the head multiplies with and adds at the moment, its active adapters included.

    Returns:
        The weight ``[V, H]`` and the bias ``[V]`` or None.

    Raises:
        ValueError: the weight is no floating matrix, or an adapter is no plain LoRA.
    """
    if not hasattr(head, "base_layer"):
        return _matrix(head.weight, head), getattr(head, "bias", None)
    # PEFT's layers: their own ``weight`` leaves the adapters out.
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


def check_head(head: nn.Module, name: str) -> None:
    """Compare the head with a plain linear layer on four random rows.

    Args:
        head: of ``head_of``.
        name: the model's class, for messages.

    Raises:
        ValueError: the head does not multiply with its weight and add its bias alone.
    """
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
        expected = nn.functional.linear(rows, weight, bias)
        try:
            found = head.forward(rows)
        except Exception as error:
            why = f"it fails on {tuple(rows.shape)}: {error}"
            raise ValueError(_not_linear(head, name, why)) from error
    if why := _difference(head, found, expected):
        raise ValueError(_not_linear(head, name, why))


def _difference(head: nn.Module, found: Any, expected: Tensor) -> str:
    """How the head's results differ from a linear layer's, for a message; empty if they do not."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return f"it returns {what}, not {tuple(expected.shape)}"
    size = expected.float().abs().amax().clamp(min=1e-6)
    worst = ((found - expected).float().abs().amax() / size).item()
    # An adapter adds its part after the product, rounded once more.
    roundings = 4 if hasattr(head, "base_layer") else 1
    allowed = max(roundings * torch.finfo(expected.dtype).eps, 1e-5)
    return "" if worst <= allowed else f"the results differ by {worst:.2g} of the largest"


def _not_linear(head: nn.Module, name: str, why: str) -> str:
    return (
        f"the head of {name} ({type(head).__name__}) does not multiply its input with its weight "
        f"alone: {why}; {INSTEAD}"
    )
