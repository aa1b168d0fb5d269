"""Statistics and, with these known, gradients of the same logits in forward: 3 or 4 units."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tdpo_ext.fused_head.head import HeadGradients, Wanted
from tdpo_ext.fused_head.problem import (
    Problem,
    Upstream,
    empty_outputs,
    put,
    tile_gradient,
    whole_logits,
)
from tdpo_ext.fused_head.tiles import Rows, Scratch, row_chunks, row_count, rows_of_groups
from tdpo_ext.token_statistics import kernels


def forward_and_gradient(
    problem: Problem,
    rows: Rows,
    upstream_of: Callable[[Rows], tuple[Tensor, Tensor]],
    factor_of: Callable[[Rows], Tensor] | None,
    outputs: kernels.Outputs,
    gradients: HeadGradients,
    scratch: Scratch,
) -> None:
    """Whole rows of logits: their statistics, then, with these known, their gradients.

    ``factor_of``: what the gradients by ``upstream_of`` lack, row by row, known when the statistics
    of all ``rows`` are. Where the gradient lies over the logits all rows are one group.
    """
    states, start = problem.policy.states_of(rows), 0
    beside = scratch.gradient(row_count(rows), problem.policy.vocabulary)
    gradient = beside
    for group in row_chunks(rows, scratch.plan.rows):
        at = slice(start, start + row_count(group))
        tiles = whole_logits(problem, states[at], problem.reference.states_of(group), scratch)
        labels = problem.labels[group]
        values = kernels.token_stats(*tiles, labels, problem.ignore_index)
        put(outputs, group, values)
        upstream = Upstream(values[3], *upstream_of(group))
        of_group = None if beside is None else beside[at]
        made = tile_gradient(problem, tiles, labels, upstream, of_group)
        gradient = made if beside is None else beside
        start = at.stop
    assert gradient is not None
    gradients.begin_pass(rows, states, None if factor_of is None else factor_of(rows))
    gradients.add(range(problem.policy.vocabulary), gradient, scratch.cast)
    gradients.end_pass()


def unit_upstream(problem: Problem, ratio: Tensor) -> Callable[[Rows], tuple[Tensor, Tensor]]:
    """The gradients of log p(y) + ratio KL; none of ignored rows."""
    unit = problem.kept.to(ratio.dtype)
    return lambda rows: (unit[rows], ratio[rows] * unit[rows])


def forward_with_direction(problem: Problem, ratio: Tensor) -> tuple[kernels.Outputs, Tensor]:
    """Statistics, and the gradient ``[N, H]`` of log p(y) + ratio KL by the hidden states.

    Where the gradient of the KL is known to be ``ratio`` ``[N]`` times that of log p(y), this is
    all of the gradient but one factor per token.
    """
    rows, outputs = problem.kept_rows(), empty_outputs(problem)
    gradients = HeadGradients(problem.policy, Wanted(hidden=True, weight=False, bias=False))
    plan = problem.plan_with_gradients(rows, all_at_once=False)
    scratch = Scratch(plan, problem.heads, tiles=2, gradients=True)
    upstream_of = unit_upstream(problem, ratio.to(outputs[0].dtype))
    for chunk in row_chunks(rows, plan.gradient_rows):
        forward_and_gradient(problem, chunk, upstream_of, None, outputs, gradients, scratch)
    return outputs, gradients.hidden


def forward_by_pairs(
    problem: Problem,
    chunk_of_token: Tensor,
    chunks: int,
    ratio: Tensor,
    slopes_of: Callable[[kernels.Outputs], Tensor],
    wanted: Wanted,
) -> tuple[kernels.Outputs, tuple[Tensor, ...]]:
    """Statistics and gradients, of as many pairs at a time as have a number in ``chunk_of_token``.

    ``slopes_of``: the gradient of the loss by log p(y) of each token, ``[N]``, from the outputs so
    far; it is asked for the tokens of pairs that are complete. That by the KL is ``ratio`` times
    it. Where the gradient of the logits lies beside them it is made without the slopes, which scale
    what is made of it.
    """
    outputs = empty_outputs(problem)
    gradients = HeadGradients(problem.policy, wanted)
    groups = rows_of_groups(chunk_of_token.masked_fill(~problem.kept, chunks), chunks)
    plan = problem.plan_with_gradients(max(groups, key=row_count), all_at_once=True)
    scratch = Scratch(plan, problem.heads, tiles=2, gradients=True)

    def factor_of(rows: Rows) -> Tensor:
        return slopes_of(outputs)[rows]

    def upstream_of(rows: Rows) -> tuple[Tensor, Tensor]:
        slopes = slopes_of(outputs)[rows]
        return slopes, slopes * ratio[rows]

    unit = unit_upstream(problem, ratio)
    for rows in filter(row_count, groups):
        if problem.policy.rounds_gradient:
            forward_and_gradient(problem, rows, unit, factor_of, outputs, gradients, scratch)
        else:
            forward_and_gradient(problem, rows, upstream_of, None, outputs, gradients, scratch)
    return outputs, gradients.results()
