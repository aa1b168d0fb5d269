"""The statistics, or divergences, from hidden states: 2 units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head.problem import Problem, put, whole_logits, zeros
from tdpo_ext.fused_head.tiles import Rows, Scratch, column_ranges, row_chunks
from tdpo_ext.token_statistics import kernels

if TYPE_CHECKING:
    from tdpo_ext.fused_head.quantities import Outputs, Quantities


def forward(problem: Problem, asked: Quantities) -> Outputs:
    """What is asked for, and the normalizers of backward; in plain PyTorch by whole rows."""
    rows = problem.kept_rows()
    outputs = zeros(asked.empty_outputs(problem.policy.hidden, problem.labels.shape))
    tiled = kernels.serves(problem.labels.device)
    plan = problem.plan(rows, tiles=2, whole_rows=not tiled)
    scratch = Scratch(plan, problem.heads, tiles=2)
    if tiled and problem.shard is not None:
        chunks = row_chunks(rows, plan.rows)
        return forward_of_shard(problem, asked, problem.shard, chunks, scratch)
    of_rows = by_tiles if tiled else of_whole_rows
    for chunk in row_chunks(rows, plan.rows):
        put(outputs, chunk, of_rows(problem, asked, chunk, scratch))
    return outputs


def forward_of_shard(
    problem: Problem, asked: Quantities, shard: Shard, chunks: Iterable[Rows], scratch: Scratch
) -> Outputs:
    """The same for a part of the vocabulary.

    The records of all rows are exchanged at once; those of ignored rows are empty.
    """
    records = asked.empty_records(problem.labels.numel(), problem.policy.hidden)
    for chunk in chunks:
        records[chunk] = records_by_tiles(problem, asked, chunk, scratch)
    width = problem.policy.vocabulary
    return asked.finish_of_shards(records, problem.labels, problem.ignore_index, width, shard)


def by_tiles(problem: Problem, asked: Quantities, rows: Rows, scratch: Scratch) -> Outputs:
    """The outputs of some rows, from the records of all tiles."""
    records = records_by_tiles(problem, asked, rows, scratch)
    vocabulary = problem.policy.vocabulary
    return asked.finish(records, problem.labels[rows], vocabulary, problem.ignore_index)


def records_by_tiles(problem: Problem, asked: Quantities, rows: Rows, scratch: Scratch) -> Tensor:
    """The records of some rows, to which one tile of the vocabulary after another is added."""
    policy, reference = problem.heads
    states, reference_states = policy.states_of(rows), reference.states_of(rows)
    labels = problem.own_labels[rows]
    records = asked.empty_records(labels.numel(), states)
    for columns in column_ranges(policy.vocabulary, scratch.plan.columns):
        z, r = (scratch.tile(number, labels.numel(), len(columns)) for number in (0, 1))
        policy.write_logits(states, columns, z, scratch.cast)
        reference.write_logits(reference_states, columns, r, scratch.cast)
        kernels.add_tile(records, z, r, labels - columns.start)
    return records


def of_whole_rows(problem: Problem, asked: Quantities, rows: Rows, scratch: Scratch) -> Outputs:
    """The outputs of some rows, from their whole logits."""
    states = [head.states_of(rows) for head in problem.heads]
    z, r = whole_logits(problem, states[0], states[1], scratch)
    return asked.of_whole_rows(z, r, problem.labels[rows], problem.ignore_index, problem.shard)
