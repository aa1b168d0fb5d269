"""The public functions of logits: they check their arguments, then call the op and the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Reduction, Variant
from tdpo_ext.distributed import Shard, local_logits, shard_of
from tdpo_ext.loss import LossOptions, loss_from_stats
from tdpo_ext.outputs import TDPOOutput, TokenStats
from tdpo_ext.sequences import aligned_labels
from tdpo_ext.token_statistics import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["tdpo_loss", "token_stats"]


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    r"""log pi(y), log pi_ref(y) and KL(pi_ref || pi) per token, in one sweep over the vocabulary.

    For each row, with p = softmax(policy_logits), q = softmax(reference_logits) and label y:

        policy_logps = log p(y)    reference_logps = log q(y)
        forward_kl = sum_v q(v) log(q(v) / p(v))

    These are the per-token terms of the margin and of the sequential KL of TDPO (Zeng et al., 2024,
    arXiv 2404.11999). All are in nats. Nothing of size [..., V] is allocated in forward, and one
    gradient in backward.

    Args:
        policy_logits: ``[..., V]``, float32, bfloat16, float16 or float64; the last dimension
            contiguous, other strides free (a ``[:, :-1]`` slice is not copied).
        reference_logits: the same of the reference, of one shape, dtype and device with
            policy_logits, not requiring grad.
        labels: ``[...]`` int64 or int32, aligned with the logits (nothing is shifted).
        ignore_index: rows with this label are never read; their outputs and gradients are 0.
        inplace_backward: let the gradient overwrite ``policy_logits`` instead of allocating. A
            second backward then raises.
        process_group: the processes that share the vocabulary (tensor parallel). The logits are
            this process's part, all parts equally wide and in the order of ranks; labels are global
            ids, the same everywhere, and so are the results. DTensors sharded on the vocabulary are
            taken without it, of any width; results are plain tensors.

    Returns:
        ``TokenStats(policy_logps, reference_logps, forward_kl)``, each ``[...]``, float32 (float64
        for float64 logits). Differentiable once in ``policy_logits``, for any upstream gradients of
        ``policy_logps`` and ``forward_kl``; ``tdpo_ext.reference.token_stats`` twice.

    Raises:
        TypeError: a dtype that is not listed, or differing dtypes.
        ValueError: differing shapes or devices, a last dimension that is not contiguous, a
            reference that requires grad.
        IndexError: on the CPU, a label outside [0, V) that is not ``ignore_index``. On an
            accelerator, where looking would mean waiting, that token's outputs are NaN; and all are
            where the processes of ``process_group`` disagree on labels or parts, which on the CPU
            is a ValueError.
    """
    policy_logits, reference_logits, labels, shard = local_logits(
        policy_logits, reference_logits, labels, process_group=process_group
    )
    checks.check_logits(policy_logits, reference_logits)
    checks.check_labels("labels", labels, policy_logits)
    checks.check_ignore_index(ignore_index)
    shard = shard or shard_of(process_group, policy_logits.shape[-1])
    return _token_stats(
        policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
    )


def _token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    shard: Shard | None,
) -> TokenStats:
    """``token_stats`` for arguments that have been checked."""
    checks.check_not_transformed(policy_logits, reference_logits, labels)
    if inplace_backward and not torch.compiler.is_compiling():  # then the op itself checks
        checks.check_inplace_backward(policy_logits)
    return ops.token_stats(
        policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
    )


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
    process_group: ProcessGroup | None = None,
) -> TDPOOutput:
    r"""TDPO1, TDPO2 or DPO from the logits of policy and reference.

    With margin = sum_t log pi(y_t) - log pi_ref(y_t), dm = margin(chosen) - margin(rejected) and
    SeqKL = sum_t KL(pi_ref || pi) over the response's tokens (Zeng et al., 2024, arXiv 2404.11999):

        "tdpo1":  -log sigmoid(beta (dm - (SeqKL_rejected - SeqKL_chosen)))
        "tdpo2":  -log sigmoid(beta (dm - alpha (SeqKL_rejected - stop_grad(SeqKL_chosen))))

    "tdpo2" with alpha = 0 is DPO. A sequence whose every label is ignored has margin 0 and SeqKL 0.

    Args:
        policy_logits: ``[2B, T, V]``, the chosen sequences stacked on the rejected ones in the same
            order; or ``[total, V]`` together with ``cu_seqlens``. dtypes as ``token_stats``.
        reference_logits: the same of the reference model, not requiring grad.
        labels: ``[2B, T]`` or ``[total]`` int64 or int32, as the model saw them, prompt and padding
            replaced by ``ignore_index``; position t is scored against label t + 1 of its sequence.
        shift_labels: the same, already aligned with the logits. Give exactly one of the two.
        cu_seqlens: ``[2B + 1]`` int32 or int64, ascending from 0 to total: the boundaries of packed
            sequences.
        beta: strength of the KL constraint, positive.
        alpha: weight of the sequential KL in TDPO2, at least 0; 0 is DPO. TDPO1 ignores it.
        variant: "tdpo2" or "tdpo1".
        label_smoothing: probability, in [0, 0.5), that a preference is the wrong way round.
        average_log_prob: divide log-probabilities, margin and SeqKL by the sequence's kept tokens.
        reduction: "mean", "sum" or "none" over the B pairs.
        ignore_index: the label of tokens that do not count.
        inplace_backward: let the gradient overwrite ``policy_logits`` instead of allocating. A
            second backward then raises.
        process_group: as ``token_stats``.

    Returns:
        ``TDPOOutput``; only ``loss`` carries a gradient.

    Raises:
        TypeError: a dtype or an option of the wrong type.
        ValueError: shapes or devices that do not fit, an odd number of sequences, both or neither
            of labels and shift_labels, cu_seqlens that do not ascend from 0 to total (NaN losses on
            an accelerator), an unknown variant or reduction, an option outside its range, a tensor
            of the reference that requires grad.
        IndexError: on the CPU, a label outside [0, V) that is not ``ignore_index``. On an
            accelerator that token's numbers are NaN.
    """
    policy_logits, reference_logits, labels, shift_labels, shard = local_logits(
        policy_logits, reference_logits, labels, shift_labels, process_group=process_group
    )
    checks.check_logits(policy_logits, reference_logits)
    aligned = aligned_labels(
        "policy_logits",
        policy_logits,
        labels,
        shift_labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
    )
    options = LossOptions(
        beta, alpha, variant, label_smoothing, average_log_prob, reduction
    ).checked()
    shard = shard or shard_of(process_group, policy_logits.shape[-1])
    stats = _token_stats(
        policy_logits, reference_logits, aligned, ignore_index, inplace_backward, shard
    )
    return loss_from_stats(
        stats, aligned, options, cu_seqlens=cu_seqlens, ignore_index=ignore_index
    )
