"""The path "recompute": gradients for any upstream gradients, from logits that are made once more.

With the products of dh and dW it takes 3 to 4 units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tdpo_ext.distributed import sum_gradient
from tdpo_ext.fused_head.head import HeadGradients, Wanted
from tdpo_ext.fused_head.problem import (
    Problem,
    of_rows,
    tile_gradient,
    times,
    with_zeros,
)
from tdpo_ext.fused_head.tiles import (
    Rows,
    Scratch,
    column_ranges,
    row_chunks,
    row_count,
    rows_of_groups,
)
from tdpo_ext.token_statistics import kernels

if TYPE_CHECKING:
    from tdpo_ext.fused_head.quantities import AnyUpstream


class Kind(NamedTuple):
    """Whose logits the gradient of a row needs (docs/algebra.md)."""

    policy: bool
    reference: bool


KINDS = (Kind(True, True), Kind(True, False), Kind(False, True))


def rows_of_kinds(problem: Problem, upstream: AnyUpstream) -> list[Rows]:
    """The rows of each of ``KINDS``; rows with gradient 0 are left out."""
    if problem.captured:
        return [slice(0, problem.labels.numel()), slice(0, 0), slice(0, 0)]
    kind = torch.zeros_like(problem.labels)
    if kernels.serves(kind.device):  # plain PyTorch reads both in any case
        kind.masked_fill_(upstream.policy_alone, 1).masked_fill_(upstream.reference_alone, 2)
    nothing = upstream.is_zero | ~problem.kept
    return rows_of_groups(kind.masked_fill_(nothing, len(KINDS)), len(KINDS))


def backward(problem: Problem, upstream: AnyUpstream, wanted: Wanted) -> tuple[Tensor, ...]:
    """Gradients of the policy's hidden states, weight and bias for any upstream gradients."""
    if problem.captured:  # no row is left out, so ignored ones get upstream gradients 0
        upstream = with_zeros(upstream, ~problem.kept)
    # An ignored token's may be NaN: where torch.where leaves out sqrt(KL), it is 0 * inf at KL = 0.
    sizes = upstream.size_of_gradient().masked_fill(~problem.kept, 0)
    scale = problem.policy.scale_of_gradient(sizes)
    if scale is not None:
        upstream = times(upstream, scale)
    gradients = HeadGradients(problem.policy, wanted, scale)
    for kind, rows in zip(KINDS, rows_of_kinds(problem, upstream), strict=True):
        if row_count(rows):
            backward_of_kind(problem, kind, rows, upstream, gradients)
    results = gradients.results()  # without the scale, which may differ between processes
    if problem.shard is not None and wanted.hidden:
        sum_gradient(results[0], problem.shard)
    return results


def backward_of_kind(
    problem: Problem, kind: Kind, rows: Rows, upstream: AnyUpstream, gradients: HeadGradients
) -> None:
    """Add the gradients of all rows of one kind.

    Its scratch memory is freed on return, before the next kind allocates some.
    """
    whole_rows = not kernels.serves(problem.labels.device)
    tiles = 2 if problem.policy.softcap else kind.policy + kind.reference
    plan = problem.plan(rows, tiles, whole_rows=whole_rows, gradients=True)
    scratch = Scratch(plan, problem.heads, tiles, gradients=True)
    for chunk in row_chunks(rows, plan.rows):
        of_chunk = of_rows(upstream, chunk)
        if not kind.policy:  # no kernel of divergences leaves out the policy's logits
            of_chunk = of_chunk.of_statistics()
        recompute(problem, kind, chunk, of_chunk, gradients, scratch)


def recompute(
    problem: Problem,
    kind: Kind,
    rows: Rows,
    upstream: AnyUpstream,
    gradients: HeadGradients,
    scratch: Scratch,
) -> None:
    """Add the gradients of some rows of one kind, tile by tile."""
    policy, reference = problem.heads
    states = policy.states_of(rows)
    reference_states = reference.states_of(rows) if kind.reference else states
    labels = problem.own_labels[rows]
    gradients.begin_pass(rows, states)
    for columns in column_ranges(policy.vocabulary, scratch.plan.columns):
        shape = labels.numel(), len(columns)
        z, r = scratch.tile(0, *shape), scratch.tile(-1, *shape)
        if kind.reference:
            reference.write_logits(reference_states, columns, r, scratch.cast)
        if kind.policy or policy.softcap:  # last, so that dh can use the cast weights again
            policy.write_logits(states, columns, z, scratch.cast)
        own_labels = labels - columns.start
        gradient = tile_gradient(problem, (z, r), own_labels, upstream, scratch.gradient(*shape))
        gradients.add(columns, gradient, scratch.cast)
    gradients.end_pass()
