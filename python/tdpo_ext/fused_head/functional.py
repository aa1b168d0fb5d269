"""The public functions that take hidden states and heads: checks, choice of a path, the loss."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.checks import Divergence, Reduction, Side, Variant
from tdpo_ext.distributed import IGNORED, Shard, local_head, local_labels, shard_of
from tdpo_ext.fused_head import ops
from tdpo_ext.fused_head.ops import Heads, Options
from tdpo_ext.fused_head.pairs import Batch, kl_ratio_of_tokens
from tdpo_ext.fused_head.problem import default_chunk_bytes, is_captured
from tdpo_ext.fused_head.products import accumulation_dtype
from tdpo_ext.fused_head.tiles import costs, pairs_that_fit
from tdpo_ext.loss import LossOptions
from tdpo_ext.outputs import TDPOOutput, TokenDivergences, TokenStats
from tdpo_ext.sequences import aligned_labels, labels_of_mask
from tdpo_ext.token_statistics import loss_kernels, loss_ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_tdpo_loss", "linear_token_divergences", "linear_token_stats"]


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
    """``token_stats`` from hidden states and the heads' weights, without all logits in memory.

    The logits of policy and reference, with the hidden states h, weight W and bias b of each, are:

        scale (h W^T + b)                               without a softcap
        softcap tanh(scale (h W^T + b) / softcap)       with one

    They are made in float32 (float64 for float64), tile by tile: some tokens by some vocabulary
    entries at a time. From them log p(y), log q(y) and KL(q || p) are computed as ``token_stats``
    defines them (Zeng et al., 2024, arXiv 2404.11999).

    Args:
        policy_hidden: ``[..., H]``, float32, bfloat16, float16 or float64: the input of the
            policy's head.
        policy_weight: ``[V, H]``, of the dtype of policy_hidden. Under autocast, hidden states,
            weights and biases that are not float64 are cast to autocast's dtype first, and may
            differ in dtype.
        reference_hidden: ``[..., H_ref]``, of any of these dtypes (float64 if and only if
            policy_hidden is), not requiring grad.
        reference_weight: ``[V, H_ref]``, of the dtype of reference_hidden, not requiring grad.
        labels: ``[...]``, int64 or int32, aligned with the hidden states (nothing is shifted).
        policy_bias: ``[V]``, of the dtype of policy_hidden, or None.
        reference_bias: ``[V]``, of the dtype of reference_hidden, not requiring grad, or None.
        logit_scale: Factor of the policy's logits, as above, finite.
        logit_softcap: Softcap of the policy's logits, as above, positive; None: no softcap.
        reference_logit_scale: Factor of the reference's logits; None: the policy's.
        reference_logit_softcap: Softcap of the reference's logits; None: the policy's. If the
            policy has a softcap and the reference none, give a very large one: 2.0**20 leaves
            float32 logits as they are, 2.0**30 those of float64 up to their rounding.
        ignore_index: Tokens with this label are left out before the first product. They cost
            nothing, and their outputs and gradients are 0.
        chunk_bytes: Scratch memory, in bytes, beyond inputs, outputs and gradients. None: 256 MiB;
            on CUDA a 32nd of the GPU's memory, between 256 MiB and 2 GiB. It changes results by
            rounding alone.
        process_group: The processes that share the vocabulary (tensor parallel). Weights and biases
            are then this process's rows, where all parts are equally wide and follow the ranks.
            Hidden states and labels (global ids) are the same on all processes, and so are the
            results and the gradient of policy_hidden. Weights that are DTensors sharded on
            dimension 0 need no process group, and their parts may differ in width; the hidden
            states must then be DTensors replicated over the same mesh.

    Returns:
        ``TokenStats(policy_logps, reference_logps, forward_kl)``, each ``[...]``, in nats, float32
        (float64 for float64). Differentiable once with respect to those of policy_hidden,
        policy_weight and policy_bias that require grad, for any upstream gradients of policy_logps
        and forward_kl; ``tdpo_ext.reference.linear_token_stats`` is differentiable twice.

    Raises:
        TypeError: A dtype is not listed, or dtypes differ.
        ValueError: Shapes or devices differ, an option is outside its range, or a tensor of the
            reference requires grad. On the CPU also if the processes of ``process_group`` disagree
            on labels or parts; on an accelerator all outputs are NaN then.
        IndexError: On the CPU, a label outside [0, V) is not ``ignore_index``. On an accelerator
            that token's outputs are NaN.
        RuntimeError: An argument is inside a torch.func transform or carries a forward-mode
            derivative; use ``tdpo_ext.reference``.
    """
    labels = local_labels(labels, policy_weight)
    heads, options = _checked(
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
        (logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap),
        ignore_index,
        chunk_bytes,
        process_group,
    )
    checks.check_labels("labels", labels, policy_hidden)
    stats = ops.recompute(flat(heads, labels), options)
    return TokenStats(*(values.view(labels.shape) for values in stats))


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
    process_group: ProcessGroup | None = None,
) -> TokenDivergences:
    """``token_divergences`` from hidden states and heads' weights, without all logits in memory.

    The logits are those of ``linear_token_stats``; forward_kl = KL(pi_ref || pi), reverse_kl =
    KL(pi || pi_ref), the entropies and the log-probabilities are those of ``token_divergences``.
    All come from one pass: it costs no more products than ``linear_token_stats``. As a distillation
    loss, the teacher is the reference; its hidden size may be another.

    Args:
        policy_hidden: ``[..., H]``, see ``linear_token_stats``.
        policy_weight: ``[V, H]``, see ``linear_token_stats``.
        reference_hidden: ``[..., H_ref]``, not requiring grad, see ``linear_token_stats``.
        reference_weight: ``[V, H_ref]``, not requiring grad, see ``linear_token_stats``.
        labels: ``[...]``, int64 or int32, aligned with the hidden states (nothing is shifted).
            Needed for policy_logps and reference_logps only.
        mask: ``[...]``, bool, in place of labels: tokens that are False are left out before the
            first product, and their outputs and gradients are 0.
        outputs: The names of what is wanted, in any order.
        policy_bias: ``[V]`` or None.
        reference_bias: ``[V]`` or None, not requiring grad.
        logit_scale: Factor of the policy's logits, see ``linear_token_stats``.
        logit_softcap: Softcap of the policy's logits, see ``linear_token_stats``; None: none.
        reference_logit_scale: Factor of the reference's logits; None: the policy's.
        reference_logit_softcap: Softcap of the reference's logits; None: the policy's. For no
            softcap beside a policy with one see ``linear_token_stats``.
        ignore_index: Tokens with this label are left out before the first product, and their
            outputs and gradients are 0.
        chunk_bytes: Scratch memory, in bytes, see ``linear_token_stats``.
        process_group: The processes that share the vocabulary, see ``linear_token_stats``. A mask,
            like labels, is the same on all processes.

    Returns:
        ``TokenDivergences``, whose fields are ``[...]``, in nats, float32 (float64 for float64), or
        None where not asked for. Differentiable once with respect to those of policy_hidden,
        policy_weight and policy_bias that require grad, for any upstream gradients of policy_logps,
        forward_kl, reverse_kl and policy_entropy; infinite divergences are as in
        ``token_divergences``. ``tdpo_ext.reference.linear_token_divergences`` is differentiable
        twice.

    Raises:
        TypeError: As ``linear_token_stats`` and ``token_divergences``.
        ValueError: As ``linear_token_stats`` and ``token_divergences``.
        IndexError: As ``linear_token_stats``.
        RuntimeError: As ``linear_token_stats``.
    """
    labels, mask = (local_labels(x, policy_weight) for x in (labels, mask))
    heads, options = _checked(
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
        (logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap),
        ignore_index,
        chunk_bytes,
        process_group,
    )
    checks.check_divergences(outputs, labels, mask, policy_hidden)
    if labels is not None and set(outputs) <= set(TokenStats._fields):
        found = ops.recompute(flat(heads, labels), options)._asdict()
    else:
        unlabelled = labels is None
        if labels is None:
            labels = labels_of_mask(mask, policy_hidden)
            options = options._replace(ignore_index=IGNORED)
        inputs = flat(heads, labels)
        found = ops.recompute_divergences(inputs, options, unlabelled)._asdict()
    return TokenDivergences(**{name: found[name].view(labels.shape) for name in outputs})


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
    process_group: ProcessGroup | None = None,
) -> TDPOOutput:
    """``tdpo_loss`` from hidden states and the heads' weights, without all logits in memory.

    The loss is that of ``tdpo_loss``, the logits are those of ``linear_token_stats``.

    Args:
        policy_hidden: ``[2B, T, H]``, the chosen sequences stacked on the rejected ones in the same
            order; or ``[total, H]`` together with ``cu_seqlens``. float32, bfloat16, float16 or
            float64.
        policy_weight: ``[V, H]``, see ``linear_token_stats``.
        reference_hidden: ``[2B, T, H_ref]`` or ``[total, H_ref]``, see ``linear_token_stats``.
        reference_weight: ``[V, H_ref]``, see ``linear_token_stats``.
        labels: ``[2B, T]`` or ``[total]``, int64 or int32, as the model saw them, see
            ``tdpo_loss``.
        shift_labels: ``[2B, T]`` or ``[total]``, int64 or int32, already aligned with the hidden
            states. Give exactly one of labels and shift_labels.
        cu_seqlens: ``[2B + 1]``, int32 or int64, the boundaries of packed sequences, see
            ``tdpo_loss``.
        policy_bias: ``[V]`` or None.
        reference_bias: ``[V]`` or None, not requiring grad.
        logit_scale: Factor of the policy's logits, see ``linear_token_stats``.
        logit_softcap: Softcap of the policy's logits, see ``linear_token_stats``; None: none.
        reference_logit_scale: Factor of the reference's logits; None: the policy's.
        reference_logit_softcap: Softcap of the reference's logits; None: the policy's. For no
            softcap beside a policy with one see ``linear_token_stats``.
        beta: Strength of the KL constraint, positive.
        alpha: Weight of the sequential KL in TDPO2, at least 0; 0 is DPO. TDPO1 ignores it.
        variant: "tdpo2" or "tdpo1".
        label_smoothing: Probability, in [0, 0.5), that the recorded preference is the reverse of
            the true one.
        average_log_prob: Divide log-probabilities, margin and SeqKL by the number of the sequence's
            tokens that are not ignored.
        reduction: "mean", "sum" or "none" over the B pairs.
        ignore_index: The label of tokens that do not count; they cost nothing.
        chunk_bytes: Scratch memory, in bytes, see ``linear_token_stats``. For a trained head it
            decides whether backward makes the logits once more: it does not if a whole pair fits,
            unless reduction is "none" or a CUDA graph is being captured. For a frozen head it never
            does; if the vocabulary is sharded it always does. For bfloat16 and float16 heads on
            CUDA a pair takes 2 bytes a logit, and 8 for a group of its rows; elsewhere 8 bytes a
            logit (docs/fused-head.md, "Three paths to the gradients").
        process_group: The processes that share the vocabulary, see ``linear_token_stats``.

    Returns:
        ``TDPOOutput``; only its ``loss`` carries a gradient, to policy_hidden, policy_weight and
        policy_bias. If forward has made the gradients of whole pairs of a float32 or float64 head,
        backward scales them in place, and a second backward through the same graph raises;
        ``reduction="none"`` allows it.

    Raises:
        TypeError: As ``tdpo_loss`` and ``linear_token_stats``.
        ValueError: As ``tdpo_loss`` and ``linear_token_stats``.
        IndexError: As ``linear_token_stats``.
        RuntimeError: As ``linear_token_stats``.
    """
    labels, shift_labels = (local_labels(x, policy_weight) for x in (labels, shift_labels))
    heads, options = _checked(
        (policy_hidden, policy_weight, policy_bias),
        (reference_hidden, reference_weight, reference_bias),
        (logit_scale, logit_softcap, reference_logit_scale, reference_logit_softcap),
        ignore_index,
        chunk_bytes,
        process_group,
    )
    aligned = aligned_labels(
        "policy_hidden",
        heads[0][0],
        labels,
        shift_labels,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
    )
    loss = LossOptions(beta, alpha, variant, label_smoothing, average_log_prob, reduction).checked()
    sequences = aligned.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _loss(flat(heads, aligned), options, aligned, Batch(cu_seqlens, sequences), loss)


def _loss(
    inputs: Heads, options: Options, aligned: Tensor, batch: Batch, loss: LossOptions
) -> TDPOOutput:
    """The loss, by the path that costs least (see ``tdpo_ext.fused_head``)."""

    def output_of(stats: TokenStats) -> TDPOOutput:
        shaped = TokenStats(*(values.view(aligned.shape) for values in stats))
        of_labels = loss_kernels.Batch(aligned, False, batch.cu_seqlens, options.ignore_index)
        return loss_ops.tdpo_loss_of_stats(shaped, of_labels, loss)

    wanted = inputs.wanted
    if options.shard is not None:
        return output_of(ops.recompute(inputs, options))
    if wanted.hidden and not wanted.weight and not wanted.bias:
        ratio = kl_ratio_of_tokens(
            batch.sequence_of_tokens(inputs.labels),
            batch.pairs,
            loss.alpha,
            loss.variant,
            accumulation_dtype(inputs.policy_hidden.dtype),
        )
        return output_of(ops.with_direction(inputs, options, ratio))
    pairs_at_once = _pairs_at_once(inputs, options, batch)
    if any(wanted) and loss.reduction != "none" and pairs_at_once:
        results = torch.ops.tdpo_ext.linear_tdpo_gradients(
            *inputs.detached(), *batch, *options, *loss, pairs_at_once, list(wanted)
        )
        output = output_of(TokenStats(*results[:3]))
        return output._replace(loss=ops.with_gradients(output.loss, inputs, results[3:], wanted))
    return output_of(ops.recompute(inputs, options))


def _checked(
    policy: Side,
    reference: Side,
    logits: tuple[float, float | None, float | None, float | None],
    ignore_index: int,
    chunk_bytes: int | None,
    process_group: ProcessGroup | None,
) -> tuple[tuple[Side, Side], Options]:
    """Both heads (this process's parts, if they are sharded) and the options, checked."""
    checks.check_ignore_index(ignore_index)
    checks.check_chunk_bytes(chunk_bytes)
    policy, reference, shard = _own_heads(_autocast(policy), _autocast(reference), process_group)
    checks.check_not_transformed(*policy, *reference)
    bytes_at_once = default_chunk_bytes(policy[0].device) if chunk_bytes is None else chunk_bytes
    sharded = ("", 0, 0) if shard is None else shard
    options = Options(*checks.logit_options(*logits), ignore_index, bytes_at_once, *sharded)
    return (policy, reference), options


def _own_heads(
    policy: Side, reference: Side, process_group: ProcessGroup | None
) -> tuple[Side, Side, Shard | None]:
    """The two heads, or this process's parts of sharded ones, checked against each other."""
    policy, shard = local_head("policy", *policy, process_group)
    reference, shard_of_reference = local_head("reference", *reference, process_group)
    if shard != shard_of_reference:
        raise ValueError(
            "policy_weight and reference_weight must be DTensors of one vocabulary, sharded over "
            f"the same processes, or both plain tensors, got {shard} and {shard_of_reference}"
        )
    checks.check_heads(policy, reference)
    return policy, reference, shard or shard_of(process_group, policy[1].shape[0])


def _autocast(side: Side) -> Side:
    """Cast the operands to autocast's dtype where it is on, as torch.nn.functional.linear does."""
    device = side[0].device.type if isinstance(side[0], Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return side
    dtype = torch.get_autocast_dtype(device)
    hidden, weight, bias = (
        x.to(dtype) if isinstance(x, Tensor) and x.dtype != torch.float64 else x for x in side
    )
    assert hidden is not None
    assert weight is not None
    return hidden, weight, bias


def flat(heads: tuple[Side, Side], labels: Tensor) -> Heads:
    """Both heads and the labels, with all tokens in one dimension."""
    (hidden, weight, bias), (reference_hidden, reference_weight, reference_bias) = heads
    return Heads(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        reference_hidden.reshape(-1, reference_hidden.shape[-1]),
        reference_weight,
        reference_bias,
        labels.reshape(-1),
    )


def _pairs_at_once(heads: Heads, options: Options, batch: Batch) -> int:
    """How many pairs fit ``chunk_bytes`` at a time if no token is ignored; 0 if not even one does.

    The host does not know the lengths of packed sequences, so with these all pairs must fit.
    """
    if batch.sequences == 0 or is_captured(heads.labels):
        return 0
    packed = batch.cu_seqlens is not None
    problem = ops.problem_of(heads, options)
    tokens = heads.labels.numel() if packed else 2 * heads.labels.numel() // batch.sequences
    cost = costs(problem.heads, tiles=2, gathers=True, gradients=True)
    fitting = pairs_that_fit(cost, max(1, tokens), problem.policy.vocabulary, problem.chunk_bytes)
    if packed:
        return batch.pairs if fitting else 0
    return min(fitting, batch.pairs)
