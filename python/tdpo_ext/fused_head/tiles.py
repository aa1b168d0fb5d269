"""The sizes of tiles, so that what exists of the logits at a time fits ``chunk_bytes``; its memory.

A tile is the logits of some tokens (rows) over a range of the vocabulary (columns).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tdpo_ext.fused_head.head import Head

LEAST_COLUMNS = 256
"""The narrowest tile that is made to keep all rows in it; below, rows are split instead, since
products of narrow tiles are slow."""
MOST_COLUMNS_ON_CPU = 2048
"""Measured: wider tiles leave the cache, and new memory costs a page fault every 4 KiB."""
MOST_COLUMNS_ON_CUDA = 8192
"""Measured on an H200: products of wider tiles are at most 2 % faster."""
GROUP_ROWS = (512, 256, 128)
"""Sizes of a group, the rows whose whole logits exist at a time while gradients of more rows are
kept; the first that fits is taken. Each group reads the weights once, and with fewer rows the
products wait for memory."""
PRODUCT_ROWS = (1024, 128)
"""Preferred numbers of rows in a product. A multiprocessor takes 128 at a time; 1024 give work to
all of them."""
COLUMN_MULTIPLE = 64
"""Tiles, and the rows in them, start at multiples of this number of columns. Products into rows
50257 numbers apart take longer than into rows 50304 apart (docs/fused-head.md)."""

Rows = slice | Tensor
"""Tokens: a range of them, or their indices ``[n]``."""


def row_stride(columns: int) -> int:
    """The distance from one row of a tile to the next, in numbers."""
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


class Plan(NamedTuple):
    """The size of the tiles, and of what lies beside them."""

    rows: int
    columns: int
    cast_columns: int
    """The number of columns whose weights are cast at a time, where products need a cast."""
    gradient_rows: int
    """The number of rows whose gradient exists at a time, where it lies beside the logits."""


class Costs(NamedTuple):
    """Scratch memory in bytes."""

    row: int
    """For each row: hidden states that are gathered, cast or scaled, and their gradient."""
    column: int
    """For each column: the weights that are cast."""
    logit: int
    """For each row and column: all tiles."""
    gradient: int = 0
    """For each row and column: the gradient of a logit; 0 if it overwrites the logit."""

    def row_with_tiles(self, columns: int) -> int:
        """For each row, with its part of tiles of so many columns."""
        return self.row + row_stride(columns) * (self.logit + self.gradient)


def costs(heads: tuple[Head, ...], tiles: int, gathers: bool, gradients: bool) -> Costs:
    """The memory that tiles of these heads cost.

    Args:
        heads: The policy's head first.
        tiles: The number of tiles that exist at a time.
        gathers: The rows are not a range, so their hidden states are copied.
        gradients: Gradients of the policy are made.
    """
    size = heads[0].accumulation_dtype.itemsize
    row = 0
    for head in heads:
        width = head.hidden.shape[1]
        if head.casts:
            row += width * (size + (head.hidden.element_size() if gathers else 0))
        elif gathers:
            row += width * head.hidden.element_size()
    column = max(head.weight.shape[1] * size if head.casts else 0 for head in heads)
    if not gradients:
        return Costs(row, column, tiles * size)
    policy = heads[0]
    width, stored = policy.hidden.shape[1], policy.gradient_dtype.itemsize
    if gathers:
        row += width * size
    if not policy.rounds_gradient:
        return Costs(row, column, tiles * size)
    return Costs(row + width * stored, column, tiles * size, stored)


def plan_tiles(
    cost: Costs, rows: int, vocabulary: int, chunk_bytes: int, most_columns: int
) -> Plan:
    """Tiles of all rows and as many columns as fit; of fewer rows if that would be too narrow."""
    columns = min(LEAST_COLUMNS, vocabulary)
    fitting = (chunk_bytes - columns * cost.column) // cost.row_with_tiles(columns)
    rows = max(1, min(rows, fitting))
    left = chunk_bytes - rows * cost.row
    columns = left // (cost.column + rows * (cost.logit + cost.gradient))
    columns = max(1, columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    columns = min(columns, most_columns, vocabulary)
    return Plan(rows, columns, columns, rows)


def plan_whole_rows(cost: Costs, rows: int, vocabulary: int, chunk_bytes: int) -> Plan:
    """Tiles of the whole vocabulary and as many rows as fit, at least one."""
    cast_columns = vocabulary
    if cost.column:  # weights are cast on the CPU only; the cast ones must not leave the cache
        most = min(vocabulary, MOST_COLUMNS_ON_CPU)
        cast_columns = max(1, min(most, chunk_bytes // 8 // cost.column))
    left = chunk_bytes - cast_columns * cost.column
    fitting = left // cost.row_with_tiles(vocabulary)
    fitting = max(1, min(rows, fitting))
    return Plan(fitting, vocabulary, cast_columns, fitting)


def gradient_rows_that_fit(cost: Costs, group: int, vocabulary: int, chunk_bytes: int) -> int:
    """The number of rows whose gradient fits beside the whole logits of one group of rows."""
    logits_of_row = row_stride(vocabulary) * cost.logit
    rest_of_row = cost.row_with_tiles(vocabulary) - logits_of_row
    at_once = chunk_bytes // (rest_of_row + logits_of_row)  # if all rows are one group
    return at_once if at_once <= group else (chunk_bytes - group * logits_of_row) // rest_of_row


def plan_groups(
    cost: Costs, rows: int, vocabulary: int, chunk_bytes: int, all_at_once: bool
) -> Plan:
    """Whole logits of one group of rows at a time, and gradients of several groups.

    ``all_at_once``: the gradients of all rows must be in memory at once; else as many as fit.
    """
    group = kept = 0
    for group in GROUP_ROWS:
        kept = gradient_rows_that_fit(cost, group, vocabulary, chunk_bytes)
        if kept >= (rows if all_at_once else min(rows, 2 * group)):
            break
    if all_at_once:
        kept = rows
    elif kept < rows:
        multiple = next((x for x in PRODUCT_ROWS if x <= kept), 1)
        kept = kept // multiple * multiple
    kept = max(1, min(kept, rows))  # also without tokens: no loop has steps of 0 rows
    return Plan(min(group, kept), vocabulary, vocabulary, kept)


def pairs_that_fit(cost: Costs, tokens_of_pair: int, vocabulary: int, chunk_bytes: int) -> int:
    """The number of pairs whose logits, or gradients beside them, fit at a time; 0 if none does."""
    if cost.gradient:
        fitting = (gradient_rows_that_fit(cost, x, vocabulary, chunk_bytes) for x in GROUP_ROWS)
        return next((rows // tokens_of_pair for rows in fitting if rows >= tokens_of_pair), 0)
    plan = plan_whole_rows(cost, 2**62, vocabulary, chunk_bytes)
    fits = plan.rows * cost.row_with_tiles(vocabulary) <= chunk_bytes
    return plan.rows // tokens_of_pair if fits else 0


class Cast:
    """Memory for weights that are cast, which remembers what it holds.

    Two products in sequence often take the same weights, which are then cast once.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.held: tuple[int, range] | None = None

    def rows_of(self, weight: Tensor, rows: range) -> Tensor:
        """These rows of a weight, cast."""
        width = weight.shape[1]
        cast = self.memory[: len(rows) * width].view(len(rows), width)
        if self.held != (id(weight), rows):
            cast.copy_(weight[rows.start : rows.stop])
            self.held = id(weight), rows
        return cast


