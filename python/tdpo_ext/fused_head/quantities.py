"""What is computed of each token: the calls of the core, or of plain PyTorch, for it.

The products are the same for ``Statistics`` and for ``Divergences``. These differ in the width of a
token's record, in the number of outputs, the last of which are the normalizers that backward needs,
and in the upstream gradients that backward gets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.distributed import Shard
from tdpo_ext.fused_head.problem import Upstream
from tdpo_ext.token_statistics import divergence_kernels, fallback, kernels

Outputs = tuple[Tensor, ...]


class Statistics(NamedTuple):
    """Log-probabilities and the forward KL, as ``token_stats`` has them."""

    def empty_outputs(self, like: Tensor, shape: torch.Size) -> Outputs:
        return kernels.empty_outputs(like, shape)

    def empty_records(self, rows: int, like: Tensor) -> Tensor:
        return kernels.empty_records(rows, like)

    def of_whole_rows(
        self, z: Tensor, r: Tensor, labels: Tensor, ignore_index: int, shard: Shard | None
    ) -> Outputs:
        """From whole logits; with a shard from this process's part of them."""
        if shard is None:
            return kernels.token_stats(z, r, labels, ignore_index)
        return kernels.token_stats_of_shard(z, r, labels, ignore_index, *shard)

    def finish(
        self, records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int
    ) -> Outputs:
        """From records of the whole vocabulary, ``[rows, ...]``."""
        return kernels.finish(records[None], labels, vocabulary, ignore_index)

    def finish_of_shards(
        self, records: Tensor, labels: Tensor, ignore_index: int, width: int, shard: Shard
    ) -> Outputs:
        """From this process's records and those of the others."""
        return kernels.finish_of_shards(records, labels, ignore_index, width, shard)


STATISTICS = Statistics()


class Divergences(NamedTuple):
    """These, the reverse KL and the entropies, as ``token_divergences`` has them."""

    unlabelled: bool
    """Labels outside the vocabulary stand for none."""

    def empty_outputs(self, like: Tensor, shape: torch.Size) -> Outputs:
        return divergence_kernels.empty_outputs(like, shape)

    def empty_records(self, rows: int, like: Tensor) -> Tensor:
        return kernels.empty_records(rows, like, divergences=True)

    def of_whole_rows(
        self, z: Tensor, r: Tensor, labels: Tensor, ignore_index: int, shard: Shard | None
    ) -> Outputs:
        arguments = z, r, labels, ignore_index, self.unlabelled
        if shard is None:
            return divergence_kernels.forward(*arguments)
        return divergence_kernels.forward_of_shard(*arguments, *shard)

    def finish(
        self, records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int
    ) -> Outputs:
        arguments = labels, vocabulary, ignore_index, self.unlabelled
        return divergence_kernels.finish(records[None], *arguments)

    def finish_of_shards(
        self, records: Tensor, labels: Tensor, ignore_index: int, width: int, shard: Shard
    ) -> Outputs:
        arguments = records, labels, ignore_index, self.unlabelled, width, shard
        return divergence_kernels.finish_of_shards(*arguments)


Quantities = Statistics | Divergences


class DivergenceUpstream(NamedTuple):
    """``Upstream`` with divergences, whose names have the same meaning."""

    normalizers: Tensor
    """``[N, 12]``, saved by forward."""
    grad_logps: Tensor
    grad_kl: Tensor
    grad_reverse_kl: Tensor
    """``[N]``, the upstream gradient of the reverse KL."""
    grad_entropy: Tensor
    """``[N]``, the upstream gradient of the policy's entropy."""

    @property
    def is_zero(self) -> Tensor:
        return (self.grad_logps == 0) & (self.grad_kl == 0) & self._of_statistics_alone

    @property
    def policy_alone(self) -> Tensor:
        return (self.grad_kl == 0) & (self.grad_reverse_kl == 0)

    @property
    def reference_alone(self) -> Tensor:
        return (self.grad_kl == self.grad_logps) & self._of_statistics_alone

    @property
    def _of_statistics_alone(self) -> Tensor:
        return (self.grad_reverse_kl == 0) & (self.grad_entropy == 0)

    def of_statistics(self) -> Upstream:
        """Without the divergences, whose upstream gradients are 0."""
        normalizers = self.normalizers[:, : fallback.NORMALIZERS].contiguous()
        return Upstream(normalizers, self.grad_logps, self.grad_kl)

    def size_of_gradient(self) -> Tensor:
        """As p log p >= -1/e, |p (log p - log q - KL(p || q))| <= KL(p || q) + 1/e and
        |p (log p + H)| <= H + 1/e. A term whose bound is not finite counts as 0: either it has no
        finite gradient, or an upstream gradient of 0.
        """
        _, policy_scale, *_, reverse_kl, entropy_offset, _, _ = self.normalizers.unbind(1)
        entropy = entropy_offset - policy_scale.log()
        size = self.grad_logps.abs() + self.grad_kl.abs()
        for gradient, value in ((self.grad_reverse_kl, reverse_kl), (self.grad_entropy, entropy)):
            size = size + (gradient.abs() * (value + math.exp(-1))).nan_to_num(0, posinf=0)
        return size

    @property
    def may_be_rounded(self) -> bool:
        return False

    def write_gradient(self, gradient: Tensor, z: Tensor, r: Tensor, labels: Tensor) -> None:
        divergence_kernels.write_gradient(gradient, z, r, labels, *self)


AnyUpstream = Upstream | DivergenceUpstream
