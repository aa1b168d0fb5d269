"""What the ops share: how they are registered, and how their autograd.Functions save and refuse.

The ops are differentiable once. An autograd.Function stands outside its op, so torch.compile sees
the op and traces the Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("tdpo_ext", "FRAGMENT")


def register(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The implementation of an op on all devices, and its fake for the compiler."""
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tdpo_ext::{name}", fake, lib=library)


def grouped(function: Callable[..., Any], *groups: Any) -> Callable[..., Any]:
    """``function`` of named tuples as a function of all their fields in a row, as an op has them.

    ``groups``: the type of each argument of ``function``. A named tuple takes as many values as it
    has fields; any other type stands for one value, which is passed on as it is.
    """

    def of_values(*values: Any) -> Any:
        arguments, start = [], 0
        for group in groups:
            fields = getattr(group, "_fields", None)
            stop = start + (1 if fields is None else len(fields))
            arguments.append(values[start] if fields is None else group(*values[start:stop]))
            start = stop
        assert start == len(values), f"{function.__name__} takes {start} values"
        return function(*arguments)

    return of_values


# --- derivatives ----------------------------------------------------------------------------------

_SECOND_DERIVATIVE = (
    "tdpo_ext's compiled ops are differentiable once; for second derivatives use the functions of "
    "the same names in tdpo_ext.reference"
)


def differentiable_once(backward_op: str) -> None:
    """Make the derivative of a backward op raise."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(_SECOND_DERIVATIVE)

    torch.library.register_autograd(f"tdpo_ext::{backward_op}", refuse, lib=library)


def refuse_graph_of_gradients(also: str = "") -> None:
    """Raise under ``create_graph=True``, where autograd would take a gradient for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{_SECOND_DERIVATIVE} ({also}create_graph=True)")


# --- tensors saved for backward -------------------------------------------------------------------


def save(
    ctx: Any, tensors: tuple[Tensor | None, ...], constants: tuple[Tensor | None, ...]
) -> None:
    """Save for backward tensors, and constants such as the reference's logits and the labels.

    A constant that was computed in inference mode cannot be saved by autograd. It need not be: it
    has no gradient, and no version for autograd to check.
    """
    inference = not torch.compiler.is_compiling() and any(
        x is not None and x.is_inference() for x in constants
    )
    ctx.inference_constants = constants if inference else None
    ctx.count_of_tensors = len(tensors)
    ctx.save_for_backward(*tensors, *(() if inference else constants))


def saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors and the constants."""
    everything = ctx.saved_tensors
    tensors = everything[: ctx.count_of_tensors]
    return tensors, ctx.inference_constants or everything[ctx.count_of_tensors :]
