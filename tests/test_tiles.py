"""Tiles fit ``chunk_bytes`` and use what it gives: speed and memory, which no result shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from tdpo_ext.fused_head import Problem
from tdpo_ext.head import Head
from tdpo_ext.tiles import (
    COLUMN_MULTIPLE,
    LEAST_COLUMNS,
    MOST_COLUMNS_ON_CPU,
    Costs,
    Plan,
    Scratch,
    column_ranges,
    costs,
    pairs_that_fit,
    plan_tiles,
    plan_whole_rows,
    row_chunks,
    row_stride,
    rows_of_groups,
)

COSTS = [Costs(0, 0, 8), Costs(512, 0, 8), Costs(96, 64, 8), Costs(4096, 8192, 16)]
ROWS, VOCABULARIES = (1, 3, 100, 5000), (1, 65, 640, 128_256)
CHUNKS = (1, 20_000, 10**6, 2**28)


def heads(dtype: torch.dtype, rows: int = 5, vocabulary: int = 131) -> tuple[Head, Head]:
    def head(width: int) -> Head:
        states, weight = torch.zeros(rows, width), torch.zeros(vocabulary, width)
        return Head(states.to(dtype), weight.to(dtype), None, 1.0, 0.0)

    return head(19), head(13)


@pytest.mark.parametrize(
    ("dtype", "gathers", "wanted"),
    [
        (torch.float32, False, Costs(0, 0, 8)),
        (torch.float32, True, Costs((19 + 13) * 4, 0, 8)),
        (torch.float64, True, Costs((19 + 13) * 8, 0, 16)),
        # Cast to float32, as products on the CPU need it; what is gathered is so first.
        (torch.bfloat16, False, Costs((19 + 13) * 4, 19 * 4, 8)),
        (torch.bfloat16, True, Costs((19 + 13) * 6, 19 * 4, 8)),
    ],
)
def test_what_a_row_a_column_and_a_logit_cost(dtype, gathers, wanted):
    assert costs(heads(dtype), tiles=2, gathers=gathers) == wanted


def taken(cost: Costs, plan: Plan) -> int:
    of_tiles = plan.rows * row_stride(plan.columns) * cost.of_logit
    return plan.rows * cost.of_row + plan.cast_columns * cost.of_column + of_tiles


@pytest.mark.parametrize("cost", COSTS)
def test_tiles_fit_and_no_larger_ones_would(cost):
    for rows, vocabulary, chunk in itertools.product(ROWS, VOCABULARIES, CHUNKS):
        plan = plan_tiles(cost, rows, vocabulary, chunk, MOST_COLUMNS_ON_CPU)
        most, least = min(vocabulary, MOST_COLUMNS_ON_CPU), min(vocabulary, LEAST_COLUMNS)
        assert 1 <= plan.rows <= rows
        assert 1 <= plan.columns <= most
        assert plan.columns == plan.cast_columns
        assert plan.columns == most or plan.columns % COLUMN_MULTIPLE == 0
        if plan.rows > 1 or plan.columns > COLUMN_MULTIPLE:
            assert taken(cost, plan) <= chunk
        if plan.rows < rows:
            assert taken(cost, Plan(plan.rows + 1, least, least)) > chunk
        wider = plan.columns + COLUMN_MULTIPLE
        if wider <= most:
            assert taken(cost, Plan(plan.rows, wider, wider)) > chunk


@pytest.mark.parametrize("cost", COSTS)
def test_whole_rows_fit_and_no_more_would(cost):
    for rows, vocabulary, chunk in itertools.product(ROWS, VOCABULARIES, CHUNKS):
        plan = plan_whole_rows(cost, rows, vocabulary, chunk)
        assert 1 <= plan.rows <= rows
        assert plan.columns == vocabulary
        assert 1 <= plan.cast_columns <= vocabulary
        if plan.rows > 1:
            assert taken(cost, plan) <= chunk
        if plan.cast_columns > 1:  # most is left for logits
            assert plan.cast_columns * cost.of_column <= chunk / 8
        if cost.of_column:  # and what is cast stays in the cache
            assert plan.cast_columns <= MOST_COLUMNS_ON_CPU
        if plan.rows < rows:
            assert taken(cost, plan._replace(rows=plan.rows + 1)) > chunk


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_as_many_pairs_as_fit(tokens):
    cost, vocabulary = Costs(512, 0, 8), 640
    pair = tokens * (cost.of_row + vocabulary * cost.of_logit)
    for chunk in (1, pair - 1, pair, pair + 1, 3 * pair - 1, 3 * pair):
        assert pairs_that_fit(cost, tokens, vocabulary, chunk) == chunk // pair


@pytest.mark.parametrize("columns", [1, 64, 131])
def test_rows_of_tiles_start_aligned(columns):
    """Products into rows that do not are slower."""
    tile = Scratch(Plan(5, 131, 131), heads(torch.float32), tiles=1).tile(0, 5, columns)
    assert tile.shape == (5, columns)
    assert tile.stride() == (-(-columns // 64) * 64, 1)


def test_on_the_cpu_tiles_stay_in_the_cache():
    problem = Problem(*heads(torch.float32, 4, 9000), torch.zeros(4).long(), -100, 2**28)
    assert problem.plan(slice(0, 4), 2, whole_rows=False).columns == MOST_COLUMNS_ON_CPU


def test_ranges_end_where_the_whole_ends():
    assert [*column_ranges(5, 2)] == [range(2), range(2, 4), range(4, 5)]
    assert [*row_chunks(slice(1, 6), 3)] == [slice(1, 4), slice(4, 6)]
    assert [x.tolist() for x in row_chunks(torch.tensor([7, 1, 4]), 2)] == [[7, 1], [4]]


def test_rows_of_groups():
    of_two = rows_of_groups(torch.tensor([1, 2, 0, 1, 2]), 2)
    assert [rows.tolist() for rows in of_two] == [[2], [0, 3]]
    # Nothing is gathered where one group has all.
    assert rows_of_groups(torch.tensor([1, 1, 1]), 2) == [slice(0, 0), slice(0, 3)]
