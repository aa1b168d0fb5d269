r"""TDPO in plain PyTorch: the definition of the method, and the truth the kernels are held to.

Any device, any floating dtype, differentiable twice. It materialises several [..., V] tensors; the
functions of the same names in ``tdpo_ext`` do not.

Zeng et al., "Token-level Direct Preference Optimization", ICML 2024, arXiv 2404.11999. With state
s_t = [x, y_<t], policy pi and reference pi_ref:

    margin(x, y)  = sum_t log pi(y_t | s_t) - log pi_ref(y_t | s_t)
    SeqKL(x, y)   = sum_t KL(pi_ref(. | s_t) || pi(. | s_t))          forward KL, whole vocabulary
    TDPO1:  loss  = -log sigmoid(beta (dm - (SeqKL(y_l) - SeqKL(y_w))))
    TDPO2:  loss  = -log sigmoid(beta (dm - alpha (SeqKL(y_l) - stop_grad(SeqKL(y_w)))))

where dm = margin(x, y_w) - margin(x, y_l), y_w is the chosen and y_l the rejected response. TDPO2
with alpha = 0 is DPO.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import (
    Shard,
    gathered_logits,
    local_head,
    local_labels,
    local_logits,
    shard_of,
    with_summed_gradient,
)
from tdpo_ext.outputs import TDPOOutput, TokenStats
from tdpo_ext.sequences import align_labels, kept_counts, sequence_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_tdpo_loss", "linear_token_stats", "pair_loss", "tdpo_loss", "token_stats"]


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """As ``tdpo_ext.token_stats``, from softmaxes. ``inplace_backward=True`` raises ValueError; a
    sharded vocabulary is gathered, and then there is no second derivative."""
    policy_logits, reference_logits, labels, shard = local_logits(
        policy_logits, reference_logits, labels, process_group=process_group
    )
    check_token_stats(policy_logits, reference_logits, labels, ignore_index)
    if inplace_backward:
        raise ValueError(
            "inplace_backward=True is for tdpo_ext.token_stats: plain PyTorch keeps the logits for "
            "its backward; pass inplace_backward=False"
        )
    shard = shard or shard_of(process_group, policy_logits.shape[-1])
    return _token_stats(policy_logits, reference_logits, labels, ignore_index, shard)


def _token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    shard: Shard | None,
) -> TokenStats:
    """Of checked arguments."""
    if shard is not None:
        policy_logits, reference_logits = (
            gathered_logits(logits, shard) for logits in (policy_logits, reference_logits)
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_label_range(labels, policy_logits.shape[-1], ignore_index)
    return stats_of_rows(policy_logits, reference_logits, labels, ignore_index)


def check_token_stats(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> None:
    """Everything that can be known without looking at values."""
    checks.check_logits(policy_logits, reference_logits)
    checks.check_labels("labels", labels, policy_logits)
    checks.check_ignore_index(ignore_index)


def stats_of_rows(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> TokenStats:
    """The statistics of checked arguments; a label outside the vocabulary gives NaN."""
    ignored = labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= policy_logits.shape[-1]))
    # Replaced before anything is computed: NaN or inf in an ignored row changes nothing, not even
    # through a product of 0 with the row's gradient.
    blank = ignored.unsqueeze(-1)
    policy_log_probs = _log_softmax(policy_logits.masked_fill(blank, 0))
    reference_log_probs = _log_softmax(reference_logits.masked_fill(blank, 0))
    label = labels.masked_fill(ignored | outside, 0).to(torch.int64).unsqueeze(-1)

    def per_token(values: Tensor) -> Tensor:
        return values.masked_fill(outside, torch.nan).masked_fill(ignored, 0)

    return TokenStats(
        policy_logps=per_token(policy_log_probs.gather(-1, label).squeeze(-1)),
        reference_logps=per_token(reference_log_probs.gather(-1, label).squeeze(-1)),
        forward_kl=per_token(_forward_kl(policy_log_probs, reference_log_probs)),
    )


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least. torch's own adds maximum and log-sum before subtracting: less accurate.

    The maximum is a constant here: what it adds and what it subtracts have the same derivative.
    """
    if logits.dtype != torch.float64:
        logits = logits.to(torch.float32)
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def _forward_kl(policy_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi_ref || pi) = sum_v q (log q - log p), q = pi_ref(v), p = pi(v).

    Since p and q both sum to 1 it equals sum_v (p - q + q u) with u = log q - log p. Every term of
    that sum is at least 0 and none is large, so it neither turns negative nor loses its digits when
    the two distributions are close. For close values p - q = q expm1(-u), exact to the last digits.

    An infinite KL (p = 0 < q) has no gradient; what comes back for it is finite and means nothing.
    """
    u = reference_log_probs - policy_log_probs
    p, q = policy_log_probs.exp(), reference_log_probs.exp()
    # The argument of every branch is made harmless where the branch is not taken: a masked_fill
    # alone would still send 0 * inf = NaN into the gradient.
    close = u.abs() < 0.5
    small_u = u.masked_fill(~close, 0)
    impossible = reference_log_probs == -torch.inf  # q = 0, and 0 log 0 = 0
    excluded = (policy_log_probs == -torch.inf) & ~impossible  # p = 0 < q: the KL is infinite
    large_u = u.masked_fill(close | impossible | excluded, 0)
    terms = torch.where(close, q * (torch.expm1(-small_u) + small_u), p - q + q * large_u)
    return terms.masked_fill(excluded, torch.inf).sum(dim=-1)


def pair_loss(
    logps_margin: Tensor,
    seq_kl: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each pair from its sequence sums (the equations are at the top of this module).

    Args:
        logps_margin: ``[2B]`` floating, nats: sum_t log pi - log pi_ref of each response, the B
            chosen ones first, then the B rejected ones in the same order.
        seq_kl: ``[2B]``, nats: the sequential KL(pi_ref || pi) of the same responses.
        beta: strength of the KL constraint, positive.
        alpha: weight of the sequential KL in TDPO2, at least 0; 0 is DPO. TDPO1 ignores it.
        variant: "tdpo2" or "tdpo1".
        label_smoothing: probability, in [0, 0.5), that a preference is recorded the wrong way
            round: -(1 - e) log sigmoid(h) - e log sigmoid(-h).

    Returns:
        ``[B]``, differentiable in both tensors.

    Raises:
        TypeError: an argument is not a floating tensor, or an option is not a number.
        ValueError: a shape is not ``[2B]``, or an option is outside its range.
    """
    checks.check_pair_sums(logps_margin, seq_kl)
    checks.check_pair_options(beta, alpha, variant, label_smoothing)
    logit = beta * pair_difference(logps_margin, seq_kl, alpha, variant)
    losses = -F.logsigmoid(logit)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logit)
    return losses


