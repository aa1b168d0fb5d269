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

NORMALIZERS = 5
"""Per row: max z, 1 / sum exp(z - max z), max r, 1 / sum exp(r - max r), and the difference of the
log-sum-exps of z and r; z is the policy's logits and r the reference's."""

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
        z = policy_logits[rows].to(dtype).masked_fill(ignored, 0)
        r = reference_logits[rows].to(dtype).masked_fill(ignored, 0)
        stats = stats_of_rows(z, r, labels[rows], ignore_index)
        for output, values in zip(outputs, stats, strict=True):
            output[rows] = values
        normalizers[rows] = _normalizers(z, r, stats.forward_kl).masked_fill(ignored, 0)
    return outputs[0], outputs[1], outputs[2], normalizers


def _normalizers(z: Tensor, r: Tensor, kl: Tensor) -> Tensor:
    z_max, r_max = z.amax(-1, keepdim=True), r.amax(-1, keepdim=True)
    z_scale = 1 / (z - z_max).exp().sum(-1, keepdim=True)
    r_scale = 1 / (r - r_max).exp().sum(-1, keepdim=True)
    # KL = lse(z) - lse(r) - E_q[z - r]: where it is small this order keeps the small digits.
    q = (r - r_max).exp() * r_scale
    expected_gap = (q * (z - r).masked_fill(q == 0, 0)).sum(-1)
    far = (z_max - r_max - torch.log(z_scale) + torch.log(r_scale)).squeeze(-1)
    gap = torch.where(kl < 0.5, expected_gap + kl, far).unsqueeze(-1)
    return torch.cat((z_max, z_scale, r_max, r_scale, gap), dim=-1)


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
    """dz = g_m (onehot(y) - p) + g_k (p - q), to ``gradient``, which may be ``policy_logits``."""
    vocabulary = policy_logits.shape[-1]
    for rows in _row_blocks(labels.shape, vocabulary):
        z = policy_logits[rows].to(normalizers.dtype)
        r = reference_logits[rows].to(normalizers.dtype)
        z_max, z_scale, r_max, r_scale, gap = normalizers[rows].unsqueeze(-1).unbind(-2)
        p, q = (z - z_max).exp() * z_scale, (r - r_max).exp() * r_scale
        u = z - r - gap  # log p - log q
        # Shifted far against each other, z - r has lost the digits that u would keep.
        close = (u.abs() < 0.5) & (gap.abs() < 2)
        difference = torch.where(close, q * torch.expm1(u.masked_fill(~close, 0)), p - q)
        label = labels[rows].to(torch.int64).unsqueeze(-1)
        ignored = label == ignore_index
        outside = ~ignored & ((label < 0) | (label >= vocabulary))
        g_m = grad_logps[rows].unsqueeze(-1).masked_fill(outside, torch.nan)
        g_k = grad_kl[rows].unsqueeze(-1)
        of_kl = torch.where(g_k == 0, 0, g_k * difference)
        label = label.masked_fill(ignored | outside, 0)
        at_label = _at_label(p, of_kl, label, g_m, g_k)
        result = (of_kl - g_m * p).scatter_(-1, label, at_label)
        gradient[rows] = result.masked_fill(ignored, 0).to(gradient.dtype)


def _at_label(p: Tensor, of_kl: Tensor, label: Tensor, g_m: Tensor, g_k: Tensor) -> Tensor:
    """g_k (p - q) + g_m (1 - p) at the label.

    Over a row p - q sums to 0 and p to 1. Where the label has most of the mass, the sums of the
    others have the digits that the differences lost.
    """
    p_label, of_kl_label = p.gather(-1, label), of_kl.gather(-1, label)
    other_mass = p.scatter(-1, label, 0).sum(-1, keepdim=True)
    other_of_kl = of_kl.scatter(-1, label, 0).sum(-1, keepdim=True)
    most = p_label > 0.5
    lost = most & (of_kl_label.abs() < 0.5 * g_k.abs() * p_label)
    return torch.where(lost, -other_of_kl, of_kl_label) + g_m * torch.where(
        most, other_mass, 1 - p_label
    )
