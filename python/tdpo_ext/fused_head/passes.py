"""Token statistics and their gradients from hidden states: [N, V] logits never exist.

One GEMM unit is 2 N V H operations, of the N tokens that are kept. Forward makes a tile of policy
logits and one of reference logits, adds both to the records of their rows, and forgets them: 2
units. The gradient of the policy's logits, dz, gives two more products, dh = dz W and dW = dz^T h.
Three ways to them:

    recompute   tiles are made anew in backward, those that a row's upstream gradients need:
                TDPO1 2 + 1 + 2 = 5 units, TDPO2 2 + 1.5 + 2 = 5.5, any gradients 2 + 2 + 2 = 6
    direction   frozen head: dh up to the pair's scalar, in forward, from whole rows: 2 + 1 = 3
    whole pairs dz of all tokens of a pair exists at once, or what it is up to the pair's scalar,
                and the scalar is known before the products: 2 + 2 = 4

On CUDA half-width operands stay as they are. dz is rounded to their type as the kernel stores it,
beside the float32 logits, which whole rows have only in groups.

See docs/fused-head.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.distributed import Shard, sum_gradient
from tdpo_ext.fused_head.head import Head, HeadGradients, Rows, Wanted
from tdpo_ext.fused_head.tiles import (
    MOST_COLUMNS_ON_CPU,
    MOST_COLUMNS_ON_CUDA,
    Plan,
    Scratch,
    column_ranges,
    costs,
    plan_groups,
    plan_tiles,
    plan_whole_rows,
    row_chunks,
    row_count,
    rows_of_groups,
)
from tdpo_ext.token_statistics import kernels

DEFAULT_CHUNK_BYTES = 256 * 2**20
MOST_CHUNK_BYTES_ON_CUDA = 2 * 2**30
"""With this the fewest units at (8 x 1024 tokens, H = 4096, V = 128256): docs/fused-head.md."""
CHUNKS_OF_A_CARD = 32


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def default_chunk_bytes(device: torch.device) -> int:
    """On CUDA up to 2 GiB, but no more than a part of the card's memory."""
    if device.type != "cuda":
        return DEFAULT_CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(DEFAULT_CHUNK_BYTES, min(MOST_CHUNK_BYTES_ON_CUDA, memory // CHUNKS_OF_A_CARD))


def captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Problem(NamedTuple):
    """Of checked arguments."""

    policy: Head
    reference: Head
    labels: Tensor
    """[N] int64"""
    ignore_index: int
    chunk_bytes: int
    shard: Shard | None = None
    """If the heads are those of a part of the vocabulary; the labels are global ids."""

    @property
    def own_labels(self) -> Tensor:
        """Counted from the heads' first entry."""
        return self.labels if self.shard is None else self.labels - self.shard.start

    @property
    def heads(self) -> tuple[Head, Head]:
        return self.policy, self.reference

    @property
    def kept(self) -> Tensor:
        return self.labels != self.ignore_index

    @property
    def captured(self) -> bool:
        """In a CUDA graph the host cannot learn which rows are kept: all are then."""
        return captured(self.labels)

    def kept_rows(self) -> Rows:
        if self.captured:
            return slice(0, self.labels.numel())
        return rows_of_groups((~self.kept).long(), 1)[0]

    def plan(self, rows: Rows, tiles: int, *, whole_rows: bool, gradients: bool = False) -> Plan:
        cost = costs(self.heads, tiles, not isinstance(rows, slice), gradients)
        count = row_count(rows)
        # In plain PyTorch each chunk of rows is gathered, so all processes must make the same.
        vocabulary = self.policy.vocabulary if self.shard is None else self.shard.widest
        if whole_rows:
            return plan_whole_rows(cost, count, vocabulary, self.chunk_bytes)
        on_cpu = self.labels.device.type == "cpu"
        most = MOST_COLUMNS_ON_CPU if on_cpu else MOST_COLUMNS_ON_CUDA
        return plan_tiles(cost, count, vocabulary, self.chunk_bytes, most)

    def plan_with_gradients(self, rows: Rows, *, all_at_once: bool) -> Plan:
        """Of whole rows whose gradients are made in forward."""
        if not self.policy.rounds_gradient:
            return self.plan(rows, tiles=2, whole_rows=True, gradients=True)
        cost = costs(self.heads, 2, gathers=not isinstance(rows, slice), gradients=True)
        vocabulary = self.policy.vocabulary
        return plan_groups(cost, row_count(rows), vocabulary, self.chunk_bytes, all_at_once)


def empty_outputs(problem: Problem) -> kernels.Outputs:
    """Zeros: what rows that are left out have."""
    like = problem.policy.hidden
    outputs = kernels.empty_outputs(like, problem.labels.shape)
    for output in outputs:
        output.zero_()
    return outputs


def put(outputs: kernels.Outputs, rows: Rows, values: kernels.Outputs) -> None:
    for output, value in zip(outputs, values, strict=True):
        output[rows] = value


# --- forward: 2 units -----------------------------------------------------------------------------


def forward(problem: Problem) -> kernels.Outputs:
    rows, outputs = problem.kept_rows(), empty_outputs(problem)
    tiled = kernels.serves(problem.labels.device)
    plan = problem.plan(rows, tiles=2, whole_rows=not tiled)
    scratch = Scratch(plan, problem.heads, tiles=2)
    if tiled and problem.shard is not None:
        return forward_of_shard(problem, problem.shard, row_chunks(rows, plan.rows), scratch)
    of_chunk = stats_by_tiles if tiled else stats_of_whole_rows
    for chunk in row_chunks(rows, plan.rows):
        put(outputs, chunk, of_chunk(problem, chunk, scratch))
    return outputs


def forward_of_shard(
    problem: Problem, shard: Shard, chunks: Iterable[Rows], scratch: Scratch
) -> kernels.Outputs:
    """The records of all rows are exchanged at once; of rows that are left out they are empty."""
    records = kernels.empty_records(problem.labels.numel(), problem.policy.hidden)
    for chunk in chunks:
        records[chunk] = records_by_tiles(problem, chunk, scratch)
    width = problem.policy.vocabulary
    return kernels.finish_of_shards(records, problem.labels, problem.ignore_index, width, shard)


def stats_by_tiles(problem: Problem, rows: Rows, scratch: Scratch) -> kernels.Outputs:
    records = records_by_tiles(problem, rows, scratch)
    vocabulary = problem.policy.vocabulary
    return kernels.finish(records[None], problem.labels[rows], vocabulary, problem.ignore_index)


def records_by_tiles(problem: Problem, rows: Rows, scratch: Scratch) -> Tensor:
    """Tile after tile of the vocabulary is added to the rows' records."""
    policy, reference = problem.heads
    states, reference_states = policy.states_of(rows), reference.states_of(rows)
    labels = problem.own_labels[rows]
    records = kernels.empty_records(labels.numel(), states)
    for columns in column_ranges(policy.vocabulary, scratch.plan.columns):
        z, r = (scratch.tile(number, labels.numel(), len(columns)) for number in (0, 1))
        policy.write_logits(states, columns, z, scratch.cast)
        reference.write_logits(reference_states, columns, r, scratch.cast)
        kernels.add_tile(records, z, r, labels - columns.start)
    return records


def whole_logits(
    problem: Problem, states: Tensor, reference_states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    columns = range(problem.policy.vocabulary)
    z, r = (scratch.tile(number, states.shape[0], len(columns)) for number in (0, 1))
    problem.policy.write_logits(states, columns, z, scratch.cast)
    problem.reference.write_logits(reference_states, columns, r, scratch.cast)
    return z, r


def stats_of_whole_rows(problem: Problem, rows: Rows, scratch: Scratch) -> kernels.Outputs:
    states = [head.states_of(rows) for head in problem.heads]
    arguments = *whole_logits(problem, states[0], states[1], scratch), problem.labels[rows]
    if problem.shard is None:
        return kernels.token_stats(*arguments, problem.ignore_index)
    return kernels.token_stats_of_shard(*arguments, problem.ignore_index, *problem.shard)


# --- gradients of tiles ---------------------------------------------------------------------------


class Upstream(NamedTuple):
    """Per token, ``[N]``, and what forward has saved, ``[N, 8]``."""

    normalizers: Tensor
    grad_logps: Tensor
    grad_kl: Tensor

    def of_rows(self, rows: Rows) -> Upstream:
        return Upstream(*(x[rows] for x in self))

    def times(self, factor: float) -> Upstream:
        if factor == 1:
            return self
        return Upstream(self.normalizers, self.grad_logps * factor, self.grad_kl * factor)


def tile_gradient(
    problem: Problem,
    tiles: tuple[Tensor, Tensor],
    labels: Tensor,
    upstream: Upstream,
    beside: Tensor | None,
) -> Tensor:
    """The gradient of h W^T + b, from logits ``tiles``; both are the same where one is enough.

    It goes to ``beside``, or over a tile. A softcap's slope needs the policy's logits, so then it
    lies over the reference's first.
    """
    z, r = tiles
    policy = problem.policy
    over = r if policy.softcap else z
    gradient = over if beside is None or policy.softcap else beside
    kernels.write_gradient(gradient, z, r, labels, *upstream.times(policy.scale))
    if policy.softcap:
        policy.chain_softcap(gradient, z)
        gradient = gradient if beside is None else beside.copy_(gradient)
    return gradient


# --- backward by recomputing: 3 to 4 units --------------------------------------------------------


class Kind(NamedTuple):
    """Which logits the gradient of a row's logits needs (docs/algebra.md)."""

    policy: bool
    reference: bool


KINDS = (Kind(True, True), Kind(True, False), Kind(False, True))


def rows_of_kinds(problem: Problem, upstream: Upstream) -> list[Rows]:
    """The rows of each of ``KINDS``; those with gradient 0 are left out."""
    if problem.captured:
        return [slice(0, problem.labels.numel()), slice(0, 0), slice(0, 0)]
    _, grad_logps, grad_kl = upstream
    kind = torch.zeros_like(problem.labels)
    if kernels.serves(kind.device):  # plain PyTorch needs both in any case
        kind.masked_fill_(grad_kl == 0, 1).masked_fill_(grad_kl == grad_logps, 2)
    nothing = (grad_kl == 0) & (grad_logps == 0)
    return rows_of_groups(kind.masked_fill_(nothing | ~problem.kept, len(KINDS)), len(KINDS))


def backward(problem: Problem, upstream: Upstream, wanted: Wanted) -> tuple[Tensor, ...]:
    """Gradients of the policy's hidden states, weight and bias for any upstream gradients."""
    if problem.captured:  # no row is left out: those that are ignored have gradient 0
        ignored = ~problem.kept
        grads = (grad.masked_fill(ignored, 0) for grad in upstream[1:])
        upstream = Upstream(upstream.normalizers, *grads)
    gradients = HeadGradients(problem.policy, wanted)
    for kind, rows in zip(KINDS, rows_of_kinds(problem, upstream), strict=True):
        if row_count(rows):
            backward_of_kind(problem, kind, rows, upstream, gradients)
    if problem.shard is not None and wanted.hidden:
        sum_gradient(gradients.hidden, problem.shard)
    return gradients.results()


def backward_of_kind(
    problem: Problem, kind: Kind, rows: Rows, upstream: Upstream, gradients: HeadGradients
) -> None:
    """With scratch memory of its own, which is free before the next kind takes some."""
    whole_rows = not kernels.serves(problem.labels.device)
    tiles = 2 if problem.policy.softcap else kind.policy + kind.reference
    plan = problem.plan(rows, tiles, whole_rows=whole_rows, gradients=True)
    scratch = Scratch(plan, problem.heads, tiles, gradients=True)
    for chunk in row_chunks(rows, plan.rows):
        recompute(problem, kind, chunk, upstream.of_rows(chunk), gradients, scratch)


def recompute(
    problem: Problem,
    kind: Kind,
    rows: Rows,
    upstream: Upstream,
    gradients: HeadGradients,
    scratch: Scratch,
) -> None:
    """The logits of rows of one kind, as far as it needs them, and their gradients."""
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
        if kind.policy or policy.softcap:  # last: what is cast for it serves dh as well
            policy.write_logits(states, columns, z, scratch.cast)
        own_labels = labels - columns.start
        gradient = tile_gradient(problem, (z, r), own_labels, upstream, scratch.gradient(*shape))
        gradients.add(columns, gradient, scratch.cast)
    gradients.end_pass()


# --- gradients in forward: 1 or 2 units -----------------------------------------------------------


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
