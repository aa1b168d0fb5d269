"""Errors against the truth, row by row, and the bounds they must keep."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.parity.wanted import STATISTICS, Wanted, least_size

_BOUNDS = {torch.float64: 1e-12}
_OTHERS = 2e-6
_KL_BOUNDS = {torch.float64: 1e-9}
_OTHERS_KL = 1e-3
_OF_FLOAT32_LOGITS = 1e-4
"""A head's logits are rounded to float32 before they are subtracted from each other."""


def stored_dtype(quantity: str, dtype: torch.dtype) -> torch.dtype:
    """Gradients have the inputs' dtype; statistics are accumulated in float32 at least."""
    if quantity in STATISTICS and dtype != torch.float64:
        return torch.float32
    return dtype


def bound_of(quantity: str, dtype: torch.dtype, head: bool) -> float:
    """The largest error that is allowed."""
    if quantity == "forward_kl":
        return _KL_BOUNDS.get(dtype, _OTHERS_KL)
    bound = _BOUNDS.get(dtype, _OF_FLOAT32_LOGITS if head else _OTHERS)
    stored = stored_dtype(quantity, dtype)
    if stored in (torch.float32, torch.float64):
        return bound
    return bound + torch.finfo(stored).eps / 2  # what storing a number costs


def errors(ours: Tensor, wanted: Tensor, sizes: Tensor, least: float) -> Tensor:
    """The largest error in each row over the row's size, ``[rows]``, float64 on the CPU.

    Infinite where one of the two is NaN or infinite and the other is not.
    """
    ours = ours.detach().cpu().double()
    difference = (ours - wanted).abs().masked_fill(ours == wanted, 0)
    difference = difference.masked_fill(difference.isnan(), math.inf)
    if difference.dim() > sizes.dim():
        difference = difference.amax(-1)
    return (difference / sizes.clamp(min=least)).flatten()


class CellErrors(NamedTuple):
    """Of one quantity in one case."""

    ours: Tensor
    eager: Tensor
    case: str
    ulp: float
    """Of the type that the quantity is stored in, relative."""

    @property
    def worse_than_eager(self) -> bool:
        """By more than one unit in the last place."""
        return bool(self.ours.max() > self.eager.max() + self.ulp)


def cells_of(
    case: str,
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    wanted: Wanted,
    fallback: bool,
) -> dict[str, CellErrors]:
    cells = {}
    for quantity, value in wanted.values.items():
        dtype = ours[quantity].dtype
        sizes, least = wanted.sizes[quantity], least_size(quantity, dtype, fallback)
        cells[quantity] = CellErrors(
            errors(ours[quantity], value, sizes, least),
            errors(eager[quantity], value, sizes, least),
            case,
            torch.finfo(dtype).eps,
        )
    return cells


class Row(NamedTuple):
    """A backend, a dtype and a quantity, over all cases; errors are relative."""

    backend: str
    dtype: str
    quantity: str
    cases: int
    largest: float
    median: float
    bound: float
    eager_largest: float
    eager_median: float
    worse_than_eager: int | None
    """In how many cases our largest error exceeds that of eager PyTorch by more than 1 ulp. None
    for float64: the truth is no better."""
    worst_case: str
    """The one with the largest error."""

    @property
    def kept(self) -> bool:
        return self.largest <= self.bound


def row_of(
    backend: str, dtype: torch.dtype, quantity: str, cells: list[CellErrors], head: bool
) -> Row:
    worst = max(cells, key=lambda cell: float(cell.ours.max()))
    ours, eager = (torch.cat([getattr(cell, x) for cell in cells]) for x in ("ours", "eager"))
    return Row(
        backend,
        str(dtype).removeprefix("torch."),
        quantity,
        len(cells),
        float(ours.max()),
        float(ours.median()),
        bound_of(quantity, dtype, head),
        float(eager.max()),
        float(eager.median()),
        None if dtype == torch.float64 else sum(cell.worse_than_eager for cell in cells),
        worst.case,
    )
