"""The loss from logits in one call of the compiled core, and the same in plain PyTorch.

The core adds up the rows' statistics along their sequences and makes the pairs' losses from them
(``csrc/pair_loss.h``); the plain version is ``tdpo_ext.loss``. The public functions have checked
all arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Reduction, Variant
from tdpo_ext.loss import (
    LossOptions,
    kl_ratios,
    loss_from_stats,
    pair_difference,
    pair_slopes,
    sequence_terms,
)
from tdpo_ext.outputs import TokenStats
from tdpo_ext.sequences import align_labels, sequence_of_tokens
from tdpo_ext.token_statistics import fallback, kernels

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor]
PAIR_QUANTITIES = 9
"""The fields of ``TDPOOutput`` behind ``loss``."""


class Batch(NamedTuple):
    """The labels of a batch, and which rows of its logits form a sequence."""

    labels: Tensor
    """``[2B, T]``, or ``[total]`` with cu_seqlens."""
    shift: bool
    """Whether position t is scored against label t + 1 of its sequence, not against label t."""
    cu_seqlens: Tensor | None
    ignore_index: int

    @property
    def pairs(self) -> int:
        """The number of pairs, B."""
        bounds = self.cu_seqlens
        return (self.labels.shape[0] if bounds is None else bounds.shape[0] - 1) // 2

    def aligned(self) -> Tensor:
        if not self.shift:
            return self.labels
        return align_labels(self.labels, self.cu_seqlens, self.ignore_index)

    def sequences(self) -> kernels.Sequences:
        if self.cu_seqlens is None:
            return kernels.Sequences(2 * self.pairs, self.labels.shape[1], None, self.shift)
        bounds = kernels.contiguous_int64(self.cu_seqlens)
        return kernels.Sequences(2 * self.pairs, 0, bounds, self.shift)


def empty_outputs_of_stats(
    like: Tensor, batch: Batch, reduction: Reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """loss ``[]`` or ``[B]``, pairs ``[9, B]`` and slopes ``[2B]``."""
    dtype, pairs = fallback.accumulation_dtype(like), batch.pairs
    return (
        like.new_empty((pairs,) if reduction == "none" else (), dtype=dtype),
        like.new_empty((PAIR_QUANTITIES, pairs), dtype=dtype),
        like.new_empty((2 * pairs,), dtype=dtype),
    )


def empty_outputs(like: Tensor, batch: Batch, reduction: Reduction) -> LossOutputs:
    """Those of ``empty_outputs_of_stats``, and normalizers ``[..., 8]``."""
    outputs = empty_outputs_of_stats(like, batch, reduction)
    shape = (*batch.labels.shape, fallback.NORMALIZERS)
    return *outputs, like.new_empty(shape, dtype=outputs[0].dtype)


def forward(
    policy_logits: Tensor, reference_logits: Tensor, batch: Batch, options: LossOptions
) -> LossOutputs:
    """The loss, what ``TDPOOutput`` holds of each pair, and what backward needs.

    ``slopes`` holds the derivative of the loss by each sequence's sum of log p(y): of the loss of
    its pair for reduction "none". On the CPU a label outside the vocabulary raises IndexError, and
    bounds of sequences that do not ascend raise ValueError.
    """
    if not kernels.serves(policy_logits.device):
        return _plain_forward(policy_logits, reference_logits, batch, options)
    outputs = empty_outputs(policy_logits, batch, options.reduction)
    loss, pairs, slopes, normalizers = outputs
    labels = kernels.contiguous_int64(batch.labels)
    policy, reference = map(kernels.with_dense_rows, (policy_logits, reference_logits))
    sequences, ignore_index = batch.sequences(), batch.ignore_index
    work = kernels.core.LossForward(
        problem=kernels.problem_of(policy, reference, labels, ignore_index, sequences),
        options=_options(options),
        statistics=kernels.core.Outputs(
            policy_logps=0,
            reference_logps=0,
            forward_kl=0,
            normalizers=normalizers.data_ptr(),
            **kernels.NO_DIVERGENCES,
        ),
        slopes=slopes.data_ptr(),
        pairs=pairs.data_ptr(),
        loss=loss.data_ptr(),
    )
    bytes_of, device = "cuda_loss_workspace_bytes", policy.device
    refusal = kernels.run_over_logits("tdpo_loss_forward", device, work, bytes_of)
    if device.type == "cpu" and refusal != kernels.core.ALL_LABELS_VALID:
        raise _refusal(refusal, batch, policy.shape[-1])
    return outputs


def _options(options: LossOptions) -> Any:
    return kernels.core.LossOptions(
        beta=options.beta,
        alpha=options.alpha,
        label_smoothing=options.label_smoothing,
        tdpo1=options.variant == "tdpo1",
        average=options.average_log_prob,
        reduction=checks.REDUCTIONS.index(options.reduction),
    )


def _refusal(refusal: int, batch: Batch, vocabulary: int) -> Exception:
    """What the core has found wrong: the row of a label, or the bounds of the sequences."""
    if batch.cu_seqlens is not None and refusal == kernels.core.BOUNDS_NOT_USABLE:
        return checks.bounds_error(batch.cu_seqlens, batch.labels.numel())
    label = int(batch.labels.reshape(-1)[refusal + batch.shift])
    return checks.label_range_error(label, vocabulary, batch.ignore_index)


def forward_of_stats(
    stats: TokenStats, batch: Batch, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, pairs and slopes of ``forward``, from the statistics of rows."""
    if not kernels.serves(batch.labels.device):
        return _plain_forward_of_stats(stats, batch, options)
    outputs = empty_outputs_of_stats(stats.policy_logps, batch, options.reduction)
    loss, pairs, slopes = outputs
    logps, reference_logps, forward_kl = (x.contiguous() for x in stats)
    labels, sequences = kernels.contiguous_int64(batch.labels), batch.sequences()
    core = kernels.core
    nothing = core.Logits(data=0, rows=core.RowLayout(dims=0, sizes=(), strides=()))
    work = core.LossForward(
        problem=core.Problem(
            dtype=kernels.dtype_code(logps),
            rows=labels.numel(),
            vocabulary=0,
            ignore_index=batch.ignore_index,
            policy=nothing,
            reference=nothing,
            labels=labels.data_ptr(),
            shift=sequences.shift,
            sequences=kernels.sequences_of_core(sequences),
        ),
        options=_options(options),
        statistics=core.Outputs(
            policy_logps=logps.data_ptr(),
            reference_logps=reference_logps.data_ptr(),
            forward_kl=forward_kl.data_ptr(),
            normalizers=0,
            **kernels.NO_DIVERGENCES,
        ),
        slopes=slopes.data_ptr(),
        pairs=pairs.data_ptr(),
        loss=loss.data_ptr(),
    )
    bytes_of, device = "cuda_loss_finish_workspace_bytes", labels.device
    refusal = kernels.run_over_logits("tdpo_loss_finish", device, work, bytes_of)
    if device.type == "cpu" and refusal == core.BOUNDS_NOT_USABLE:
        raise _refusal(refusal, batch, 0)
    return outputs


