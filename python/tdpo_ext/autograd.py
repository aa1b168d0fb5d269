"""What both files of ops share: registration, refusal of second derivatives, saved tensors.

The ops are differentiable once. Each autograd.Function calls a registered op. torch.compile traces
the Function and keeps the op as one node.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks

library = torch.library.Library("tdpo_ext", "FRAGMENT")


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one implementation of an op for all devices, and its fake for torch.compile."""
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tdpo_ext::{name}", fake, lib=library)


def register_backward(name: str, write_gradient: Callable[..., None]) -> Callable[..., Tensor]:
    """Register the op ``name``, which returns the gradient of the policy's logits, and ``name_``,
    which lets it overwrite them; both are differentiable once.

    ``write_gradient(gradient, policy_logits, reference_logits, ...)`` serves both. The result is
    the implementation of the first.
    """

    def backward(policy_logits: Tensor, *arguments: Any) -> Tensor:
        gradient = policy_logits.new_empty(policy_logits.shape)
        write_gradient(gradient, policy_logits, *arguments)
        return gradient

    def backward_fake(policy_logits: Tensor, *arguments: Any) -> Tensor:
        return policy_logits.new_empty(policy_logits.shape)

    def backward_inplace(policy_logits: Tensor, reference_logits: Tensor, *arguments: Any) -> None:
        checks.check_inplace_backward(policy_logits, reference_logits)
        write_gradient(policy_logits, policy_logits, reference_logits, *arguments)
        # Autograd does not see that the kernel writes. With a new version of the logits a second
        # backward raises, instead of reading gradients as logits.
        torch.autograd.graph.increment_version(policy_logits)

    def backward_inplace_fake(policy_logits: Tensor, *arguments: Any) -> None:
        return None

    register(name, backward, backward_fake)
    register(f"{name}_", backward_inplace, backward_inplace_fake)
    differentiable_once(name)
    return backward


def grouped(function: Callable[..., Any], *groups: Any) -> Callable[..., Any]:
    """A function of flat values, as an op's schema has them, that calls ``function``.

    ``groups`` holds the type of each argument of ``function``. A named tuple is built from as many
    values as it has fields; any other type stands for one value, which is passed on as it is.
    """

    ends = list(itertools.accumulate(len(getattr(group, "_fields", (group,))) for group in groups))
    parts = [
        (group if hasattr(group, "_fields") else None, start, end)
        for group, start, end in zip(groups, [0, *ends], ends, strict=False)
    ]

    def with_flat_values(*values: Any) -> Any:
        assert len(values) == ends[-1], f"{function.__name__} takes {ends[-1]} values"
        arguments = [
            values[start] if group is None else group(*values[start:end])
            for group, start, end in parts
        ]
        return function(*arguments)

    return with_flat_values


@functools.cache
def _keys_of_plain_tensors(device: torch.device) -> Any:
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device))


def may_skip_the_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether to call the kernels directly, not through their op and PyTorch's dispatcher.

    The result is the same if nothing has to see the op: no compiler, no dispatch mode, no second
    derivative, and plain tensors (no subclass, no vmap, no lazy zeros). A small call then takes an
    eighth less time.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    first = tensors[0]
    assert first is not None
    plain = _keys_of_plain_tensors(first.device)
    for tensor in tensors:  # not all(...): a generator would take as long as the comparisons
        if tensor is not None and torch._C._dispatch_keys(tensor) != plain:
            return False
    return True


# --- derivatives ----------------------------------------------------------------------------------

_SECOND_DERIVATIVE = (
    "tdpo_ext's compiled ops are differentiable once; for second derivatives use the functions of "
    "the same names in tdpo_ext.reference"
)


def differentiable_once(backward_op: str) -> None:
    """Make autograd raise where it would differentiate a backward op."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(_SECOND_DERIVATIVE)

    torch.library.register_autograd(f"tdpo_ext::{backward_op}", refuse, lib=library)


def refuse_graph_of_gradients(also: str = "") -> None:
    """Raise in a backward under ``create_graph=True``.

    Autograd would otherwise treat the gradient as a constant, and second derivatives would be 0.
    ``also`` names further options in the error.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{_SECOND_DERIVATIVE} ({also}create_graph=True)")


def refuse_overwritten_logits(ctx: Any, policy_logits: Tensor) -> None:
    """Raise where an earlier backward of ``ctx`` has written its gradient over these logits.

    Autograd sees that by their version, except where hooks for saved tensors such as
    ``save_on_cpu`` hand back the tensor itself. Logits in other memory, which checkpointing
    computes anew for each backward, may be overwritten each time.
    """
    if torch.compiler.is_compiling():
        return
    storage = policy_logits.untyped_storage()
    overwritten = getattr(ctx, "overwritten", None)
    if overwritten is not None and overwritten() is storage:
        raise RuntimeError(
            "the gradient of an earlier backward has overwritten policy_logits "
            "(inplace_backward=True); pass inplace_backward=False to go backward twice"
        )
    ctx.overwritten = weakref.ref(storage)


# --- tensors saved for backward -------------------------------------------------------------------


def save(
    ctx: Any, tensors: tuple[Tensor | None, ...], constants: tuple[Tensor | None, ...]
) -> None:
    """Save tensors for backward, and constants such as the reference's logits and the labels.

    Autograd cannot save a tensor that was made in inference mode, so such constants are kept on
    ``ctx`` instead. Nothing is lost: they have no gradient, and no version that autograd checks.
    """
    inference = not torch.compiler.is_compiling() and any(
        x is not None and x.is_inference() for x in constants
    )
    ctx.inference_constants = constants if inference else None
    ctx.count_of_tensors = len(tensors)
    ctx.save_for_backward(*tensors, *(() if inference else constants))


def saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors and the constants that ``save`` was given."""
    everything = ctx.saved_tensors
    tensors = everything[: ctx.count_of_tensors]
    return tensors, ctx.inference_constants or everything[ctx.count_of_tensors :]
