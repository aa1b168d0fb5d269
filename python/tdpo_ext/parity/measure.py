"""Errors against the truth, row by row, and the bounds that they must keep."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.parity.wanted import DIVERGENCES, STATISTICS, Wanted, least_size

_BOUNDS = {torch.float64: 1e-12}
_OTHERS = 2e-6
_KL_BOUNDS = {torch.float64: 1e-9}
_OTHERS_KL = 1e-3
_ENTROPIES = 1e-5
"""An entropy is a difference of two numbers that may each be 10 larger."""
_OF_FLOAT32_LOGITS = 1e-4
"""A head's logits are rounded to float32 before they are subtracted from each other."""


def stored_dtype(quantity: str, dtype: torch.dtype) -> torch.dtype:
    """Gradients have the inputs' dtype; statistics are accumulated in float32 at least."""
    if quantity in (*STATISTICS, *DIVERGENCES) and dtype != torch.float64:
        return torch.float32
    return dtype


def bound_of(quantity: str, dtype: torch.dtype, head: bool) -> float:
    """The largest error that is allowed.

    A half-width gradient of the logits is rounded once, where it is stored: half a unit in the last
    place. A head's gradient is rounded twice on CUDA: dz before the tensor cores multiply it (they
    take half-width operands and sum in float32), and the product where it is stored. Relative to
    the sum of |dz| |W| (`wanted.Wanted.sizes`) each rounding is half a unit at most.
    """
    if quantity in ("forward_kl", "reverse_kl"):
        return _KL_BOUNDS.get(dtype, _OTHERS_KL)
    of_float32 = _OF_FLOAT32_LOGITS if head else _OTHERS
    if quantity.endswith("entropy"):
        of_float32 = _ENTROPIES
    bound = _BOUNDS.get(dtype, of_float32)
    stored = stored_dtype(quantity, dtype)
    if stored in (torch.float32, torch.float64):
        return bound
    roundings = 2 if head else 1
    return bound + roundings * torch.finfo(stored).eps / 2


def errors(ours: Tensor, wanted: Tensor, sizes: Tensor, least: float) -> Tensor:
    """The largest error in each row relative to the row's size, ``[rows]``, float64, on the CPU.

    It is infinite where one of the two is NaN or infinite and the other is not.
    """
    ours = ours.detach().to(wanted.device, torch.float64)
    difference = (ours - wanted).abs().masked_fill(ours == wanted, 0)
    difference = difference.masked_fill(difference.isnan(), math.inf)
    if difference.dim() > sizes.dim():
        difference = difference.amax(-1)
    return (difference / sizes.clamp(min=least)).flatten().cpu()


class CellErrors(NamedTuple):
    """The errors of one quantity in one case."""

    ours: Tensor
    eager: Tensor
    case: str
    ulp: float
    """The relative unit in the last place of the type that the quantity is stored in."""
    as_run: Tensor | None = None
    """Errors of eager PyTorch with products in the operands' type; for half-width heads only."""

    @property
    def worse_than_eager(self) -> bool:
        """Whether our largest error exceeds eager PyTorch's by more than 1 ulp."""
        return bool(self.ours.max() > self.eager.max() + self.ulp)

    @property
    def worse_than_as_run(self) -> bool:
        return self.as_run is not None and bool(self.ours.max() > self.as_run.max() + self.ulp)


def cells_of(
    case: str,
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    wanted: Wanted,
    fallback: bool,
    as_run: dict[str, Tensor] | None = None,
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
            errors(as_run[quantity], value, sizes, least) if as_run else None,
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
    """The number of cases where our largest error exceeds eager PyTorch's by more than 1 ulp. None
    for float64, where the truth is no more accurate."""
    worst_case: str
    """The case with the largest error."""
    as_run_largest: float | None = None
    """The largest error of eager PyTorch as it is run, with half-width heads multiplied in their
    own type. None for all other inputs, which have no such products."""
    worse_than_as_run: int | None = None
    """As ``worse_than_eager``, against eager PyTorch as it is run."""

    @property
    def kept(self) -> bool:
        return self.largest <= self.bound


def row_of(
    backend: str, dtype: torch.dtype, quantity: str, cells: list[CellErrors], head: bool
) -> Row:
    worst = max(cells, key=lambda cell: float(cell.ours.max()))
    ours, eager = (torch.cat([getattr(cell, x) for cell in cells]) for x in ("ours", "eager"))
    as_run = [cell.as_run for cell in cells if cell.as_run is not None]
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
        float(torch.cat(as_run).max()) if as_run else None,
        sum(cell.worse_than_as_run for cell in cells) if as_run else None,
    )
