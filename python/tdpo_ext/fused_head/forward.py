"""The statistics from hidden states: 2 units."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head.problem import Problem, empty_outputs, put, whole_logits
from tdpo_ext.fused_head.tiles import Rows, Scratch, column_ranges, row_chunks
from tdpo_ext.token_statistics import kernels


def forward(problem: Problem) -> kernels.Outputs:
    """The statistics, and the normalizers that backward needs; in plain PyTorch by whole rows."""
    rows, outputs = problem.kept_rows(), empty_outputs(problem)
    tiled = kernels.serves(problem.labels.device)
    plan = problem.plan(rows, tiles=2, whole_rows=not tiled)
    scratch = Scratch(plan, problem.heads, tiles=2)
    if tiled and problem.shard is not None:
        return forward_of_shard(problem, problem.shard, row_chunks(rows, plan.rows), scratch)
    stats = stats_by_tiles if tiled else stats_of_whole_rows
    for chunk in row_chunks(rows, plan.rows):
        put(outputs, chunk, stats(problem, chunk, scratch))
    return outputs


def forward_of_shard(
    problem: Problem, shard: Shard, chunks: Iterable[Rows], scratch: Scratch
) -> kernels.Outputs:
    """The same for a part of the vocabulary.

    The records of all rows are exchanged at once; those of ignored rows are empty.
    """
    records = kernels.empty_records(problem.labels.numel(), problem.policy.hidden)
    for chunk in chunks:
        records[chunk] = records_by_tiles(problem, chunk, scratch)
    width = problem.policy.vocabulary
    return kernels.finish_of_shards(records, problem.labels, problem.ignore_index, width, shard)


def stats_by_tiles(problem: Problem, rows: Rows, scratch: Scratch) -> kernels.Outputs:
    """The outputs of some rows, from the records of all tiles."""
    records = records_by_tiles(problem, rows, scratch)
    vocabulary = problem.policy.vocabulary
    return kernels.finish(records[None], problem.labels[rows], vocabulary, problem.ignore_index)


def records_by_tiles(problem: Problem, rows: Rows, scratch: Scratch) -> Tensor:
    """The records of some rows, to which one tile of the vocabulary after another is added."""
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


def stats_of_whole_rows(problem: Problem, rows: Rows, scratch: Scratch) -> kernels.Outputs:
    """The outputs of some rows, from their whole logits."""
    states = [head.states_of(rows) for head in problem.heads]
    arguments = *whole_logits(problem, states[0], states[1], scratch), problem.labels[rows]
    if problem.shard is None:
        return kernels.token_stats(*arguments, problem.ignore_index)
    return kernels.token_stats_of_shard(*arguments, problem.ignore_index, *problem.shard)
