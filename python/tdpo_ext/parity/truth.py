"""The truth that backends are compared with: the equations in float64.

``tdpo_ext.reference`` would not do. It is a definition to read and to differentiate, and where the
label has almost all of the mass its 1 - p(y) has lost all digits. Here the label's probability is
computed from the odds of all other entries. z are the policy's logits, r the reference's, p and q
their softmaxes, y the label.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    """float64 tensors, ``[N]``; the gradient of the logits is ``[N, V]``."""

    policy_logps: Tensor
    reference_logps: Tensor
    forward_kl: Tensor
    gradient: Tensor
    terms: Tensor
    """The largest term in the sums that make the gradient of a row. Its rounding errors are
    relative to this."""


def log_softmax(x: Tensor, label: Tensor) -> Tensor:
    """Log-softmax, ``[N, V]``.

    At the label it is -log(1 + odds of all other entries), which keeps its digits near 0.
    """
    at_label = x.gather(-1, label)
    rest = x.scatter(-1, label, -torch.inf).logsumexp(-1, keepdim=True)
    total = torch.logaddexp(rest, at_label)
    return (x - total).scatter(-1, label, -torch.logaddexp(rest - at_label, torch.zeros_like(rest)))


def token_stats(z: Tensor, r: Tensor, labels: Tensor, grad_logps: Tensor, grad_kl: Tensor) -> Truth:
    """The truth for float64 rows ``[N, V]`` and labels ``[N]``; 0 where the label is -100."""
    ignored = labels == -100
    blank = ignored.unsqueeze(-1)
    label = labels.masked_fill(ignored, 0).unsqueeze(-1)
    log_p, log_q = (log_softmax(x.masked_fill(blank, 0), label) for x in (z, r))
    p, q = log_p.exp(), log_q.exp()
    # u = log p - log q, and 0 where both are -inf: neither side has mass there.
    u = (log_p - log_q).masked_fill((log_p == -torch.inf) & (log_q == -torch.inf), 0)
    close = u.abs() < 0.5
    small = u.masked_fill(~close, 0)
    # KL = sum of q (e^u - 1 - u). No term is negative; where q = 0 the term is p.
    large = u.masked_fill(q == 0, 0)
    kl = torch.where(close, q * (torch.expm1(small) - small), p - q - q * large).sum(-1)
    difference = torch.where(close, q * torch.expm1(small), p - q)  # p - q
    g_m, g_k = grad_logps.double().unsqueeze(-1), grad_kl.double().unsqueeze(-1)
    at_p, at_q = (x.gather(-1, label) for x in (log_p, log_q))
    at_label = g_m * -torch.expm1(at_p) + g_k * difference.gather(-1, label)
    gradient = (g_k * difference - g_m * p).scatter(-1, label, at_label)
    # p - q = q (e^u - 1) with u = z - r - ..., so p - q is no more accurate than z - r. At the
    # label it is the difference of 1 - q(y) and 1 - p(y).
    not_p, not_q = (x.scatter(-1, label, -torch.expm1(y)) for x, y in ((p, at_p), (q, at_q)))
    gap = (z - r).abs().nan_to_num(1).clamp(max=1)
    terms = g_m.abs() * not_p + g_k.abs() * torch.maximum(not_p, not_q) * gap
    largest = torch.maximum(terms, gradient.abs()).amax(-1)
    return Truth(
        at_p.squeeze(-1).masked_fill(ignored, 0),
        at_q.squeeze(-1).masked_fill(ignored, 0),
        kl.masked_fill(ignored, 0),
        gradient.masked_fill(blank, 0),
        largest.masked_fill(ignored, 0),
    )


class Divergences(NamedTuple):
    """float64 tensors, ``[N]``; the gradient of the logits is ``[N, V]``."""

    reverse_kl: Tensor
    policy_entropy: Tensor
    reference_entropy: Tensor
    gradient: Tensor
    """Of KL(p || q) and of the policy's entropy."""
    terms: Tensor
    """As in ``Truth``."""


def divergences(
    z: Tensor, r: Tensor, labels: Tensor, grad_reverse: Tensor, grad_entropy: Tensor
) -> Divergences:
    """As ``token_stats``, for KL(p || q) and the entropies."""
    ignored = labels == -100
    blank = ignored.unsqueeze(-1)
    label = labels.masked_fill(ignored, 0).unsqueeze(-1)
    z, r = (x.masked_fill(blank, 0) for x in (z, r))
    log_p, log_q = (log_softmax(x, label) for x in (z, r))
    p, q = log_p.exp(), log_q.exp()
    impossible = p == 0
    u = (log_p - log_q).masked_fill(impossible, 0)
    close = u.abs() < 0.5
    small = u.masked_fill(~close, 0)
    # KL = sum of p (e^-u - 1 + u). No term is negative; where p = 0 the term is q.
    near, far = p * (torch.expm1(-small) + small), q - p + p * u
    reverse_kl = torch.where(close & ~impossible, near, far).sum(-1, keepdim=True)
    entropies = [-(torch.special.xlogy(x, x)).sum(-1, keepdim=True) for x in (p, q)]
    g_r, g_h = grad_reverse.double().unsqueeze(-1), grad_entropy.double().unsqueeze(-1)
    finite_log = log_p.masked_fill(impossible, 0)
    by_reverse = torch.where(g_r == 0, 0, g_r * p * (u - reverse_kl))
    gradient = by_reverse - g_h * p * (finite_log + entropies[0])
    # u is no more accurate than z - r, and log p than the difference of z and a number near its
    # largest: an entry with almost all of the mass has the errors of these.
    gap = 1 + (z - r).abs().nan_to_num(0, posinf=0) + u.abs() + reverse_kl
    terms = torch.where(g_r == 0, 0, g_r.abs() * p * gap)
    terms = terms + g_h.abs() * p * (1 + finite_log.abs() + entropies[0])
    kl, entropy, reference_entropy = (
        x.squeeze(-1).masked_fill(ignored, 0) for x in (reverse_kl, *entropies)
    )
    return Divergences(
        kl,
        entropy,
        reference_entropy,
        gradient.masked_fill(blank, 0),
        terms.amax(-1).masked_fill(ignored, 0),
    )
