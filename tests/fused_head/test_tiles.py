"""Tiles fit ``chunk_bytes`` and use what it gives: speed and memory, which no result shows."""

from __future__ import annotations

import itertools

import pytest
import torch

from tdpo_ext.fused_head import products
from tdpo_ext.fused_head.head import Head
from tdpo_ext.fused_head.problem import Problem
from tdpo_ext.fused_head.tiles import (
    COLUMN_MULTIPLE,
    GROUP_ROWS,
    LEAST_COLUMNS,
    MOST_COLUMNS_ON_CPU,
    Costs,
    Plan,
    Scratch,
    column_ranges,
    costs,
    pairs_that_fit,
    plan_groups,
    plan_tiles,
    plan_whole_rows,
    row_chunks,
    row_stride,
    rows_of_groups,
)

COSTS = [Costs(0, 0, 8), Costs(512, 0, 8), Costs(96, 64, 8), Costs(4096, 8192, 16)]
COSTS += [Costs(512, 0, 8, 2), Costs(512, 0, 4, 2)]
ROWS, VOCABULARIES = (1, 3, 100, 5000), (1, 65, 640, 128_256)
CHUNKS = (1, 20_000, 10**6, 2**28)


def heads(dtype: torch.dtype, rows: int = 5, vocabulary: int = 131) -> tuple[Head, Head]:
    def head(width: int) -> Head:
        states, weight = torch.zeros(rows, width), torch.zeros(vocabulary, width)
        return Head(states.to(dtype), weight.to(dtype), None, 1.0, 0.0)

    return head(19), head(13)


@pytest.mark.parametrize(
    ("dtype", "gathers", "gradients", "half_width", "wanted"),
    [
        # dh of gathered rows is added up beside the others, dz lies over the logits.
        (torch.float32, True, True, False, Costs((19 + 13) * 4 + 19 * 4, 0, 8)),
        (torch.float32, False, True, False, Costs(0, 0, 8)),
        # As on CUDA: nothing is cast, but states are scaled, and dz has memory of its own.
        (torch.bfloat16, True, True, True, Costs((19 + 13) * 2 + 19 * 4 + 19 * 2, 0, 8, 2)),
        (torch.bfloat16, False, True, True, Costs(19 * 2, 0, 8, 2)),
        (torch.bfloat16, True, False, True, Costs((19 + 13) * 2, 0, 8)),
        (torch.float32, True, True, True, Costs((19 + 13) * 4 + 19 * 4, 0, 8)),
        (torch.float32, False, False, False, Costs(0, 0, 8)),
        (torch.float32, True, False, False, Costs((19 + 13) * 4, 0, 8)),
        (torch.float64, True, False, False, Costs((19 + 13) * 8, 0, 16)),
        # Cast to float32, as products on the CPU need it; what is gathered is so first.
        (torch.bfloat16, False, False, False, Costs((19 + 13) * 4, 19 * 4, 8)),
        (torch.bfloat16, True, False, False, Costs((19 + 13) * 6, 19 * 4, 8)),
    ],
)
def test_what_a_row_a_column_and_a_logit_cost(
    monkeypatch, dtype, gathers, gradients, half_width, wanted
):
    monkeypatch.setattr(products, "takes_half_width", lambda device: half_width)
    assert costs(heads(dtype), tiles=2, gathers=gathers, gradients=gradients) == wanted


def taken(cost: Costs, plan: Plan) -> int:
    stride = row_stride(plan.columns)
    tiles = stride * (plan.rows * cost.logit + plan.gradient_rows * cost.gradient)
    return plan.gradient_rows * cost.row + plan.cast_columns * cost.column + tiles


@pytest.mark.parametrize("cost", COSTS)
def test_tiles_fit_and_no_larger_ones_would(cost):
    for rows, vocabulary, chunk in itertools.product(ROWS, VOCABULARIES, CHUNKS):
        plan = plan_tiles(cost, rows, vocabulary, chunk, MOST_COLUMNS_ON_CPU)
        assert plan.gradient_rows == plan.rows
        most, least = min(vocabulary, MOST_COLUMNS_ON_CPU), min(vocabulary, LEAST_COLUMNS)
        assert 1 <= plan.rows <= rows
        assert 1 <= plan.columns <= most
        assert plan.columns == plan.cast_columns
        assert plan.columns == most or plan.columns % COLUMN_MULTIPLE == 0
        if plan.rows > 1 or plan.columns > COLUMN_MULTIPLE:
            assert taken(cost, plan) <= chunk
        if plan.rows < rows:
            more = plan.rows + 1
            assert taken(cost, Plan(more, least, least, more)) > chunk
        wider = plan.columns + COLUMN_MULTIPLE
        if wider <= most:
            assert taken(cost, Plan(plan.rows, wider, wider, plan.rows)) > chunk


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
            assert plan.cast_columns * cost.column <= chunk / 8
        if cost.column:  # and what is cast stays in the cache
            assert plan.cast_columns <= MOST_COLUMNS_ON_CPU
        if plan.rows < rows:
            more = plan.rows + 1
            assert taken(cost, plan._replace(rows=more, gradient_rows=more)) > chunk