def pair_difference(logps_margin: Tensor, seq_kl: Tensor, alpha: float, variant: str) -> Tensor:
    """What beta is multiplied with: the difference of the margins less that of the KLs, ``[B]``."""
    chosen_margin, rejected_margin = logps_margin.chunk(2)
    chosen_kl, rejected_kl = seq_kl.chunk(2)
    difference = chosen_margin - rejected_margin
    if variant == "tdpo1":
        return difference - (rejected_kl - chosen_kl)
    if alpha == 0:
        # DPO, also where a KL is infinite and 0 * inf would be NaN.
        return difference
    return difference - alpha * (rejected_kl - chosen_kl.detach())


def pair_slopes(difference: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The derivative of each pair's loss by its ``pair_difference``."""
    logit = beta * difference
    slopes = -(1 - label_smoothing) * torch.sigmoid(-logit)
    return beta * (slopes + label_smoothing * torch.sigmoid(logit))


def kl_ratios(alpha: float, variant: str) -> tuple[float, float]:
    """The gradient of a token's KL over that of its margin, in chosen and in rejected responses."""
    return (1.0, 1.0) if variant == "tdpo1" else (0.0, float(alpha))


def tdpo_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TDPOOutput:
    """As ``tdpo_ext.tdpo_loss``, on top of this module's ``token_stats``."""
    checks.check_loss_options(beta, alpha, variant, label_smoothing, reduction)
    local_policy, local_reference, labels, shift_labels, _ = local_logits(
        policy_logits, reference_logits, labels, shift_labels, process_group=process_group
    )
    aligned = aligned_labels(
        local_policy, local_reference, labels, shift_labels, cu_seqlens, ignore_index
    )
    stats = token_stats(
        policy_logits,
        reference_logits,
        aligned,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        process_group=process_group,
    )
    return loss_from_stats(
        stats,
        aligned,
        cu_seqlens=cu_seqlens,
        beta=beta,
        alpha=alpha,
        variant=variant,
        label_smoothing=label_smoothing,
        average_log_prob=average_log_prob,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def linear_token_stats(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor,
    *,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reference_logit_scale: float | None = None,
    reference_logit_softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """As ``tdpo_ext.linear_token_stats``, from logits; ``chunk_bytes`` changes nothing."""
    labels = local_labels(labels, policy_weight)
    policy, reference, shard = checked_heads(
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
        chunk_bytes,
        process_group,
    )
    checks.check_labels("labels", labels, policy[0])
    checks.check_ignore_index(ignore_index)
    scale, softcap, reference_scale, reference_softcap = checks.logit_options(
        logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap
    )
    (hidden, weight, bias), (reference_hidden, reference_weight, reference_bias) = policy, reference
    if shard is not None:
        hidden = with_summed_gradient(hidden, shard)
    blank = (labels == ignore_index).unsqueeze(-1)  # not even a gradient comes from there
    return _token_stats(
        _logits(hidden.masked_fill(blank, 0), weight, bias, scale, softcap),
        _logits(
            reference_hidden.masked_fill(blank, 0),
            reference_weight,
            reference_bias,
            reference_scale,
            reference_softcap,
        ),
        labels,
        ignore_index,
        shard,
    )


Side = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight, bias."""


def checked_heads(
    policy: Side, reference: Side, chunk_bytes: int | None, process_group: ProcessGroup | None
) -> tuple[Side, Side, Shard | None]:
    """Of sharded heads this process's parts."""
    checks.check_chunk_bytes(chunk_bytes)
    policy, shard = local_head("policy", *policy, process_group)
    reference, of_reference = local_head("reference", *reference, process_group)
    if shard != of_reference:
        raise ValueError(
            "policy_weight and reference_weight must be DTensors of one vocabulary, sharded over "
            f"the same processes, or both plain tensors, got {shard} and {of_reference}"
        )
    checks.check_heads(policy, reference)
    return policy, reference, shard or shard_of(process_group, policy[1].shape[0])


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """softcap tanh(scale (h W^T + b) / softcap), in float32 at least."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias
    logits = scale * logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def linear_tdpo_loss(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reference_logit_scale: float | None = None,
    reference_logit_softcap: float | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> TDPOOutput:
    """As ``tdpo_ext.linear_tdpo_loss``, on top of this module's ``linear_token_stats``."""
    checks.check_loss_options(beta, alpha, variant, label_smoothing, reduction)
    labels, shift_labels = (local_labels(x, policy_weight) for x in (labels, shift_labels))
    heads = (
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
    )
    policy, _, _ = checked_heads(*heads, chunk_bytes, process_group)
    aligned = aligned_labels_of(
        "policy_hidden", policy[0], labels, shift_labels, cu_seqlens, ignore_index
    )
    stats = linear_token_stats(
        policy_hidden,
        policy_weight,
        reference_hidden,
        reference_weight,
        aligned,
        policy_bias=policy_bias,
        reference_bias=reference_bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        reference_logit_scale=reference_logit_scale,
        reference_logit_softcap=reference_logit_softcap,
        ignore_index=ignore_index,
        chunk_bytes=chunk_bytes,
        process_group=process_group,
    )
    return loss_from_stats(
        stats,
        aligned,
        cu_seqlens=cu_seqlens,
        beta=beta,
        alpha=alpha,
        variant=variant,
        label_smoothing=label_smoothing,
        average_log_prob=average_log_prob,
        reduction=reduction,
        ignore_index=ignore_index,
    )


def aligned_labels(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Check the batch's tensors against each other; labels aligned with the logits."""
    checks.check_logits(policy_logits, reference_logits)
    return aligned_labels_of(
        "policy_logits", policy_logits, labels, shift_labels, cu_seqlens, ignore_index
    )


def aligned_labels_of(
    name: str,
    batch: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Labels aligned with a batch of logits or of hidden states, ``[2B, T, ...]`` or packed."""
    checks.check_ignore_index(ignore_index)
    if cu_seqlens is None:
        checks.check_batch(name, batch)
    else:
        checks.check_packed_batch(name, batch, cu_seqlens)
    if labels is not None and shift_labels is None:
        checks.check_labels("labels", labels, batch)
        return align_labels(labels, cu_seqlens, ignore_index)
    if shift_labels is not None and labels is None:
        checks.check_labels("shift_labels", shift_labels, batch)
        return shift_labels
    raise checks.labels_error("neither" if labels is None else "both")


class SequenceTerms(NamedTuple):
    """Sums (or means) over the kept tokens of each sequence, ``[2B]``."""

    logps: Tensor
    margin: Tensor
    kl: Tensor
    kept: Tensor | None
    """How many, for means."""


def sequence_terms(
    stats: TokenStats,
    aligned: Tensor,
    cu_seqlens: Tensor | None,
    average_log_prob: bool,
    ignore_index: int,
) -> SequenceTerms:
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
    *,
    cu_seqlens: Tensor | None,
    beta: float,
    alpha: float,
    variant: str,
    label_smoothing: float,
    average_log_prob: bool,
    reduction: str,
    ignore_index: int,
) -> TDPOOutput:
    """Token statistics -> sequence sums -> pairs -> loss; the labels mask KL and margin alike."""
    logps, margin, seq_kl, _ = sequence_terms(
        stats, aligned, cu_seqlens, average_log_prob, ignore_index
    )
    losses = pair_loss(
        margin,
        seq_kl,
        beta=beta,
        alpha=alpha,
        variant=variant,
        label_smoothing=label_smoothing,
    )
    chosen_rewards, rejected_rewards = (beta * (margin + seq_kl)).detach().chunk(2)
    chosen_dpo_rewards, rejected_dpo_rewards = (beta * margin).detach().chunk(2)
    chosen_logps, rejected_logps = logps.detach().chunk(2)
    chosen_kl, rejected_kl = seq_kl.detach().chunk(2)
    return TDPOOutput(
        loss=_reduced(losses, reduction),
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


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
