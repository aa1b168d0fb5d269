"""Check the numbers of every backend on this machine against float64.

    python -m tdpo_ext.parity [--devices cpu cuda] [--quick] [--json PATH]

or ``tdpo_ext.parity.check()``. It reports errors, the bounds that they must keep, and the errors of
eager PyTorch. Run it on a new card, processor or compiler.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from tdpo_ext.parity import formulas, wanted
from tdpo_ext.parity.backends import Backend, backends_of, checked_device, devices_present
from tdpo_ext.parity.cases import LAYOUTS, Case, HeadInputs, Inputs, head_cases, logit_cases
from tdpo_ext.parity.measure import CellErrors, Row, cells_of, row_of

__all__ = ["Report", "Row", "check"]


def chunks_of(vocabulary: int) -> tuple[int | None, ...]:
    """Two values of the fused head's ``chunk_bytes``: one for small tiles, and the default."""
    return max(30_000, 30 * vocabulary), None


class Report(NamedTuple):
    """The result of ``check``."""

    rows: list[Row]
    """One for each backend, dtype and quantity."""

    @property
    def misses(self) -> list[Row]:
        """The rows whose largest error exceeds its bound."""
        return [row for row in self.rows if not row.kept]

    @property
    def passed(self) -> bool:
        return not self.misses


def check(
    devices: Sequence[str] | None = None,
    *,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Compare every backend with float64 on a grid of inputs.

    The grid has all dtypes, several vocabulary sizes, kinds of rows (identical, close, far apart,
    certain of the label, underflowing, masked with -inf, shifted), strides, ignored rows full of
    NaN, and upstream gradients. The backends are each instruction set of the CPU's kernels, the
    CUDA kernels and plain PyTorch, each also under the fused head. The quantities are the
    statistics, the divergences and entropies of ``token_divergences``, and the gradients.

    Args:
        devices: Device names such as "cpu", "cuda", "cuda:1"; None: all that are present.
        quick: Check small vocabularies only, which takes seconds.
        progress: Called with a line of text before each group of backends is checked.

    Returns:
        ``Report``: ``rows`` has one entry for each backend, dtype and quantity, with relative
        errors; ``passed`` is True if all bounds are kept.

    Raises:
        ValueError: A device is not present.
    """
    chosen = [checked_device(name) for name in (devices or devices_present())]
    rows: list[Row] = []
    for device in dict.fromkeys(chosen):
        backends = backends_of(device)
        if progress:
            progress(f"{device}: {', '.join(b.name for b in backends)}, from logits")
        rows += _rows(_check_logits(backends, logit_cases(quick)), head=False)
        if progress:
            progress(f"{device}: the fused head on each")
        rows += _rows(_check_heads(backends, head_cases(quick)), head=True)
    return Report(rows)


class _Checked(NamedTuple):
    backend: str
    dtype: torch.dtype
    cells: dict[str, CellErrors]


def _check_logits(backends: list[Backend], cases: Iterable[Case]) -> Iterator[_Checked]:
    for case in cases:
        here = _moved(case.logits(), backends[0].device)
        true = wanted.from_logits(here)  # on the device, since float64 on a CPU takes far longer
        true_divergences = wanted.divergences_from_logits(here)
        layout = LAYOUTS[case.layout]
        here = here._replace(policy=layout(here.policy), reference=layout(here.reference))
        eager = formulas.from_logits(here, eager=True)
        eager_divergences = formulas.divergences_from_logits(here, eager=True)
        for backend in backends:
            with backend.serving():
                ours = formulas.from_logits(here, eager=False)
                divergences = formulas.divergences_from_logits(here, eager=False)
            name, fallback = str(case), backend.is_fallback
            cells = cells_of(name, ours, eager, true, fallback)
            cells |= cells_of(name, divergences, eager_divergences, true_divergences, fallback)
            yield _Checked(str(backend), case.dtype, cells)


def _check_heads(backends: list[Backend], cases: Iterable[Case]) -> Iterator[_Checked]:
    for case in cases:
        here = _moved(case.heads(), backends[0].device)
        true = wanted.from_heads(here)
        eager = formulas.from_heads(here, eager=True)
        half_width = case.dtype in (torch.bfloat16, torch.float16)
        as_run = formulas.from_heads(here, eager=True, as_run=True) if half_width else None
        for backend, chunk_bytes in itertools.product(backends, chunks_of(case.vocabulary)):
            with backend.serving():
                ours = formulas.from_heads(here, eager=False, chunk_bytes=chunk_bytes)
            cells = cells_of(str(case), ours, eager, true, backend.is_fallback, as_run)
            yield _Checked(f"{backend}, fused head", case.dtype, cells)


_Given = TypeVar("_Given", Inputs, HeadInputs)


def _moved(inputs: _Given, device: torch.device) -> _Given:
    return type(inputs)(*(x.to(device) for x in inputs))


def _rows(checked: Iterator[_Checked], *, head: bool) -> list[Row]:
    collected: dict[tuple[str, torch.dtype, str], list[CellErrors]] = defaultdict(list)
    for backend, dtype, cells in checked:
        for quantity, cell in cells.items():
            collected[backend, dtype, quantity].append(cell)
    rows = [row_of(*key, cells, head) for key, cells in collected.items()]
    return sorted(rows, key=lambda row: row.backend)