def of_groups(rows: int, vocabulary: int, kept: int) -> Plan:
    return Plan(min(rows, kept), vocabulary, vocabulary, kept)


@pytest.mark.parametrize("all_at_once", [False, True])
def test_groups_are_as_large_as_fits(all_at_once):
    cost = Costs(512, 0, 8, 2)
    for rows, vocabulary in itertools.product((1, 100, 700, 5000), VOCABULARIES):
        for chunk in (10**6, 2**28, 2**30, 2**31, 2**33):
            plan = plan_groups(cost, rows, vocabulary, chunk, all_at_once)
            assert 1 <= plan.rows <= plan.gradient_rows <= rows
            assert plan.columns == vocabulary
            if all_at_once:
                assert plan.gradient_rows == rows
                smallest = min(rows, GROUP_ROWS[-1])
                assert taken(cost, plan) <= chunk or plan.rows == smallest
            else:
                assert taken(cost, plan) <= chunk or plan.gradient_rows == 1
            for group in GROUP_ROWS:  # larger ones leave no room for all rows, or two groups
                enough = rows if all_at_once else min(rows, 2 * group)
                if plan.rows < min(group, rows):
                    assert taken(cost, of_groups(group, vocabulary, enough)) > chunk


@pytest.mark.parametrize(
    ("chunk", "wanted"),
    # 8192 tokens, gathered, V = 128256, H = 4096: a token whose gradient is kept takes
    # 256512 + 40960 bytes, and a token of the group 1026048 more.
    [(2**31, (512, 5120)), (2**30, (512, 1024)), (2**29, (256, 896)), (2**28, (128, 384))],
)
def test_groups_of_rows_that_products_take_well(chunk, wanted):
    plan = plan_groups(Costs(40960, 0, 8, 2), 8192, 128256, chunk, all_at_once=False)
    assert (plan.rows, plan.gradient_rows) == wanted


@pytest.mark.parametrize("tokens", [1, 3, 40, 200, 1500])
@pytest.mark.parametrize("chunk", [10**5, 10**6, 10**7, 3 * 10**7])
def test_as_many_pairs_as_fit_in_groups(tokens, chunk):
    cost, vocabulary = Costs(512, 0, 8, 2), 640
    pairs = pairs_that_fit(cost, tokens, vocabulary, chunk)
    fitting = [x for x in GROUP_ROWS if taken(cost, of_groups(x, vocabulary, tokens)) <= chunk]
    assert (pairs > 0) == bool(fitting)
    if fitting:
        plan = plan_groups(cost, pairs * tokens, vocabulary, chunk, all_at_once=True)
        assert taken(cost, plan) <= chunk
        more = of_groups(fitting[0], vocabulary, (pairs + 1) * tokens)
        assert taken(cost, more) > chunk


def test_a_pair_fits_in_fewer_than_four_bytes_a_logit():
    """The gradient of all of its tokens in bfloat16, and the logits of some."""
    tokens, vocabulary = 2048, 128256
    cost = Costs(0, 0, 8, 2)
    assert pairs_that_fit(cost, tokens, vocabulary, 4 * tokens * vocabulary) == 1
    least = (2 * tokens + 8 * GROUP_ROWS[-1]) * vocabulary
    assert pairs_that_fit(cost, tokens, vocabulary, least) == 1
    assert pairs_that_fit(cost, tokens, vocabulary, least - 1) == 0
    assert pairs_that_fit(Costs(0, 0, 8), tokens, vocabulary, 8 * tokens * vocabulary - 1) == 0


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_as_many_pairs_as_fit(tokens):
    cost, vocabulary = Costs(512, 0, 8), 640
    pair = tokens * (cost.row + vocabulary * cost.logit)
    for chunk in (1, pair - 1, pair, pair + 1, 3 * pair - 1, 3 * pair):
        assert pairs_that_fit(cost, tokens, vocabulary, chunk) == chunk // pair


@pytest.mark.parametrize("columns", [1, 64, 131])
def test_rows_of_tiles_start_aligned(columns):
    """Products into rows that do not are slower."""
    tile = Scratch(Plan(5, 131, 131, 5), heads(torch.float32), tiles=1).tile(0, 5, columns)
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
