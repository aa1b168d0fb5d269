"""How much of the logits exists at a time: tiles that fit ``chunk_bytes``, and memory for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.fused_head.head import Cast, Head, Rows

LEAST_COLUMNS = 256
"""Rows are split only if all of them leave room for fewer columns than these: products of narrow
tiles are slow."""
MOST_COLUMNS_ON_CPU = 2048
"""Measured: wider tiles leave the cache, and fresh memory costs a page fault every 4 KiB."""
MOST_COLUMNS_ON_CUDA = 8192
"""Measured on an H200: products of wider tiles are at most 2 % faster."""
GROUP_ROWS = (512, 256, 128)
"""Rows whose whole logits exist at a time, the first that fit, where gradients of more rows are
kept. Each group reads the weights once: with fewer rows memory cannot keep up with the products."""
PRODUCT_ROWS = (1024, 128)
"""Products take rows 128 at a time, and eight times as many give each multiprocessor a part."""
COLUMN_MULTIPLE = 64
"""Tiles, and the rows in them, start at multiples of this: products into rows 50257 numbers apart
take longer than into rows 50304 apart (docs/fused-head.md)."""


def row_stride(columns: int) -> int:
    """Numbers from one row of a tile to the next."""
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


class Plan(NamedTuple):
    rows: int
    columns: int
    cast_columns: int
    """Of so many columns' weights are cast at a time, where products need it."""
    gradient_rows: int
    """The gradient of so many rows exists at a time, where it lies beside the logits."""


class Costs(NamedTuple):
    """Bytes of scratch memory."""

    of_row: int  # hidden states that are gathered, cast or scaled, and their gradient
    of_column: int  # weights that are cast
    of_logit: int  # the tiles
    of_gradient: int = 0  # the gradient of a logit, where it does not lie over it

    def row_with(self, columns: int) -> int:
        """Of a row, with its part of tiles so wide."""
        return self.of_row + row_stride(columns) * (self.of_logit + self.of_gradient)


def costs(heads: tuple[Head, ...], tiles: int, gathers: bool, gradients: bool) -> Costs:
    """``tiles``: of logits' size at a time. ``gathers``: the rows are not a range. ``gradients``:
    the policy's are made."""
    size = heads[0].accumulation_dtype.itemsize
    of_row = 0
    for head in heads:
        width = head.hidden.shape[1]
        if head.casts:
            of_row += width * (size + (head.hidden.element_size() if gathers else 0))
        elif gathers:
            of_row += width * head.hidden.element_size()
    of_column = max(head.weight.shape[1] * size if head.casts else 0 for head in heads)
    if not gradients:
        return Costs(of_row, of_column, tiles * size)
    policy = heads[0]
    width, stored = policy.hidden.shape[1], policy.gradient_dtype.itemsize
    if gathers:
        of_row += width * size
    if not policy.rounds_gradient:
        return Costs(of_row, of_column, tiles * size)
    return Costs(of_row + width * stored, of_column, tiles * size, stored)


