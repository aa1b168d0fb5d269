"""The derivative of the loss with respect to each token's log p(y) and KL, written out.

The fused head makes the gradients of whole pairs in forward, before autograd runs. Let L be the
loss and d_i the ``pair_difference`` of pair i. The derivative of L with respect to a token's log
p(y), here called its slope, is dL/dd_i in the chosen response and -dL/dd_i in the rejected one. For
means over tokens it is divided by the sequence's number of kept tokens. The derivative with respect
to the token's KL is the slope times its ``kl_ratios``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tdpo_ext.checks import Variant
from tdpo_ext.loss import LossOptions, kl_ratios
from tdpo_ext.sequences import sequence_of_tokens


class Batch(NamedTuple):
    """The sequences that flat tokens ``[N]`` form: B chosen ones, then B rejected ones."""

    cu_seqlens: Tensor | None
    """The boundaries of the sequences, ``[2B + 1]``; None: all have the same length."""
    sequences: int
    """The number of sequences, 2B."""

    @property
    def pairs(self) -> int:
        return self.sequences // 2

    def sequence_of_tokens(self, labels: Tensor) -> Tensor:
        """The number of each token's sequence, from 0: ``[N]``."""
        return sequence_of_tokens(labels, self.cu_seqlens, self.sequences)

    def shaped(self, values: Tensor) -> Tensor:
        """Flat values in the shape that functions of sequences take: ``[2B, T]``, or packed."""
        return values.view((self.sequences, -1) if self.cu_seqlens is None else (-1,))


def kl_ratio_of_tokens(
    sequence: Tensor, pairs: int, alpha: float, variant: Variant, dtype: torch.dtype
) -> Tensor:
    """``kl_ratios`` for each token, ``[N]``."""
    chosen, rejected = kl_ratios(alpha, variant)
    ratio = torch.full_like(sequence, chosen, dtype=dtype)
    return ratio.masked_fill(sequence >= pairs, rejected)


def gradient_unit(slope: float) -> float:
    """The power of 2 that is nearest to a slope.

    Gradients made in forward are stored in multiples of it. Their numbers are then near 1, inside
    float16's range, and a power of 2 as factor causes no rounding error.
    """
    return float(2.0 ** round(math.log2(slope)))


class TokenSlopes:
    """The slope of each token's log p(y), in multiples of ``unit``."""

    def __init__(self, batch: Batch, options: LossOptions, labels: Tensor) -> None:
        self.sequence = batch.sequence_of_tokens(labels)
        weight = 1 / batch.pairs if options.reduction == "mean" else 1.0
        self.unit = gradient_unit(options.beta * weight)

    def of_tokens(self, slopes: Tensor) -> Tensor:
        """The slope of each token, ``[N]``, from those of the sequences, ``[2B]``."""
        return (slopes / self.unit)[self.sequence]
