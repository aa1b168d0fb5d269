"""The ops in plain PyTorch, for tensors that no compiled kernel serves.

Rows are taken a block at a time, so that the temporaries stay small beside the logits. What forward
saves for backward, ``normalizers``, is what the kernels save too (``csrc/token_stats.h``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from tdpo_ext.reference import stats_of_rows

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
    """Indices of blocks of rows, as views whatever the strides: nothing is flattened."""
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


def forward(
    policy_logits: Tensor, reference_logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(policy_logits)
    outputs = tuple(policy_logits.new_zeros(labels.shape, dtype=dtype) for _ in range(3))
    normalizers = policy_logits.new_zeros((*labels.shape, NORMALIZERS), dtype=dtype)
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        ignored = (labels[rows] == ignore_index).unsqueeze(-1)
        z, r = policy_logits[rows].to(dtype), reference_logits[rows].to(dtype)
        stats = stats_of_rows(z, r, labels[rows], ignore_index)
        for output, values in zip(outputs, stats, strict=True):
            output[rows] = values
        label = labels[rows].to(torch.int64).unsqueeze(-1)
        outside = (label < 0) | (label >= z.shape[-1])
        saved = _normalizers(z, r, stats.forward_kl, label.masked_fill(outside, 0))
        normalizers[rows] = saved.masked_fill(outside, torch.nan).masked_fill(ignored, 0)
    return outputs[0], outputs[1], outputs[2], normalizers


def _normalizers(z: Tensor, r: Tensor, kl: Tensor, label: Tensor) -> Tensor:
    z_max, r_max = z.amax(-1, keepdim=True), r.amax(-1, keepdim=True)
    z_scale = 1 / (z - z_max).exp().sum(-1, keepdim=True)
    r_scale = 1 / (r - r_max).exp().sum(-1, keepdim=True)
    p, q = (z - z_max).exp() * z_scale, (r - r_max).exp() * r_scale
    # KL = lse(z) - lse(r) - E_q[z - r]: where it is small this order keeps the small digits.
    expected_gap = (q * (z - r).masked_fill(q == 0, 0)).sum(-1, keepdim=True)
    kl = kl.unsqueeze(-1)
    gap = torch.where(
        kl < 0.5, expected_gap + kl, z_max - r_max - torch.log(z_scale) + torch.log(r_scale)
    )
    p_rest, q_rest = (x.scatter(-1, label, 0).sum(-1, keepdim=True) for x in (p, q))
    difference = _difference(z, r, p, q, gap)
    p_label, label_gap = p.gather(-1, label), difference.gather(-1, label)
    # Over a row p - q sums to 0. Where the label has most of the mass, the sum over the others has
    # the digits that the difference lost.
    lost = (p_label > 0.5) & (label_gap.abs() < 0.5 * p_label)
    from_rest = -difference.scatter(-1, label, 0).sum(-1, keepdim=True)
    label_gap = torch.where(lost, from_rest, label_gap)
    saved = (z_max, z_scale, r_max, r_scale, gap, p_rest, q_rest, label_gap)
    return torch.cat(saved, dim=-1)


def _difference(z: Tensor, r: Tensor, p: Tensor, q: Tensor, gap: Tensor) -> Tensor:
    """p - q, with its digits where p and q are close."""
    u = z - r - gap  # log p - log q
    # Shifted far against each other, z - r has lost the digits that u would keep.
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
    """Write dz = g_m (onehot(y) - p) + g_k (p - q) to ``gradient``, which may be ``policy_logits``
    or ``reference_logits``."""
    for rows in _row_blocks(labels.shape, policy_logits.shape[-1]):
        z = policy_logits[rows].to(normalizers.dtype)
        r = reference_logits[rows].to(normalizers.dtype)
        saved = normalizers[rows].unsqueeze(-1).unbind(-2)
        z_max, z_scale, r_max, r_scale, gap, p_rest, _, label_gap = saved
        p, q = (z - z_max).exp() * z_scale, (r - r_max).exp() * r_scale
        g_m, g_k = grad_logps[rows].unsqueeze(-1), grad_kl[rows].unsqueeze(-1)
        of_kl = torch.where(g_k == 0, 0, g_k * _difference(z, r, p, q, gap))
        at_label = torch.where(g_k == 0, 0, g_k * label_gap) + g_m * p_rest
        label = labels[rows].to(torch.int64).unsqueeze(-1)
        ignored = label == ignore_index
        result = of_kl - g_m * p
        outside = (label < 0) | (label >= z.shape[-1])  # in another tile, or nowhere: NaN anyway
        label = label.masked_fill(outside, 0)
        at_label = torch.where(outside, result.gather(-1, label), at_label)
        result.scatter_(-1, label, at_label)
        gradient[rows] = result.masked_fill(ignored, 0).to(gradient.dtype)
