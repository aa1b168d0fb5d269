"""From tokens to sequences: the label of each position, and sums over each sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import IGNORED


def aligned_labels(
    name: str,
    batch: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """The labels aligned with a batch, from exactly one of ``labels`` and ``shift_labels``.

    Arguments as those of ``given_labels``.
    """
    given, shift = given_labels(
        name, batch, labels, shift_labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index
    )
    return align_labels(given, cu_seqlens, ignore_index) if shift else given


def given_labels(
    name: str,
    batch: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, bool]:
    """The one of ``labels`` and ``shift_labels`` that is given, and whether it has to be shifted.

    ``batch`` is logits or hidden states: ``[2B, T, ...]``, or ``[total, ...]`` with ``cu_seqlens``.
    Errors call it ``name``.
    """
    checks.check_ignore_index(ignore_index)
    if cu_seqlens is None:
        checks.check_batch(name, batch)
    else:
        checks.check_packed_batch(name, batch, cu_seqlens)
    if labels is not None and shift_labels is None:
        checks.check_labels("labels", labels, batch)
        return labels, True
    if shift_labels is not None and labels is None:
        checks.check_labels("shift_labels", shift_labels, batch)
        return shift_labels, False
    raise checks.labels_error("neither" if labels is None else "both")


def labels_of_mask(mask: Tensor | None, batch: Tensor) -> Tensor:
    """For rows of a batch without labels: -1, which is none, and IGNORED where the mask is False.

    ``batch`` is logits or hidden states, ``[..., V]`` or ``[..., H]``.
    """
    labels = torch.full(batch.shape[:-1], -1, dtype=torch.int64, device=batch.device)
    return labels if mask is None else labels.masked_fill(~mask, IGNORED)


def align_labels(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Labels aligned with the logits, from labels as the model saw them.

    Position t of the logits predicts label t + 1, so the labels move by one position and the last
    position of every sequence is ignored. The logits themselves are never sliced.
    """
    labels = labels.to(torch.int64)  # int32 may not hold ignore_index
    aligned = torch.cat((labels[..., 1:], torch.full_like(labels[..., :1], ignore_index)), dim=-1)
    if cu_seqlens is None:
        return aligned
    # The label before each start is ignored. torch.isin would find the starts in one call, but it
    # makes the host wait for the device.
    total = labels.shape[0]
    starts = torch.zeros(total + 1, dtype=torch.bool, device=labels.device)
    starts = starts.scatter(0, cu_seqlens.to(torch.int64).clamp(0, total), True)
    return aligned.masked_fill(starts[1:], ignore_index)


@torch.library.custom_op("tdpo_ext::sequence_bounds", mutates_args=())
def sequence_bounds(cu_seqlens: Tensor, total: int) -> Tensor:
    """``cu_seqlens`` as int64 bounds that stay inside [0, total] and never descend.

    On the CPU a violation raises ValueError. On an accelerator the host does not wait for the
    values: the bounds are clamped, so that no memory outside is read, and ``sequence_sums`` returns
    NaN.
    """
    if cu_seqlens.device.type == "cpu":
        descends = bool((cu_seqlens[1:] < cu_seqlens[:-1]).any())
        if descends or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != total:
            raise checks.bounds_error(cu_seqlens, total)
        return cu_seqlens.to(torch.int64, copy=True)
    return cu_seqlens.to(torch.int64).clamp(0, total).cummax(0).values


@sequence_bounds.register_fake
def _(cu_seqlens: Tensor, total: int) -> Tensor:
    return torch.empty_like(cu_seqlens, dtype=torch.int64)


class _SegmentSum(torch.autograd.Function):
    """The sum between each two neighbouring bounds, without atomics.

    ``torch.segment_reduce`` is differentiable once. The gradient here is a gather, which can be
    differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, bounds: Tensor) -> Tensor:
        position = torch.arange(values.shape[0], device=values.device)
        ctx.save_for_backward(torch.searchsorted(bounds[1:-1], position, right=True))
        return torch.segment_reduce(values, "sum", offsets=bounds, axis=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (sequence_of_token,) = ctx.saved_tensors
        return gradients[0][sequence_of_token], None


def sequence_sums(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums ``[2B]`` of values per token, ``[2B, T]`` or, with ``cu_seqlens``, ``[total]``."""
    if cu_seqlens is None:
        return values.sum(dim=-1)
    bounds = torch.ops.tdpo_ext.sequence_bounds(cu_seqlens, values.shape[0])
    sums: Tensor = _SegmentSum.apply(values, bounds)  # type: ignore[no-untyped-call]
    usable = (bounds == cu_seqlens).all() & (cu_seqlens[-1] == values.shape[0])
    return torch.where(usable & (cu_seqlens[0] == 0), sums, torch.nan)


def sequence_of_tokens(labels: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """The number of each token's sequence, ``[N]``, for ``[2B, T]`` flattened or packed tokens."""
    position = torch.arange(labels.numel(), device=labels.device)
    if cu_seqlens is None:
        return position // max(1, labels.numel() // max(1, sequences))
    bounds = torch.ops.tdpo_ext.sequence_bounds(cu_seqlens, labels.numel())
    return torch.searchsorted(bounds[1:-1], position, right=True)


def kept_counts(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """The number of labels of each sequence that are not ignored, at least 1: float32 ``[2B]``."""
    kept = (~checks.is_ignored(labels, ignore_index)).to(torch.float32)
    return sequence_sums(kept, cu_seqlens).clamp(min=1)
