"""The inputs of the fused head, plans for their tiles, and the gradient of a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

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

if TYPE_CHECKING:
    from tdpo_ext.fused_head.quantities import AnyUpstream

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


Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def zeros(outputs: Tensors) -> Tensors:
    """Outputs filled with zeros, the results of ignored rows."""
    for output in outputs:
        output.zero_()
    return outputs


def put(outputs: tuple[Tensor, ...], rows: Rows, values: tuple[Tensor, ...]) -> None:
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
    """``[N]``, the upstream gradient of the forward KL."""

    @property
    def is_zero(self) -> Tensor:
        """The rows whose gradient is 0, ``[N]`` bool."""
        return (self.grad_logps == 0) & (self.grad_kl == 0)

    @property
    def policy_alone(self) -> Tensor:
        """The rows whose gradient does not depend on the reference's logits."""
        return self.grad_kl == 0

    @property
    def reference_alone(self) -> Tensor:
        """The rows whose gradient does not depend on the policy's logits, but for its label's."""
        return self.grad_kl == self.grad_logps

    def of_statistics(self) -> Upstream:
        return self

    def size_of_gradient(self) -> Tensor:
        """A bound of the gradient of each row's logits, ``[N]``."""
        return self.grad_logps.abs() + self.grad_kl.abs()

    @property
    def may_be_rounded(self) -> bool:
        """Whether ``write_gradient`` takes a gradient of a narrower type than the logits'."""
        return True

    def write_gradient(self, gradient: Tensor, z: Tensor, r: Tensor, labels: Tensor) -> None:
        """Write the gradient of the policy's logits (``kernels.write_gradient``)."""
        kernels.write_gradient(gradient, z, r, labels, *self)


def of_rows(upstream: AnyUpstream, rows: Rows) -> AnyUpstream:
    return type(upstream)(*(x[rows] for x in upstream))


def times(upstream: AnyUpstream, factor: float | Tensor) -> AnyUpstream:
    """The upstream gradients multiplied by a factor."""
    if not isinstance(factor, Tensor) and factor == 1:
        return upstream
    normalizers, *gradients = upstream
    return type(upstream)(normalizers, *(x * factor for x in gradients))


def with_zeros(upstream: AnyUpstream, rows: Tensor) -> AnyUpstream:
    """With upstream gradients 0 for some rows, ``[N]`` bool."""
    normalizers, *gradients = upstream
    return type(upstream)(normalizers, *(x.masked_fill(rows, 0) for x in gradients))


def tile_gradient(
    problem: Problem,
    tiles: tuple[Tensor, Tensor],
    labels: Tensor,
    upstream: AnyUpstream,
    beside: Tensor | None,
) -> Tensor:
    """The gradient of the policy's h W^T + b, from tiles of policy and reference logits.

    If the gradient needs only one of them, ``tiles`` is that tile twice. The result is written to
    ``beside``, or over the policy's tile if ``beside`` is None. With a softcap the gradient is
    computed in the reference's tile, since the softcap's derivative needs the policy's logits
    afterwards, and is copied to ``beside`` if that is given. It is copied with divergences as well,
    whose kernels store gradients of the logits' type alone.
    """
    z, r = tiles
    policy = problem.policy
    gradient = r if policy.softcap else z
    if beside is not None and upstream.may_be_rounded and not policy.softcap:
        gradient = beside
    times(upstream, policy.scale).write_gradient(gradient, z, r, labels)
    if policy.softcap:
        policy.chain_softcap(gradient, z)
    return gradient if beside is None or gradient is beside else beside.copy_(gradient)
