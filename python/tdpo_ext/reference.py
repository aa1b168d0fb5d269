r"""TDPO in plain PyTorch: the definition of the method, and what the kernels are tested against.

It runs on any device, is differentiable twice, and works under torch.func.grad and in forward mode,
where the functions of the same names in ``tdpo_ext`` raise RuntimeError. Each function allocates
several tensors of shape [..., V]; those of ``tdpo_ext`` do not. Nothing in the library calls this
module. The steps from token statistics to the loss, which need no kernel, are in ``loss.py``.

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

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Divergence, LogitOptions, Reduction, Side, Variant
from tdpo_ext.distributed import is_dtensor
from tdpo_ext.loss import LossOptions, loss_from_stats, pair_loss
from tdpo_ext.outputs import TDPOOutput, TokenDivergences, TokenStats
from tdpo_ext.sequences import aligned_labels

__all__ = [
    "linear_tdpo_loss",
    "linear_token_divergences",
    "linear_token_stats",
    "pair_loss",
    "tdpo_loss",
    "token_divergences",
    "token_stats",
]


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> TokenStats:
    """``tdpo_ext.token_stats`` from softmaxes, for the whole vocabulary on one process.

    Arguments, results and errors are those of ``tdpo_ext.token_stats``, except:

    Args:
        inplace_backward: False only.
        process_group: None only, and no DTensors.

    Returns:
        ``TokenStats``, differentiable twice.

    Raises:
        ValueError: Also for ``inplace_backward=True``, for a ``process_group`` and for DTensors.
    """
    names: tuple[Divergence, ...] = ("policy_logps", "reference_logps", "forward_kl")
    stats = token_divergences(
        policy_logits,
        reference_logits,
        labels,
        outputs=names,
        ignore_index=ignore_index,
        inplace_backward=inplace_backward,
        process_group=process_group,
    )
    return TokenStats(*(x for x in stats[:3] if x is not None))


def token_divergences(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    outputs: Collection[Divergence] = ("forward_kl", "reverse_kl"),
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> TokenDivergences:
    """``tdpo_ext.token_divergences`` from softmaxes, for the whole vocabulary on one process.

    Arguments, results and errors are those of ``tdpo_ext.token_divergences``, except:

    Args:
        inplace_backward: False only.
        process_group: None only, and no DTensors.

    Returns:
        ``TokenDivergences``, differentiable twice. The gradient of an infinite divergence has no
        meaning.

    Raises:
        ValueError: Also for ``inplace_backward=True``, for a ``process_group`` and for DTensors.
    """
    _check_plain(inplace_backward, process_group, policy_logits, reference_logits)
    checks.check_logits(policy_logits, reference_logits)
    checks.check_divergences(outputs, labels, mask, policy_logits)
    checks.check_ignore_index(ignore_index)
    left_out = torch.zeros(policy_logits.shape[:-1], dtype=torch.bool, device=policy_logits.device)
    outside, label = left_out, None
    if mask is not None:
        left_out = ~mask
    if labels is not None:
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.check_label_range(labels, policy_logits.shape[-1], ignore_index)
        left_out = checks.is_ignored(labels, ignore_index)
        outside = ~left_out & ((labels < 0) | (labels >= policy_logits.shape[-1]))
        label = labels.masked_fill(left_out | outside, 0).to(torch.int64).unsqueeze(-1)
    # Rows left out are replaced before anything is computed, so NaN or inf in one of them changes
    # nothing. Masking the results instead would multiply their gradient by 0, and 0 * inf is NaN.
    blank = left_out.unsqueeze(-1)
    policy_log_probs = log_softmax(policy_logits.masked_fill(blank, 0))
    reference_log_probs = log_softmax(reference_logits.masked_fill(blank, 0))

    def of_tokens(name: Divergence) -> Tensor:
        if name == "forward_kl":
            return forward_kl(policy_log_probs, reference_log_probs)
        if name == "reverse_kl":
            return reverse_kl(policy_log_probs, reference_log_probs)
        log_probs = policy_log_probs if name.startswith("policy") else reference_log_probs
        if name.endswith("entropy"):
            return entropy(log_probs)
        assert label is not None
        return log_probs.gather(-1, label).squeeze(-1)

    return TokenDivergences(
        **{
            name: of_tokens(name).masked_fill(outside, torch.nan).masked_fill(left_out, 0)
            for name in outputs
        }
    )


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in float32 (float64 for float64).

    It subtracts the maximum first and the logarithm of the sum second. PyTorch's own adds the two
    before it subtracts, which is less accurate. The maximum cancels in the derivative, so it is
    taken as a constant.
    """
    if logits.dtype != torch.float64:
        logits = logits.to(torch.float32)
    shifted = logits - logits.detach().amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def forward_kl(policy_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi_ref || pi) = sum_v q (log q - log p), with q = pi_ref(v) and p = pi(v).

    p and q both sum to 1, so the KL also equals sum_v (p - q + q u) with u = log q - log p. No term
    of this sum is negative, so the sum never is. Nor do large terms cancel, so the sum keeps its
    digits where the two distributions are close; there p - q is computed as q expm1(-u).

    An infinite KL (p = 0 < q) has no gradient: the finite one that comes back has no meaning.
    """
    u = reference_log_probs - policy_log_probs
    p, q = policy_log_probs.exp(), reference_log_probs.exp()
    # torch.where also differentiates the branch that it does not take, and 0 * inf is NaN. So the
    # argument of each branch is filled with 0 where the branch is not taken.
    close = u.abs() < 0.5
    small_u = u.masked_fill(~close, 0)
    impossible = reference_log_probs == -torch.inf  # q = 0, and 0 log 0 = 0
    excluded = (policy_log_probs == -torch.inf) & ~impossible  # p = 0 < q: the KL is infinite
    large_u = u.masked_fill(close | impossible | excluded, 0)
    terms = torch.where(close, q * (torch.expm1(-small_u) + small_u), p - q + q * large_u)
    return terms.masked_fill(excluded, torch.inf).sum(dim=-1)


def reverse_kl(policy_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi || pi_ref) = sum_v p (log p - log q): ``forward_kl`` with the sides exchanged."""
    return forward_kl(reference_log_probs, policy_log_probs)