def _plain_forward(
    policy_logits: Tensor, reference_logits: Tensor, batch: Batch, options: LossOptions
) -> LossOutputs:
    aligned = batch.aligned()
    *stats, normalizers = kernels.token_stats(
        policy_logits, reference_logits, aligned, batch.ignore_index
    )
    outputs = _plain_forward_of_stats(
        TokenStats(*stats), batch._replace(labels=aligned, shift=False), options
    )
    return *outputs, normalizers


def _plain_forward_of_stats(
    stats: TokenStats, batch: Batch, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    aligned = batch.aligned()
    output = loss_from_stats(
        stats,
        aligned,
        options,
        cu_seqlens=batch.cu_seqlens,
        ignore_index=batch.ignore_index,
    )
    terms = sequence_terms(
        stats,
        aligned,
        cu_seqlens=batch.cu_seqlens,
        average_log_prob=options.average_log_prob,
        ignore_index=batch.ignore_index,
    )
    difference = pair_difference(terms.margin, terms.kl, options.alpha, options.variant)
    of_pairs = pair_slopes(difference, options.beta, options.label_smoothing)
    if options.reduction == "mean":
        of_pairs = of_pairs / of_pairs.numel()
    slopes = torch.cat((of_pairs, -of_pairs))
    if terms.kept is not None:
        slopes = slopes / terms.kept
    # An op's outputs share no memory.
    return output.loss.clone(), torch.stack(output[1:]), slopes.to(difference.dtype)


def write_gradient(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    batch: Batch,
    normalizers: Tensor,
    slopes: Tensor,
    grad_loss: Tensor,
    alpha: float,
    variant: Variant,
) -> None:
    """The gradient of the policy's logits, from what ``forward`` returned and the upstream gradient
    of its loss. ``gradient`` may be the policy's logits."""
    ratios = kl_ratios(alpha, variant)
    if not kernels.serves(gradient.device):
        aligned = batch.aligned()
        fallback.backward(
            gradient,
            policy_logits,
            reference_logits,
            aligned,
            normalizers,
            *gradients_of_stats(aligned, batch.cu_seqlens, slopes, grad_loss, alpha, variant),
            batch.ignore_index,
        )
        return
    slopes, grad_loss = slopes.contiguous(), grad_loss.contiguous()
    upstream = kernels.core.Upstream(
        policy_logps=0,
        forward_kl=0,
        slopes=slopes.data_ptr(),
        loss=grad_loss.data_ptr(),
        loss_stride=grad_loss.dim(),
        chosen_kl_ratio=ratios[0],
        rejected_kl_ratio=ratios[1],
        **kernels.NO_DIVERGENCE_GRADIENTS,
    )
    tensors = policy_logits, reference_logits, batch.labels, normalizers
    kernels.run_backward(gradient, *tensors, upstream, batch.ignore_index, batch.sequences())


def gradients_of_stats(
    policy_logps: Tensor,
    cu_seqlens: Tensor | None,
    slopes: Tensor,
    grad_loss: Tensor,
    alpha: float,
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """The upstream gradients of each token's log p(y) and KL, of policy_logps' shape."""
    of_logps = slopes * (grad_loss.repeat(2) if grad_loss.dim() else grad_loss)
    of_kl = torch.cat(
        [
            of_side * ratio if ratio else torch.zeros_like(of_side)
            for of_side, ratio in zip(of_logps.chunk(2), kl_ratios(alpha, variant), strict=True)
        ]
    )
    if cu_seqlens is None:
        of_token = (x.unsqueeze(-1).expand(policy_logps.shape) for x in (of_logps, of_kl))
        grad_logps, grad_kl = (x.contiguous() for x in of_token)
        return grad_logps, grad_kl
    sequence = sequence_of_tokens(policy_logps, cu_seqlens, slopes.shape[0])
    return of_logps[sequence], of_kl[sequence]
