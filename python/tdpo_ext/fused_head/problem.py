"""What all passes of the fused head share: the problem, its plans, and the gradient of a tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head.head import Head
from tdpo_ext.fused_head.tiles import (
    MOST_COLUMNS_ON_CPU,
    MOST_COLUMNS_ON_CUDA,
    Plan,
    Rows,
    Scratch,
    costs,
    plan_groups,
    plan_tiles,
    plan_whole_rows,
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


def whole_logits(
    problem: Problem, states: Tensor, reference_states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    columns = range(problem.policy.vocabulary)
    z, r = (scratch.tile(number, states.shape[0], len(columns)) for number in (0, 1))
    problem.policy.write_logits(states, columns, z, scratch.cast)
    problem.reference.write_logits(reference_states, columns, r, scratch.cast)
    return z, r


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