def entropy(log_probs: Tensor) -> Tensor:
    """-sum_v p log p, where 0 log 0 = 0."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)).sum(dim=-1)


def tdpo_loss(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: Variant = "tdpo2",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: None = None,
) -> TDPOOutput:
    """``tdpo_ext.tdpo_loss`` on top of this module's ``token_stats``.

    Arguments, results and errors are those of ``tdpo_ext.tdpo_loss``, except:

    Args:
        inplace_backward: False only.
        process_group: None only, and no DTensors.

    Returns:
        ``TDPOOutput``, whose loss is differentiable twice.

    Raises:
        ValueError: Also for ``inplace_backward=True``, for a ``process_group`` and for DTensors.
    """
    _check_plain(inplace_backward, process_group, policy_logits, reference_logits)
    checks.check_logits(policy_logits, reference_logits)
    options = LossOptions(
        beta, alpha, variant, label_smoothing, average_log_prob, reduction
    ).checked()
    aligned = aligned_labels(
        "policy_logits",
        policy_logits,
        labels,
        shift_labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
    )
    stats = token_stats(policy_logits, reference_logits, aligned, ignore_index=ignore_index)
    return loss_from_stats(
        stats, aligned, options, cu_seqlens=cu_seqlens, ignore_index=ignore_index
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
    process_group: None = None,
) -> TokenStats:
    """``tdpo_ext.linear_token_stats`` by making the logits.

    Arguments, results and errors are those of ``tdpo_ext.linear_token_stats``, except:

    Args:
        chunk_bytes: Has no effect.
        process_group: None only, and no DTensors.

    Returns:
        ``TokenStats``, differentiable twice.

    Raises:
        ValueError: Also for a ``process_group`` and for DTensors.
    """
    _check_plain(False, process_group, policy_hidden, policy_weight, reference_weight)
    checks.check_chunk_bytes(chunk_bytes)
    policy = policy_hidden, policy_weight, policy_bias
    reference = reference_hidden, reference_weight, reference_bias
    checks.check_heads(policy, reference)
    checks.check_labels("labels", labels, policy_hidden)
    checks.check_ignore_index(ignore_index)
    options = checks.logit_options(
        logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap
    )
    ignored = checks.is_ignored(labels, ignore_index)
    logits = logits_of_heads(policy, reference, options, ignored)
    return token_stats(*logits, labels, ignore_index=ignore_index)


def linear_token_divergences(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    reference_hidden: Tensor,
    reference_weight: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    outputs: Collection[Divergence] = ("forward_kl", "reverse_kl"),
    policy_bias: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reference_logit_scale: float | None = None,
    reference_logit_softcap: float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    process_group: None = None,
) -> TokenDivergences:
    """``tdpo_ext.linear_token_divergences`` by making the logits.

    Arguments, results and errors are those of ``tdpo_ext.linear_token_divergences``, except:

    Args:
        chunk_bytes: Has no effect.
        process_group: None only, and no DTensors.

    Returns:
        ``TokenDivergences``, differentiable twice. The gradient of an infinite divergence has no
        meaning.

    Raises:
        ValueError: Also for a ``process_group`` and for DTensors.
    """
    _check_plain(False, process_group, policy_hidden, policy_weight, reference_weight)
    checks.check_chunk_bytes(chunk_bytes)
    policy = policy_hidden, policy_weight, policy_bias
    reference = reference_hidden, reference_weight, reference_bias
    checks.check_heads(policy, reference)
    checks.check_divergences(outputs, labels, mask, policy_hidden)
    checks.check_ignore_index(ignore_index)
    options = checks.logit_options(
        logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap
    )
    ignored = None if mask is None else ~mask
    if labels is not None:
        ignored = checks.is_ignored(labels, ignore_index)
    logits = logits_of_heads(policy, reference, options, ignored)
    return token_divergences(*logits, labels, mask=mask, outputs=outputs, ignore_index=ignore_index)


def logits_of_heads(
    policy: Side, reference: Side, options: LogitOptions, ignored: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The logits of both heads. ``ignored``: rows whose hidden states get no gradient, ``[...]``
    bool."""
    sides = []
    for (hidden, weight, bias), of_side in ((policy, options[:2]), (reference, options[2:])):
        states = hidden if ignored is None else hidden.masked_fill(ignored.unsqueeze(-1), 0)
        sides.append(logits_of(states, weight, bias, *of_side))
    return sides[0], sides[1]


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Logits in float32 (float64 for float64): softcap tanh(scale (h W^T + b) / softcap).

    A softcap of 0 means none: scale (h W^T + b).
    """
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
    variant: Variant = "tdpo2",
    label_smoothing: float = 0.0,
    average_log_prob: bool = False,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    process_group: None = None,
) -> TDPOOutput:
    """``tdpo_ext.linear_tdpo_loss`` on top of this module's ``linear_token_stats``.

    Arguments, results and errors are those of ``tdpo_ext.linear_tdpo_loss``, except:

    Args:
        chunk_bytes: Has no effect.
        process_group: None only, and no DTensors.

    Returns:
        ``TDPOOutput``, whose loss is differentiable twice.

    Raises:
        ValueError: Also for a ``process_group`` and for DTensors.
    """
    _check_plain(False, process_group, policy_hidden, policy_weight, reference_weight)
    options = LossOptions(
        beta, alpha, variant, label_smoothing, average_log_prob, reduction
    ).checked()
    checks.check_heads(
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
    )
    aligned = aligned_labels(
        "policy_hidden",
        policy_hidden,
        labels,
        shift_labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
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
    )
    return loss_from_stats(
        stats, aligned, options, cu_seqlens=cu_seqlens, ignore_index=ignore_index
    )


def _check_plain(inplace_backward: bool, process_group: Any, *tensors: Any) -> None:
    """Refuse the options that only the compiled functions have."""
    if inplace_backward:
        raise ValueError(
            "inplace_backward=True is for tdpo_ext.token_stats: plain PyTorch keeps the logits for "
            "its backward; pass inplace_backward=False"
        )
    if process_group is not None or any(map(is_dtensor, tensors)):
        given = "DTensors" if process_group is None else "a process_group"
        raise ValueError(
            f"tdpo_ext.reference takes the whole vocabulary on one process, got {given}; gather "
            "the parts first, or call the function of the same name in tdpo_ext"
        )
