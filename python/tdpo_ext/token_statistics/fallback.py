"""The ops in plain PyTorch, for tensors that no compiled kernel serves.

Rows are taken a block at a time, so that temporaries stay small beside the logits. Forward saves
the same ``normalizers`` for backward as the kernels do (``csrc/token_stats.h``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

NORMALIZERS = 8
"""Per row, with the policy's logits z, the reference's r, their softmaxes p, q and the label y:
max z, exp(max z - lse(z)), max r, exp(max r - lse(r)), lse(z) - lse(r), 1 - p(y), 1 - q(y) and
p(y) - q(y)."""

_BLOCK_ELEMENTS = 1 << 22
_warned: set[str] = set()


def warn_once(device: str, reason: str) -> None:
    if device not in _warned:
        _warned.add(device)
        warnings.warn(
            f"tdpo_ext runs its plain-PyTorch fallback on {device}: {reason}. Results are the "
            "same; time and memory are PyTorch's",
            stacklevel=3,
        )


def _row_blocks(leading: torch.Size, vocabulary: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of blocks of rows. Each selects a view, whatever the strides: nothing is copied."""
    if len(leading) == 0:
        yield ()
    elif len(leading) == 1:
        rows = max(1, _BLOCK_ELEMENTS // vocabulary)
        yield from ((slice(start, start + rows),) for start in range(0, leading[0], rows))
    else:
        for index in range(leading[0]):
            yield from ((index, *rest) for rest in _row_blocks(leading[1:], vocabulary))


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


DIVERGENCE_NORMALIZERS = NORMALIZERS + 4
"""With divergences also KL(p || q), H - lse(z) + max z for the policy's entropy H,
p(y) (log p(y) - log q(y) - KL(p || q)) and p(y) (log p(y) + H)."""


def forward(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(policy_logits)
    outputs = tuple(policy_logits.new_zeros(labels.shape, dtype=dtype) for _ in range(3))
    normalizers = policy_logits.new_zeros((*labels.shape, NORMALIZERS), dtype=dtype)
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        label, ignored, outside = _columns(labels[rows], ignore_index, policy_logits.shape[-1])
        z, r = (
            x[rows].to(dtype).masked_fill(ignored, 0) for x in (policy_logits, reference_logits)
        )
        policy_log_probs, reference_log_probs = _log_softmax(z), _log_softmax(r)
        kl = _forward_kl(policy_log_probs, reference_log_probs)
        logps = policy_log_probs.gather(-1, label), reference_log_probs.gather(-1, label)
        for output, values in zip(outputs, (*logps, kl), strict=True):
            values = values.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
            output[rows] = values.squeeze(-1)
        saved = _normalizers(z, r, kl, label)
        normalizers[rows] = saved.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
    return outputs[0], outputs[1], outputs[2], normalizers


def _columns(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels ``[..., 1]`` that can be an index, 0 where they lie outside the vocabulary; where they
    are ``ignore_index``; and where they lie outside."""
    label = labels.to(torch.int64).unsqueeze(-1)  # int32 may not hold ignore_index
    outside = (label < 0) | (label >= vocabulary)
    return label.masked_fill(outside, 0), label == ignore_index, outside


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax that subtracts the maximum first and the logarithm of the sum second.

    PyTorch's own adds the two before it subtracts, which is less accurate.
    """
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return shifted - shifted.exp().sum(dim=-1, keepdim=True).log()


def _forward_kl(policy_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi_ref || pi) ``[..., 1]`` as a sum of terms that are all at least 0 (docs/algebra.md)."""
    p, q = policy_log_probs.exp(), reference_log_probs.exp()
    u = reference_log_probs - policy_log_probs  # log q - log p
    terms = torch.where(u.abs() < 0.5, q * (torch.expm1(-u) + u), p - q + q * u)
    impossible = reference_log_probs == -torch.inf  # q = 0, and 0 log 0 = 0
    excluded = (policy_log_probs == -torch.inf) & ~impossible  # p = 0 < q
    terms = torch.where(impossible, p, terms).masked_fill(excluded, torch.inf)
    return terms.sum(dim=-1, keepdim=True)


def _normalizers(z: Tensor, r: Tensor, kl: Tensor, label: Tensor) -> Tensor:
    z_max, r_max = z.amax(-1, keepdim=True), r.amax(-1, keepdim=True)
    z_scale = 1 / (z - z_max).exp().sum(-1, keepdim=True)
    r_scale = 1 / (r - r_max).exp().sum(-1, keepdim=True)
    p, q = (z - z_max).exp() * z_scale, (r - r_max).exp() * r_scale
    # lse(z) - lse(r) = KL + E_q[z - r]. Where the KL is small, this sum is more accurate than the
    # difference of the two lse.
    expected_gap = (q * (z - r).masked_fill(q == 0, 0)).sum(-1, keepdim=True)
    gap = torch.where(
        kl < 0.5, expected_gap + kl, z_max - r_max - torch.log(z_scale) + torch.log(r_scale)
    )
    p_rest, q_rest = (x.scatter(-1, label, 0).sum(-1, keepdim=True) for x in (p, q))
    difference = _difference(z, r, p, q, gap)
    p_label, label_gap = p.gather(-1, label), difference.gather(-1, label)
    # p - q sums to 0 over a row. Where the label has most of the mass, its difference has lost
    # digits, and the sum over all other entries has them.
    lost = (p_label > 0.5) & (label_gap.abs() < 0.5 * p_label)
    from_rest = -difference.scatter(-1, label, 0).sum(-1, keepdim=True)
    label_gap = torch.where(lost, from_rest, label_gap)
    saved = (z_max, z_scale, r_max, r_scale, gap, p_rest, q_rest, label_gap)
    return torch.cat(saved, dim=-1)


def _difference(z: Tensor, r: Tensor, p: Tensor, q: Tensor, gap: Tensor) -> Tensor:
    """p - q, accurate also where p and q are close. ``gap`` is lse(z) - lse(r)."""
    u = z - r - gap  # log p - log q
    # With a large gap, z - r has lost the digits of a small u.
    close = (u.abs() < 0.5) & (gap.abs() < 2)
    return torch.where(close, q * torch.expm1(u.masked_fill(~close, 0)), p - q)


def backward(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_logps: Tensor,
    grad_kl: Tensor,
    ignore_index: int,
) -> None:
    """Write dz = g_m (onehot(y) - p) + g_k (p - q) to ``gradient``.

    g_m and g_k are ``grad_logps`` and ``grad_kl``. ``gradient`` may be ``policy_logits`` or
    ``reference_logits``.
    """
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        z = policy_logits[rows].to(normalizers.dtype)
        r = reference_logits[rows].to(normalizers.dtype)
        saved = normalizers[rows].unsqueeze(-1).unbind(-2)
        z_max, z_scale, r_max, r_scale, gap, p_rest, _, label_gap = saved
        p, q = (z - z_max).exp() * z_scale, (r - r_max).exp() * r_scale
        g_m, g_k = grad_logps[rows].unsqueeze(-1), grad_kl[rows].unsqueeze(-1)
        kl_part = torch.where(g_k == 0, 0, g_k * _difference(z, r, p, q, gap))
        at_label = torch.where(g_k == 0, 0, g_k * label_gap) + g_m * p_rest
        label, ignored, outside = _columns(labels[rows], ignore_index, policy_logits.shape[-1])
        result = kl_part - g_m * p
        # The label is in another tile, or in none; then the normalizers are NaN, and so is dz.
        at_label = torch.where(outside, result.gather(-1, label), at_label)
        result.scatter_(-1, label, at_label)
        gradient[rows] = result.masked_fill(ignored, 0).to(gradient.dtype)


# --- divergences ----------------------------------------------------------------------------------


def divergences_forward(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    unlabelled: bool,
) -> tuple[Tensor, ...]:
    """policy_logps, reference_logps, forward_kl, reverse_kl, policy_entropy, reference_entropy
    ``[...]`` and normalizers ``[..., 12]``."""
    dtype = accumulation_dtype(policy_logits)
    outputs = tuple(policy_logits.new_zeros(labels.shape, dtype=dtype) for _ in range(6))
    normalizers = policy_logits.new_zeros((*labels.shape, DIVERGENCE_NORMALIZERS), dtype=dtype)
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        label, ignored, outside = _columns(labels[rows], ignore_index, policy_logits.shape[-1])
        z, r = (
            x[rows].to(dtype).masked_fill(ignored, 0) for x in (policy_logits, reference_logits)
        )
        wrong = torch.zeros_like(outside) if unlabelled else outside
        policy_log_probs, reference_log_probs = _log_softmax(z), _log_softmax(r)
        forward_kl = _forward_kl(policy_log_probs, reference_log_probs)
        reverse_kl = _forward_kl(reference_log_probs, policy_log_probs)
        entropies = _entropy(policy_log_probs), _entropy(reference_log_probs)
        logps = policy_log_probs.gather(-1, label), reference_log_probs.gather(-1, label)
        values = (*logps, forward_kl, reverse_kl, *entropies)
        for output, value in zip(outputs, values, strict=True):
            kept = value.masked_fill(wrong, torch.nan).masked_fill(ignored, 0)
            output[rows] = kept.squeeze(-1)
        saved = _normalizers(z, r, forward_kl, label)
        offset = entropies[0] + saved[..., 1:2].log()
        at_label = _weighted_terms(z, r, saved, reverse_kl, offset)
        label_terms = (x.gather(-1, label).masked_fill(outside, 0) for x in at_label)
        saved = torch.cat((saved, reverse_kl, offset, *label_terms), dim=-1)
        normalizers[rows] = saved.masked_fill(wrong, torch.nan).masked_fill(ignored, 0)
    return *outputs, normalizers


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum_v p log p ``[..., 1]``, where 0 log 0 = 0."""
    terms = log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0)
    return -terms.sum(dim=-1, keepdim=True)


def _weighted_terms(
    z: Tensor, r: Tensor, saved: Tensor, reverse_kl: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """p (log p - log q - KL(p || q)) and p (log p + H), 0 where p = 0."""
    z_max, z_scale, gap = saved[..., 0:1], saved[..., 1:2], saved[..., 4:5]
    p = (z - z_max).exp() * z_scale
    by_reverse, by_entropy = p * (z - r - gap - reverse_kl), p * (z - z_max + offset)
    return by_reverse.masked_fill(p == 0, 0), by_entropy.masked_fill(p == 0, 0)


def divergences_backward(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_logps: Tensor,
    grad_forward_kl: Tensor,
    grad_reverse_kl: Tensor,
    grad_entropy: Tensor,
    ignore_index: int,
) -> None:
    """Write dz = g_m (onehot(y) - p) + g_k (p - q) + g_r p (log p - log q - KL(p || q))
    - g_H p (log p + H) to ``gradient``, which may be the logits of either side."""
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        z = policy_logits[rows].to(normalizers.dtype)
        r = reference_logits[rows].to(normalizers.dtype)
        saved = normalizers[rows]
        label, ignored, outside = _columns(labels[rows], ignore_index, policy_logits.shape[-1])
        p, q = (
            (x - saved[..., at : at + 1]).exp() * saved[..., at + 1 : at + 2]
            for x, at in ((z, 0), (r, 2))
        )
        by_reverse, by_entropy = _weighted_terms(z, r, saved, saved[..., 8:9], saved[..., 9:10])
        difference = _difference(z, r, p, q, saved[..., 4:5])
        # Each term by all entries, and by the label, which forward has computed with more digits.
        terms = (
            (grad_logps, -p, saved[..., 5:6]),
            (grad_forward_kl, difference, saved[..., 7:8]),
            (grad_reverse_kl, by_reverse, saved[..., 10:11]),
            (-grad_entropy, by_entropy, saved[..., 11:12]),
        )
        result, at_label = torch.zeros_like(z), torch.zeros_like(saved[..., :1])
        for upstream, of_entries, of_label in terms:
            weight = upstream[rows].unsqueeze(-1)
            result = result + torch.where(weight == 0, 0, weight * of_entries)
            at_label = at_label + torch.where(weight == 0, 0, weight * of_label)
        result.scatter_(-1, label, torch.where(outside, result.gather(-1, label), at_label))
        gradient[rows] = result.masked_fill(ignored, 0).to(gradient.dtype)