class Scratch:
    """The memory of a plan, allocated once: tiles, cast weights and, if asked for, gradients."""

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
        """The tile of this number, ``[rows, columns]``."""
        return _tile_of(self.tiles[number], rows, columns)

    def gradient(self, rows: int, columns: int) -> Tensor | None:
        """Memory ``[rows, columns]`` for a gradient beside the logits; None: it overwrites them."""
        return None if self.gradients is None else _tile_of(self.gradients, rows, columns)


def _tile_of(memory: Tensor, rows: int, columns: int) -> Tensor:
    stride = row_stride(columns)
    return memory[: rows * stride].view(rows, stride)[:, :columns]


def column_ranges(vocabulary: int, step: int) -> Iterator[range]:
    """The vocabulary in ranges of ``step`` columns."""
    for start in range(0, vocabulary, step):
        yield range(start, min(start + step, vocabulary))


def row_chunks(rows: Rows, step: int) -> Iterator[Rows]:
    """The rows in chunks of ``step``."""
    if isinstance(rows, slice):
        for start in range(rows.start, rows.stop, step):
            yield slice(start, min(start + step, rows.stop))
    else:
        yield from rows.split(step)


def row_count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def rows_of_groups(group: Tensor, groups: int) -> list[Rows]:
    """The rows of each group, given the number of each row's group, ``[N]``.

    Rows of number ``groups`` are left out. This is the one place where the host waits for a device.
    """
    total = group.numel()
    counts: list[int] = torch.bincount(group, minlength=groups + 1).tolist()[:groups]
    if total in counts:  # one group has all rows
        return [slice(0, total if count == total else 0) for count in counts]
    order = torch.argsort(group, stable=True)
    return list(order[: sum(counts)].split(counts))
