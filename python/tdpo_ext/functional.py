"""The public functions that take logits: checks of the arguments, then the op, then the loss."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Divergence, Reduction, Variant
from tdpo_ext.distributed import IGNORED, Shard, local_logits, shard_of
from tdpo_ext.loss import LossOptions
from tdpo_ext.outputs import TDPOOutput, TokenDivergences, TokenStats
from tdpo_ext.sequences import given_labels, labels_of_mask
from tdpo_ext.token_statistics import divergence_ops, loss_ops, ops
from tdpo_ext.token_statistics.loss_kernels import Batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["tdpo_loss", "token_divergences", "token_stats"]


def token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenStats:
    """log pi(y), log pi_ref(y) and KL(pi_ref || pi) of each token, in one pass over the vocabulary.

    For each row, with p = softmax(policy_logits), q = softmax(reference_logits) and label y:

        policy_logps = log p(y)
        reference_logps = log q(y)
        forward_kl = sum_v q(v) log(q(v) / p(v))

    These are the terms, per token, of the margin and of the sequential KL of TDPO (Zeng et al.,
    2024, arXiv 2404.11999). Forward allocates nothing of the size of the logits; backward allocates
    one gradient.

    Args:
        policy_logits: ``[..., V]``, float32, bfloat16, float16 or float64. The last dimension must
            be contiguous; other strides are free (a ``[:, :-1]`` slice is not copied).
        reference_logits: ``[..., V]``, the shape, dtype and device of policy_logits, not requiring
            grad.
        labels: ``[...]``, int64 or int32, aligned with the logits (nothing is shifted).
        ignore_index: Rows with this label are never read; their outputs and gradients are 0.
        inplace_backward: Let the gradient overwrite ``policy_logits`` instead of allocating memory
            for it. A second backward then raises.
        process_group: The processes that share the vocabulary (tensor parallel). The logits are
            then this process's part of the vocabulary, where all parts are equally wide and follow
            the ranks. Labels are global ids, the same on all processes, and so are the results.
            DTensors sharded on the vocabulary need no process group, and their parts may differ in
            width; the results are plain tensors.

    Returns:
        ``TokenStats(policy_logps, reference_logps, forward_kl)``, each ``[...]``, in nats, float32
        (float64 for float64 logits). Differentiable once with respect to ``policy_logits``, for any
        upstream gradients of ``policy_logps`` and ``forward_kl``;
        ``tdpo_ext.reference.token_stats`` is differentiable twice.

    Raises:
        TypeError: A dtype is not listed, or dtypes differ.
        ValueError: Shapes or devices differ, a last dimension is not contiguous, or the reference
            requires grad. On the CPU also if the processes of ``process_group`` disagree on labels
            or parts; on an accelerator all outputs are NaN then.
        IndexError: On the CPU, a label outside [0, V) is not ``ignore_index``. On an accelerator,
            where the check would make the host wait, that token's outputs are NaN.
        RuntimeError: An argument is inside a torch.func transform or carries a forward-mode
            derivative; use ``tdpo_ext.reference``.
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


def _check_calls(
    inplace_backward: bool,
    policy_logits: Tensor,
    reference_logits: Tensor,
    *others: Tensor | None,
) -> None:
    """No transforms around the ops; logits that a gradient may overwrite if it is to."""
    checks.check_not_transformed(policy_logits, reference_logits, *others)
    if inplace_backward and not torch.compiler.is_compiling():  # the op checks once more
        checks.check_inplace_backward(policy_logits, reference_logits)


def _token_stats(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    shard: Shard | None,
) -> TokenStats:
    """``token_stats`` of arguments that have been checked."""
    _check_calls(inplace_backward, policy_logits, reference_logits, labels)
    return ops.token_stats(
        policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
    )


