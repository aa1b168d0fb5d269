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
from tdpo_ext.loss import LossOptions, kl_ratios, pair_difference, pair_slopes, sequence_terms
from tdpo_ext.outputs import TokenStats
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
    """The slope of each token's log p(y), in multiples of ``unit``, from the tokens' statistics."""

    def __init__(
        self,
        batch: Batch,
        options: LossOptions,
        labels: Tensor,
        ignore_index: int,
    ) -> None:
        self.batch = batch
        self.options = options
        self.labels = labels
        self.ignore_index = ignore_index
        self.sequence = batch.sequence_of_tokens(labels)
        self.weight = 1 / batch.pairs if options.reduction == "mean" else 1.0
        self.unit = gradient_unit(options.beta * self.weight)

    def from_stats(self, stats: TokenStats) -> Tensor:
        """The slopes, ``[N]``. Those of pairs whose statistics are incomplete must not be used."""
        options = self.options
        terms = sequence_terms(
            TokenStats(*map(self.batch.shaped, stats)),
            self.batch.shaped(self.labels),
            cu_seqlens=self.batch.cu_seqlens,
            average_log_prob=options.average_log_prob,
            ignore_index=self.ignore_index,
        )
        difference = pair_difference(terms.margin, terms.kl, options.alpha, options.variant)
        slopes = pair_slopes(difference, options.beta, options.label_smoothing)
        slopes = self.weight / self.unit * slopes
        slopes = torch.cat((slopes, -slopes))  # from pairs to sequences
        if terms.kept is not None:
            slopes = slopes / terms.kept
        return slopes[self.sequence]
