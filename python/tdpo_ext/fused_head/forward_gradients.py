"""The paths "direction" and "whole pairs": gradients made in forward, from the same logits.

They take 3 and 4 units. A row's whole logits exist, so its statistics are known before its gradient
is made.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tdpo_ext.fused_head.head import HeadGradients, Wanted
from tdpo_ext.fused_head.problem import (
    Problem,
    Upstream,
    put,
    tile_gradient,
    whole_logits,
    zeros,
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
    """Write the statistics of some rows to ``outputs``, and add their gradients to ``gradients``.

    Args:
        problem: The inputs.
        rows: Whole rows. If the gradient of the logits overwrites them, all rows are one group.
            Otherwise they are processed group by group.
        upstream_of: The upstream gradients of log p(y) and of the KL for the rows of one group. It
            is called when the statistics of the group are in ``outputs``.
        factor_of: A factor for each row's gradient. It is called when the statistics of all
            ``rows`` are in ``outputs``; None: 1.
        outputs: The statistics of all rows of the problem.
        gradients: The gradients of the policy's head.
        scratch: Memory for the logits.
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
        group_gradient = None if beside is None else beside[at]
        made = tile_gradient(problem, tiles, labels, upstream, group_gradient)
        gradient = made if beside is None else beside
        start = at.stop
    assert gradient is not None
    gradients.begin_pass(rows, states, None if factor_of is None else factor_of(rows))
    gradients.add(range(problem.policy.vocabulary), gradient, scratch.cast)
    gradients.end_pass()


def unit_upstream(
    problem: Problem, ratio: Tensor
) -> tuple[Callable[[Rows], tuple[Tensor, Tensor]], Tensor | None]:
    """Upstream gradients of the objective log p(y) + ratio KL, and the scale they are times.

    They are 1 for log p(y) and ``ratio`` for the KL; both are 0 for ignored rows.
    """
    unit = problem.kept.to(ratio.dtype)
    scale = problem.policy.scale_of_gradient(unit + ratio.abs())
    if scale is not None:
        unit *= scale
    return lambda rows: (unit[rows], ratio[rows] * unit[rows]), scale


def forward_with_direction(problem: Problem, ratio: Tensor) -> tuple[kernels.Outputs, Tensor]:
    """The statistics, and the gradient of log p(y) + ratio KL for the hidden states, ``[N, H]``.

    If the upstream gradient of each token's KL is ``ratio``, ``[N]``, times that of its log p(y),
    then backward only multiplies this by the upstream gradient of log p(y).
    """
    rows = problem.kept_rows()
    outputs = zeros(kernels.empty_outputs(problem.policy.hidden, problem.labels.shape))
    upstream_of, scale = unit_upstream(problem, ratio.to(outputs[0].dtype))
    wanted = Wanted(hidden=True, weight=False, bias=False)
    gradients = HeadGradients(problem.policy, wanted, scale)
    plan = problem.plan_with_gradients(rows, all_at_once=False)
    scratch = Scratch(plan, problem.heads, tiles=2, gradients=True)
    for chunk in row_chunks(rows, plan.gradient_rows):
        forward_and_gradient(problem, chunk, upstream_of, None, outputs, gradients, scratch)
    return outputs, gradients.results()[0]


def forward_by_pairs(
    problem: Problem,
    chunk_of_token: Tensor,
    chunks: int,
    ratio: Tensor,
    slopes_of: Callable[[kernels.Outputs], Tensor],
    wanted: Wanted,
) -> tuple[kernels.Outputs, tuple[Tensor, ...]]:
    """The statistics, and the gradients of the loss for the policy's head, some pairs at a time.

    If the gradient of the logits lies beside them, it is made without the slopes, which need the
    statistics of all tokens of a pair. The slopes come in later: the result of the product is
    scaled for the hidden states, the hidden states are scaled before the product for the weight,
    and the slopes are an operand of the product for the bias (``HeadGradients``).

    Args:
        problem: The inputs.
        chunk_of_token: The number of each token's chunk, ``[N]``. A chunk holds whole pairs.
        chunks: The number of chunks.
        ratio: The upstream gradient of each token's KL over that of its log p(y), ``[N]``.
        slopes_of: The derivative of the loss with respect to each token's log p(y), ``[N]``, from
            the outputs so far. Only slopes of pairs whose statistics are complete are used.
        wanted: The tensors that get a gradient.

    Returns:
        The outputs, and the gradients of hidden states, weight and bias.
    """
    outputs = zeros(kernels.empty_outputs(problem.policy.hidden, problem.labels.shape))
    rounded = problem.policy.rounds_gradient
    unit, scale = unit_upstream(problem, ratio) if rounded else (None, None)
    gradients = HeadGradients(problem.policy, wanted, scale)
    groups = rows_of_groups(chunk_of_token.masked_fill(~problem.kept, chunks), chunks)
    plan = problem.plan_with_gradients(max(groups, key=row_count), all_at_once=True)
    scratch = Scratch(plan, problem.heads, tiles=2, gradients=True)

    def factor_of(rows: Rows) -> Tensor:
        return slopes_of(outputs)[rows]

    def upstream_of(rows: Rows) -> tuple[Tensor, Tensor]:
        slopes = slopes_of(outputs)[rows]
        return slopes, slopes * ratio[rows]

    for rows in filter(row_count, groups):
        if unit is not None:
            forward_and_gradient(problem, rows, unit, factor_of, outputs, gradients, scratch)
        else:
            forward_and_gradient(problem, rows, upstream_of, None, outputs, gradients, scratch)
    return outputs, gradients.results()