def token_divergences(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    outputs: Collection[Divergence] = ("forward_kl", "reverse_kl"),
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> TokenDivergences:
    """Divergences in both directions and entropies of each token, in one pass over the vocabulary.

    For each row, with p = softmax(policy_logits), q = softmax(reference_logits) and label y:

        policy_logps = log p(y)
        reference_logps = log q(y)
        forward_kl = KL(pi_ref || pi) = sum_v q(v) log(q(v) / p(v))
        reverse_kl = KL(pi || pi_ref) = sum_v p(v) log(p(v) / q(v))
        policy_entropy = -sum_v p(v) log p(v)
        reference_entropy = -sum_v q(v) log q(v)

    These are exact, over the whole vocabulary: the terms of distillation, whose teacher is the
    reference, of KL penalties and of entropy bonuses. Memory is that of ``token_stats``, which
    remains the faster call where log-probabilities and the forward KL are all that is needed.

    Args:
        policy_logits: ``[..., V]``, float32, bfloat16, float16 or float64. The last dimension must
            be contiguous; other strides are free (a ``[:, :-1]`` slice is not copied).
        reference_logits: ``[..., V]``, the shape, dtype and device of policy_logits, not requiring
            grad.
        labels: ``[...]``, int64 or int32, aligned with the logits (nothing is shifted). Needed for
            policy_logps and reference_logps only.
        mask: ``[...]``, bool, in place of labels: rows that are False are never read; their outputs
            and gradients are 0.
        outputs: The names of what is wanted, in any order.
        ignore_index: Rows with this label are never read; their outputs and gradients are 0.
        inplace_backward: Let the gradient overwrite ``policy_logits`` instead of allocating memory
            for it. A second backward then raises.
        process_group: The processes that share the vocabulary, as for ``token_stats``. A mask, like
            labels, is the same on all processes.

    Returns:
        ``TokenDivergences``, whose fields are ``[...]``, in nats, float32 (float64 for float64
        logits), or None where not asked for. Differentiable once with respect to ``policy_logits``,
        for any upstream gradients of ``policy_logps``, ``forward_kl``, ``reverse_kl`` and
        ``policy_entropy``; ``tdpo_ext.reference.token_divergences`` is differentiable twice.

        ``forward_kl`` is infinite where pi excludes an entry (with a logit of -inf) that pi_ref
        does not, ``reverse_kl`` where pi_ref excludes one that pi does not. The gradient of an
        infinite ``forward_kl`` is p - q all the same. An infinite ``reverse_kl`` has none: if its
        upstream gradient is not 0, that row's gradient is not finite, as in eager PyTorch. Entries
        that both exclude, and entropies of rows with excluded entries, are nothing special.

    Raises:
        TypeError: As ``token_stats``; or mask is not bool, or outputs is not a tuple of names.
        ValueError: As ``token_stats``; or an output is unknown or needs labels that are not given,
            or labels and mask are both given.
        IndexError: As ``token_stats``.
        RuntimeError: As ``token_stats``.
    """
    policy_logits, reference_logits, labels, mask, shard = local_logits(
        policy_logits, reference_logits, labels, mask, process_group=process_group
    )
    checks.check_logits(policy_logits, reference_logits)
    checks.check_ignore_index(ignore_index)
    checks.check_divergences(outputs, labels, mask, policy_logits)
    shard = shard or shard_of(process_group, policy_logits.shape[-1])
    given = labels if labels is not None else mask
    _check_calls(inplace_backward, policy_logits, reference_logits, given)
    if labels is not None and set(outputs) <= set(TokenStats._fields):
        stats = ops.token_stats(
            policy_logits, reference_logits, labels, ignore_index, inplace_backward, shard
        )
        found = stats._asdict()
    else:
        unlabelled = labels is None
        if labels is None:
            labels, ignore_index = labels_of_mask(mask, policy_logits), IGNORED
        options = ignore_index, unlabelled, inplace_backward, shard
        every = divergence_ops.token_divergences(policy_logits, reference_logits, labels, *options)
        found = every._asdict()
    return TokenDivergences(**{name: found[name] for name in outputs})


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
    """TDPO1, TDPO2 or DPO, from the logits of policy and reference.

    With these sums over the tokens of a response (Zeng et al., 2024, arXiv 2404.11999):

        margin = sum_t log pi(y_t) - log pi_ref(y_t)
        SeqKL = sum_t KL(pi_ref || pi)
        dm = margin(chosen) - margin(rejected)

    the loss of a pair is:

        "tdpo1":  -log sigmoid(beta (dm - (SeqKL(rejected) - SeqKL(chosen))))
        "tdpo2":  -log sigmoid(beta (dm - alpha (SeqKL(rejected) - stop_grad(SeqKL(chosen)))))

    "tdpo2" with alpha = 0 is DPO. A sequence whose labels are all ignored has margin 0 and SeqKL 0.

    Args:
        policy_logits: ``[2B, T, V]``, the chosen sequences stacked on the rejected ones in the same
            order; or ``[total, V]`` together with ``cu_seqlens``. float32, bfloat16, float16 or
            float64; the last dimension contiguous.
        reference_logits: The logits of the reference model, of the shape, dtype and device of
            policy_logits, not requiring grad.
        labels: ``[2B, T]`` or ``[total]``, int64 or int32, as the model saw them, with prompt and
            padding replaced by ``ignore_index``. Position t is scored against label t + 1 of its
            sequence.
        shift_labels: ``[2B, T]`` or ``[total]``, int64 or int32, already aligned with the logits.
            Give exactly one of labels and shift_labels.
        cu_seqlens: ``[2B + 1]``, int32 or int64, ascending from 0 to total: the boundaries of
            packed sequences.
        beta: Strength of the KL constraint, positive.
        alpha: Weight of the sequential KL in TDPO2, at least 0. TDPO1 ignores it.
        variant: "tdpo2" or "tdpo1".
        label_smoothing: Probability, in [0, 0.5), that the recorded preference is the reverse of
            the true one.
        average_log_prob: Divide log-probabilities, margin and SeqKL by the number of the sequence's
            tokens that are not ignored.
        reduction: "mean", "sum" or "none" over the B pairs.
        ignore_index: The label of tokens that do not count.
        inplace_backward: Let the gradient overwrite ``policy_logits`` instead of allocating memory
            for it. A second backward then raises.
        process_group: The processes that share the vocabulary, as for ``token_stats``.

    Returns:
        ``TDPOOutput``; only its ``loss`` carries a gradient.

    Raises:
        TypeError: As ``token_stats``; or an option is not a number.
        ValueError: As ``token_stats``; or the number of sequences is odd, both or neither of labels
            and shift_labels are given, cu_seqlens does not ascend from 0 to total (on an
            accelerator the losses are NaN instead), variant or reduction is unknown, or an option
            is outside its range.
        IndexError: As ``token_stats``.
        RuntimeError: As ``token_stats``.
    """
    policy_logits, reference_logits, labels, shift_labels, shard = local_logits(
        policy_logits, reference_logits, labels, shift_labels, process_group=process_group
    )
    checks.check_logits(policy_logits, reference_logits)
    given, shift = given_labels(
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
    batch = Batch(given, shift, cu_seqlens, ignore_index)
    if shard is None:
        _check_calls(inplace_backward, policy_logits, reference_logits, given, cu_seqlens)
        return loss_ops.tdpo_loss(policy_logits, reference_logits, batch, options, inplace_backward)
    aligned = batch.aligned()
    stats = _token_stats(
        policy_logits, reference_logits, aligned, ignore_index, inplace_backward, shard
    )
    return loss_ops.tdpo_loss_of_stats(
        stats, Batch(aligned, False, cu_seqlens, ignore_index), options
    )
