"""The slope of each token's log p(y) in the loss: what autograd would give, written out.

The fused head makes the gradients of whole pairs in forward, before autograd runs. With d_i the
``pair_difference`` of pair i, token t of its chosen response has the slope dL/dd_i, and token t of
its rejected response - dL/dd_i (both over the sequence's kept tokens, for means). The slope of the
token's KL is ``kl_ratios`` times that.
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
    """How flat tokens ``[N]`` are sequences: B chosen ones, then B rejected ones."""

    cu_seqlens: Tensor | None
    """Their boundaries ``[2B + 1]``; None: all have the same length."""
    sequences: int
    """2B."""

    @property
    def pairs(self) -> int:
        return self.sequences // 2

    def sequence_of_tokens(self, labels: Tensor) -> Tensor:
        """``[N]``, numbers from 0."""
        return sequence_of_tokens(labels, self.cu_seqlens, self.sequences)

    def shaped(self, values: Tensor) -> Tensor:
        """Flat values as the functions of sequences take them: ``[2B, T]``, or packed."""
        return values.view((self.sequences, -1) if self.cu_seqlens is None else (-1,))


def kl_ratio_of_tokens(
    sequence: Tensor, pairs: int, alpha: float, variant: Variant, dtype: torch.dtype
) -> Tensor:
    """The slope of each token's KL over that of its log p(y), ``[N]``."""
    chosen, rejected = kl_ratios(alpha, variant)
    ratio = torch.full_like(sequence, chosen, dtype=dtype)
    return ratio.masked_fill(sequence >= pairs, rejected)


def gradient_unit(slope: float) -> float:
    """The power of 2 next to a slope. Gradients that are made in forward are multiples of it: their
    numbers are then near 1, inside float16's range, and the factor costs no rounding."""
    return float(2.0 ** round(math.log2(slope)))


class TokenSlopes:
    """The slope of each token's log p(y), in multiples of ``unit``, from the statistics so far."""

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

    def of(self, stats: TokenStats) -> Tensor:
        """``[N]``. Those of pairs whose statistics are not complete mean nothing yet."""
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
        of_sequences = torch.cat((slopes, -slopes))
        if terms.kept is not None:
            of_sequences = of_sequences / terms.kept
        return of_sequences[self.sequence]
