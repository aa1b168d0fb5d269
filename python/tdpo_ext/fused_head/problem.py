"""The inputs of the fused head, plans for their tiles, and the gradient of a tile."""

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
"""Enough for whole pairs (4 units) at 8 x 1024 tokens, H = 4096, V = 128256: docs/fused-head.md."""
CHUNKS_OF_A_CARD = 32


def default_chunk_bytes(device: torch.device) -> int:
    """256 MiB; on CUDA a 32nd of the card's memory, between 256 MiB and 2 GiB."""
    if device.type != "cuda":
        return DEFAULT_CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(DEFAULT_CHUNK_BYTES, min(MOST_CHUNK_BYTES_ON_CUDA, memory // CHUNKS_OF_A_CARD))


# What torch.compiler.assume_constant_result does, without its import of torch's compiler, which
# takes longer than all of tdpo_ext.
default_chunk_bytes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_captured(tensor: Tensor) -> bool:
    """Whether work on a tensor is being captured in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Problem(NamedTuple):
    """The inputs of the fused head, which have been checked."""

    policy: Head
    reference: Head
    labels: Tensor
    """``[N]`` int64, global ids."""
    ignore_index: int
    chunk_bytes: int
    shard: Shard | None = None
    """The part of the vocabulary that the heads cover; None: all of it."""

    @property
    def own_labels(self) -> Tensor:
        """Labels counted from the first vocabulary entry of the heads."""
        return self.labels if self.shard is None else self.labels - self.shard.start

    @property
    def heads(self) -> tuple[Head, Head]:
        return self.policy, self.reference

    @property
    def kept(self) -> Tensor:
        """Which tokens are not ignored, ``[N]`` bool."""
        return self.labels != self.ignore_index

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is being captured, so that the host cannot read labels."""
        return is_captured(self.labels)

    def kept_rows(self) -> Rows:
        """The rows that are not ignored; in a CUDA graph all, as the host cannot tell."""
        if self.captured:
            return slice(0, self.labels.numel())
        return rows_of_groups((~self.kept).long(), 1)[0]

    def plan(self, rows: Rows, tiles: int, *, whole_rows: bool, gradients: bool = False) -> Plan:
        """Tile sizes if ``tiles`` tiles are in memory at once.

        Each tile spans the whole vocabulary (``whole_rows``) or a range of it.
        """
        cost = costs(self.heads, tiles, not isinstance(rows, slice), gradients)
        count = row_count(rows)
        # The fallback gathers logits chunk by chunk from all processes, so every process must use
        # the same chunk size. It is computed from the widest shard.
        vocabulary = self.policy.vocabulary if self.shard is None else self.shard.widest
        if whole_rows:
            return plan_whole_rows(cost, count, vocabulary, self.chunk_bytes)
        on_cpu = self.labels.device.type == "cpu"
        most = MOST_COLUMNS_ON_CPU if on_cpu else MOST_COLUMNS_ON_CUDA
        return plan_tiles(cost, count, vocabulary, self.chunk_bytes, most)

    def plan_with_gradients(self, rows: Rows, *, all_at_once: bool) -> Plan:
        """Tile sizes for whole rows whose gradients are made in forward.

        ``all_at_once``: the gradients of all rows must be in memory at once.
        """
        if not self.policy.rounds_gradient:
            return self.plan(rows, tiles=2, whole_rows=True, gradients=True)
        cost = costs(self.heads, 2, gathers=not isinstance(rows, slice), gradients=True)
        vocabulary = self.policy.vocabulary
        return plan_groups(cost, row_count(rows), vocabulary, self.chunk_bytes, all_at_once)


def empty_outputs(problem: Problem) -> kernels.Outputs:
    """Outputs of zeros, the results of ignored rows."""
    like = problem.policy.hidden
    outputs = kernels.empty_outputs(like, problem.labels.shape)
    for output in outputs:
        output.zero_()
    return outputs


def put(outputs: kernels.Outputs, rows: Rows, values: kernels.Outputs) -> None:
    """Write the values of some rows to ``outputs``."""
    for output, value in zip(outputs, values, strict=True):
        output[rows] = value


def whole_logits(
    problem: Problem, states: Tensor, reference_states: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Policy and reference logits of whole rows, from their hidden states."""
    columns = range(problem.policy.vocabulary)
    z, r = (scratch.tile(number, states.shape[0], len(columns)) for number in (0, 1))
    problem.policy.write_logits(states, columns, z, scratch.cast)
    problem.reference.write_logits(reference_states, columns, r, scratch.cast)
    return z, r


class Upstream(NamedTuple):
    """The upstream gradients of each token, with what forward has saved for it."""

    normalizers: Tensor
    """``[N, 8]``, saved by forward."""
    grad_logps: Tensor
    """``[N]``, the upstream gradient of log p(y)."""
    grad_kl: Tensor
    """``[N]``, the upstream gradient of the KL."""

    def of_rows(self, rows: Rows) -> Upstream:
        return Upstream(*(x[rows] for x in self))

    def times(self, factor: float | Tensor) -> Upstream:
        """Both upstream gradients multiplied by a factor."""
        if not isinstance(factor, Tensor) and factor == 1:
            return self
        return Upstream(self.normalizers, self.grad_logps * factor, self.grad_kl * factor)


def tile_gradient(
    problem: Problem,
    tiles: tuple[Tensor, Tensor],
    labels: Tensor,
    upstream: Upstream,
    beside: Tensor | None,
) -> Tensor:
    """The gradient of the policy's h W^T + b, from tiles of policy and reference logits.

    If the gradient needs only one of them, ``tiles`` is that tile twice. The result is written to
    ``beside``, or over the policy's tile if ``beside`` is None. With a softcap the gradient is
    computed in the reference's tile, since the softcap's derivative needs the policy's logits
    afterwards, and is copied to ``beside`` if that is given.
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
