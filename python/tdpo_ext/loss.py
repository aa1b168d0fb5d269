"""From token statistics to the loss, in plain PyTorch.

``sequence_terms`` sums the tokens' statistics to each sequence's margin and sequential KL,
``pair_loss`` makes the loss of each pair from them (equations: ``reference.py``), and
``loss_from_stats`` makes the ``TDPOOutput`` of the batch.

The fused head computes gradients before autograd runs. For it the derivative of the pair loss is
written out here too: ``pair_slopes`` and ``kl_ratios``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Reduction, Variant
from tdpo_ext.outputs import TDPOOutput, TokenStats
from tdpo_ext.sequences import kept_counts, sequence_sums


class LossOptions(NamedTuple):
    """The options of the loss, as ``tdpo_ext.tdpo_loss`` documents them."""

    beta: float
    alpha: float
    variant: Variant
    label_smoothing: float
    average_log_prob: bool
    reduction: Reduction

    def checked(self) -> LossOptions:
        """Return these options, or raise TypeError or ValueError for one outside its range."""
        checks.check_pair_options(self.beta, self.alpha, self.variant, self.label_smoothing)
        checks.check_reduction(self.reduction)
        return self


def pair_loss(
    logps_margin: Tensor,
    seq_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: Variant = "tdpo2",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair, from the margin and the sequential KL of its two responses.

    With dm = margin(chosen) - margin(rejected) (Zeng et al., 2024, arXiv 2404.11999):

        TDPO1:  h = beta (dm - (SeqKL(rejected) - SeqKL(chosen)))
        TDPO2:  h = beta (dm - alpha (SeqKL(rejected) - stop_grad(SeqKL(chosen))))
        loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h)

    where e is ``label_smoothing``.

    Args:
        logps_margin: ``[2B]``, any floating dtype, nats. The sum over a response's tokens of
            log pi(y) - log pi_ref(y), first for the B chosen responses, then for the B rejected
            ones in the same order.
        seq_kl: ``[2B]``, any floating dtype, nats. The sequential KL(pi_ref || pi) of the same
            responses.
        beta: Strength of the KL constraint, positive.
        alpha: Weight of the sequential KL in TDPO2, at least 0; 0 is DPO. TDPO1 ignores it.
        variant: "tdpo2" or "tdpo1".
        label_smoothing: Probability, in [0, 0.5), that the recorded preference is the reverse of
            the true one.

    Returns:
        The losses, ``[B]``, differentiable in both tensors. Their dtype is the one that PyTorch
        promotes the two tensors to; DPO (alpha = 0 in TDPO2) does not read seq_kl, and has that of
        logps_margin.

    Raises:
        TypeError: A tensor argument is not a floating tensor, or an option is not a number.
        ValueError: A shape is not ``[2B]``, or an option is outside its range.
    """
    checks.check_pair_sums(logps_margin, seq_kl)
    checks.check_pair_options(beta, alpha, variant, label_smoothing)
    return _losses(pair_difference(logps_margin, seq_kl, alpha, variant), beta, label_smoothing)


def _losses(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The loss ``[B]`` of each pair from its ``pair_difference``."""
    logit = beta * difference
    losses = -F.logsigmoid(logit)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logit)
    return losses


def pair_difference(logps_margin: Tensor, seq_kl: Tensor, alpha: float, variant: Variant) -> Tensor:
    """h / beta of ``pair_loss``, ``[B]``: the difference of margins less that of sequential KLs."""
    chosen_margin, rejected_margin = logps_margin.chunk(2)
    chosen_kl, rejected_kl = seq_kl.chunk(2)
    difference = chosen_margin - rejected_margin
    if variant == "tdpo1":
        return difference - (rejected_kl - chosen_kl)
    if alpha == 0:
        # DPO. The KLs are left out since one may be infinite, and 0 * inf is NaN.
        return difference
    return difference - alpha * (rejected_kl - chosen_kl.detach())


def pair_slopes(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The derivative of each pair's loss with respect to its ``pair_difference``, ``[B]``."""
    logit = beta * difference
    slopes = -(1 - label_smoothing) * torch.sigmoid(-logit)
    return beta * (slopes + label_smoothing * torch.sigmoid(logit))


def kl_ratios(alpha: float, variant: Variant) -> tuple[float, float]:
    """The derivative of the loss by a token's KL, divided by that by its log p(y).

    Returns the ratio for tokens of chosen responses, and for tokens of rejected ones.
    """
    return (1.0, 1.0) if variant == "tdpo1" else (0.0, float(alpha))


class SequenceTerms(NamedTuple):
    """Sums (or means) over the kept tokens of each sequence, ``[2B]``, in nats."""

    logps: Tensor
    margin: Tensor
    kl: Tensor
    kept: Tensor | None
    """The number of kept tokens if the terms are means, else None."""


def sequence_terms(
    stats: TokenStats,
    aligned: Tensor,
    *,
    cu_seqlens: Tensor | None,
    average_log_prob: bool,
    ignore_index: int,
) -> SequenceTerms:
    """Sums or means along each sequence.

    ``stats`` and ``aligned``, the labels aligned with them, are ``[2B, T]`` or packed.
    """
    logps = sequence_sums(stats.policy_logps, cu_seqlens)
    margin = sequence_sums(stats.policy_logps - stats.reference_logps, cu_seqlens)
    kl = sequence_sums(stats.forward_kl, cu_seqlens)
    if not average_log_prob:
        return SequenceTerms(logps, margin, kl, None)
    kept = kept_counts(aligned, cu_seqlens, ignore_index)
    return SequenceTerms(logps / kept, margin / kept, kl / kept, kept)


def loss_from_stats(
    stats: TokenStats,
    aligned: Tensor,
    options: LossOptions,
    *,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> TDPOOutput:
    """The loss and the quantities to log, from the statistics of tokens."""
    logps, margin, seq_kl, _ = sequence_terms(
        stats,
        aligned,
        cu_seqlens=cu_seqlens,
        average_log_prob=options.average_log_prob,
        ignore_index=ignore_index,
    )
    difference = pair_difference(margin, seq_kl, options.alpha, options.variant)
    losses = _losses(difference, options.beta, options.label_smoothing)
    chosen_rewards, rejected_rewards = (options.beta * (margin + seq_kl)).detach().chunk(2)
    chosen_dpo_rewards, rejected_dpo_rewards = (options.beta * margin).detach().chunk(2)
    chosen_logps, rejected_logps = logps.detach().chunk(2)
    chosen_kl, rejected_kl = seq_kl.detach().chunk(2)
    return TDPOOutput(
        loss=_reduced(losses, options.reduction),
        losses=losses.detach(),
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
        chosen_dpo_rewards=chosen_dpo_rewards,
        rejected_dpo_rewards=rejected_dpo_rewards,
    )


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
