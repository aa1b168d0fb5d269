"""How much of the logits exists at a time: tiles that fit ``chunk_bytes``, and memory for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.head import Cast, Head, Rows

LEAST_COLUMNS = 256
"""Rows are split only if all of them leave room for fewer columns than these: products of narrow
tiles are slow."""
MOST_COLUMNS_ON_CPU = 2048
"""Measured: wider tiles leave the cache, and fresh memory costs a page fault every 4 KiB."""
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


class Costs(NamedTuple):
    """Bytes of scratch memory."""

    of_row: int  # hidden states that are gathered or cast
    of_column: int  # weights that are cast
    of_logit: int  # the tiles

    def row_with(self, columns: int) -> int:
        """Of a row, with its part of tiles so wide."""
        return self.of_row + row_stride(columns) * self.of_logit


def costs(heads: tuple[Head, ...], tiles: int, gathers: bool) -> Costs:
    """``tiles``: of logits' size at a time. ``gathers``: the rows are not a range."""
    size = heads[0].accumulation_dtype.itemsize
    of_row = 0
    for head in heads:
        width = head.hidden.shape[1]
        if head.casts:
            of_row += width * (size + (head.hidden.element_size() if gathers else 0))
        elif gathers:
            of_row += width * head.hidden.element_size()
    of_column = max(head.weight.shape[1] * size if head.casts else 0 for head in heads)
    return Costs(of_row, of_column, tiles * size)


def plan_tiles(
    cost: Costs, rows: int, vocabulary: int, chunk_bytes: int, most_columns: int
) -> Plan:
    """Tiles of all rows and as many columns as fit; of fewer rows if those would be too few."""
    columns = min(LEAST_COLUMNS, vocabulary)
    fitting = (chunk_bytes - columns * cost.of_column) // cost.row_with(columns)
    rows = max(1, min(rows, fitting))
    left = chunk_bytes - rows * cost.of_row
    columns = left // (cost.of_column + rows * cost.of_logit)
    columns = max(1, columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    columns = min(columns, most_columns, vocabulary)
    return Plan(rows, columns, columns)


def plan_whole_rows(cost: Costs, rows: int, vocabulary: int, chunk_bytes: int) -> Plan:
    """As many rows as fit with the whole vocabulary, at least one."""
    cast_columns = vocabulary
    if cost.of_column:  # products are cast for on the CPU; what is cast must not leave the cache
        most = min(vocabulary, MOST_COLUMNS_ON_CPU)
        cast_columns = max(1, min(most, chunk_bytes // 8 // cost.of_column))
    left = chunk_bytes - cast_columns * cost.of_column
    fitting = left // cost.row_with(vocabulary)
    return Plan(max(1, min(rows, fitting)), vocabulary, cast_columns)


def pairs_that_fit(cost: Costs, tokens_of_pair: int, vocabulary: int, chunk_bytes: int) -> int:
    """Of how many pairs the logits fit at a time; 0 if not even of one."""
    plan = plan_whole_rows(cost, 2**62, vocabulary, chunk_bytes)
    fits = plan.rows * cost.row_with(vocabulary) <= chunk_bytes
    return plan.rows // tokens_of_pair if fits else 0


class Scratch:
    """Memory for tiles, taken once."""

    def __init__(self, plan: Plan, heads: tuple[Head, ...], tiles: int) -> None:
        like = heads[0].hidden
        dtype = heads[0].accumulation_dtype
        self.plan = plan
        size = plan.rows * row_stride(plan.columns)
        self.tiles = [like.new_empty(size, dtype=dtype) for _ in range(tiles)]
        width = max(head.weight.shape[1] if head.casts else 0 for head in heads)
        self.cast = Cast(like.new_empty(plan.cast_columns * width, dtype=dtype))

    def tile(self, number: int, rows: int, columns: int) -> Tensor:
        stride = row_stride(columns)
        return self.tiles[number][: rows * stride].view(rows, stride)[:, :columns]


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