def plan_tiles(
    cost: Costs, rows: int, vocabulary: int, chunk_bytes: int, most_columns: int
) -> Plan:
    """Tiles of all rows and as many columns as fit; of fewer rows if those would be too few."""
    columns = min(LEAST_COLUMNS, vocabulary)
    fitting = (chunk_bytes - columns * cost.of_column) // cost.row_with(columns)
    rows = max(1, min(rows, fitting))
    left = chunk_bytes - rows * cost.of_row
    columns = left // (cost.of_column + rows * (cost.of_logit + cost.of_gradient))
    columns = max(1, columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    columns = min(columns, most_columns, vocabulary)
    return Plan(rows, columns, columns, rows)


def plan_whole_rows(cost: Costs, rows: int, vocabulary: int, chunk_bytes: int) -> Plan:
    """As many rows as fit with the whole vocabulary, at least one."""
    cast_columns = vocabulary
    if cost.of_column:  # products are cast for on the CPU; what is cast must not leave the cache
        most = min(vocabulary, MOST_COLUMNS_ON_CPU)
        cast_columns = max(1, min(most, chunk_bytes // 8 // cost.of_column))
    left = chunk_bytes - cast_columns * cost.of_column
    fitting = left // cost.row_with(vocabulary)
    fitting = max(1, min(rows, fitting))
    return Plan(fitting, vocabulary, cast_columns, fitting)


def rows_with_groups(cost: Costs, group: int, vocabulary: int, chunk_bytes: int) -> int:
    """Of how many rows the gradient fits, while whole logits exist of a group of them."""
    of_logits = row_stride(vocabulary) * cost.of_logit
    of_row = cost.row_with(vocabulary) - of_logits
    at_once = chunk_bytes // (of_row + of_logits)  # if all are one group
    return at_once if at_once <= group else (chunk_bytes - group * of_logits) // of_row


def plan_groups(
    cost: Costs, rows: int, vocabulary: int, chunk_bytes: int, all_at_once: bool
) -> Plan:
    """Whole rows in groups, and gradients of several groups: of all rows, or of those that fit."""
    group = kept = 0
    for group in GROUP_ROWS:
        kept = rows_with_groups(cost, group, vocabulary, chunk_bytes)
        if kept >= (rows if all_at_once else min(rows, 2 * group)):
            break
    if all_at_once:
        kept = rows
    elif kept < rows:
        multiple = next((x for x in PRODUCT_ROWS if x <= kept), 1)
        kept = max(1, kept // multiple * multiple)
    kept = min(kept, rows)
    return Plan(max(1, min(group, kept)), vocabulary, vocabulary, kept)


def pairs_that_fit(cost: Costs, tokens_of_pair: int, vocabulary: int, chunk_bytes: int) -> int:
    """Of how many pairs the logits, or the gradients that are kept, fit at a time; 0: of none."""
    if cost.of_gradient:
        fitting = (rows_with_groups(cost, x, vocabulary, chunk_bytes) for x in GROUP_ROWS)
        return next((rows // tokens_of_pair for rows in fitting if rows >= tokens_of_pair), 0)
    plan = plan_whole_rows(cost, 2**62, vocabulary, chunk_bytes)
    fits = plan.rows * cost.row_with(vocabulary) <= chunk_bytes
    return plan.rows // tokens_of_pair if fits else 0


class Scratch:
    """Memory for tiles, taken once; with ``gradients`` also for those beside the logits."""

    def __init__(
        self, plan: Plan, heads: tuple[Head, ...], tiles: int, gradients: bool = False
    ) -> None:
        policy = heads[0]
        like, dtype = policy.hidden, policy.accumulation_dtype
        self.plan = plan
        stride = row_stride(plan.columns)
        self.tiles = [like.new_empty(plan.rows * stride, dtype=dtype) for _ in range(tiles)]
        beside = gradients and policy.rounds_gradient
        size = plan.gradient_rows * stride if beside else 0
        self.gradients = like.new_empty(size, dtype=policy.gradient_dtype) if beside else None
        width = max(head.weight.shape[1] if head.casts else 0 for head in heads)
        self.cast = Cast(like.new_empty(plan.cast_columns * width, dtype=dtype))

    def tile(self, number: int, rows: int, columns: int) -> Tensor:
        return _tile_of(self.tiles[number], rows, columns)

    def gradient(self, rows: int, columns: int) -> Tensor | None:
        """Memory for a gradient beside the logits; None: it lies over them."""
        return None if self.gradients is None else _tile_of(self.gradients, rows, columns)


def _tile_of(memory: Tensor, rows: int, columns: int) -> Tensor:
    stride = row_stride(columns)
    return memory[: rows * stride].view(rows, stride)[:, :columns]


def column_ranges(vocabulary: int, step: int) -> Iterator[range]:
    for start in range(0, vocabulary, step):
        yield range(start, min(start + step, vocabulary))


def row_chunks(rows: Rows, step: int) -> Iterator[Rows]:
    if isinstance(rows, slice):
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))
    else:
        yield from rows.split(step)


def row_count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def rows_of_groups(group: Tensor, groups: int) -> list[Rows]:
    """The rows of each group, given the group ``[N]`` of each row; of group ``groups``: left out.

    The one place where the host waits for a device.
    """
    total = group.numel()
    counts: list[int] = torch.bincount(group, minlength=groups + 1).tolist()[:groups]
    if total in counts:  # one group has all rows
        return [slice(0, total if count == total else 0) for count in counts]
    order = torch.argsort(group, stable=True)
    return list(order[: sum(counts)].split(counts))
