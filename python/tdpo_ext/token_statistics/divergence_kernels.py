"""Calls of the core, or of plain PyTorch, for divergences in both directions and entropies.

The kernels are those of ``kernels.py`` with more sums: records, normalizers and outputs are wider.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdpo_ext import checks
from tdpo_ext.distributed import IGNORED, Shard, gather_logits, gather_records
from tdpo_ext.token_statistics import fallback, kernels

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""policy_logps, reference_logps, forward_kl, reverse_kl, policy_entropy, reference_entropy
``[...]`` and normalizers ``[..., 12]``."""


def empty_outputs(like: Tensor, shape: Any) -> Outputs:
    dtype = fallback.accumulation_dtype(like)
    of_rows = (like.new_empty(shape, dtype=dtype) for _ in range(6))
    saved = like.new_empty((*shape, fallback.DIVERGENCE_NORMALIZERS), dtype=dtype)
    logps, reference_logps, forward_kl, reverse_kl, entropy, reference_entropy = of_rows
    return logps, reference_logps, forward_kl, reverse_kl, entropy, reference_entropy, saved


def _outputs(outputs: Outputs) -> Any:
    logps, reference_logps, forward_kl, reverse_kl, entropy, reference_entropy, saved = outputs
    return kernels.core.Outputs(
        policy_logps=logps.data_ptr(),
        reference_logps=reference_logps.data_ptr(),
        forward_kl=forward_kl.data_ptr(),
        normalizers=saved.data_ptr(),
        reverse_kl=reverse_kl.data_ptr(),
        policy_entropy=entropy.data_ptr(),
        reference_entropy=reference_entropy.data_ptr(),
    )


def forward(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    unlabelled: bool,
) -> Outputs:
    """The outputs of whole rows. ``unlabelled``: labels outside the vocabulary stand for none;
    otherwise they raise IndexError on the CPU."""
    device, vocabulary = policy_logits.device, policy_logits.shape[-1]
    if not kernels.serves(device):
        kernels.warn_of_fallback(device)
        if device.type == "cpu" and not unlabelled:
            checks.check_label_range(labels, vocabulary, ignore_index)
        return _fallback(policy_logits, reference_logits, labels, ignore_index, unlabelled)
    outputs = empty_outputs(policy_logits, labels.shape)
    labels = kernels.contiguous_int64(labels)
    policy, reference = map(kernels.with_dense_rows, (policy_logits, reference_logits))
    work = kernels.core.Forward(
        problem=kernels.problem_of(policy, reference, labels, ignore_index),
        outputs=_outputs(outputs),
        unlabelled=unlabelled,
    )
    wrong_label = kernels.run_over_logits(
        "token_stats_forward", device, work, "cuda_divergences_workspace_bytes"
    )
    if device.type == "cpu" and wrong_label >= 0:
        label = int(labels.view(-1)[wrong_label])
        raise checks.label_range_error(label, vocabulary, ignore_index)
    return outputs


def _fallback(*arguments: Any) -> Outputs:
    logps, reference_logps, *rest = fallback.divergences_forward(*arguments)
    forward_kl, reverse_kl, entropy, reference_entropy, saved = rest
    return logps, reference_logps, forward_kl, reverse_kl, entropy, reference_entropy, saved


def forward_of_shard(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    unlabelled: bool,
    *shard: Any,
) -> Outputs:
    """As ``forward``, of rows whose vocabulary is sharded over processes. Labels count from the
    first entry of the whole vocabulary."""
    device, of = policy_logits.device, Shard(*shard)
    if device.type == "cpu" and not unlabelled:
        checks.check_label_range(labels, of.total, ignore_index)
    labels = kernels.contiguous_int64(labels)
    if not kernels.serves(device):
        kernels.warn_of_fallback(device)
        whole = gather_logits(policy_logits, of), gather_logits(reference_logits, of)
        return _fallback(*whole, labels, ignore_index, unlabelled)
    records = kernels.empty_records(labels.numel(), policy_logits, divergences=True)
    own_labels = of.own_labels(labels, ignore_index)
    kernels.add_tile(records, policy_logits, reference_logits, own_labels)
    width = policy_logits.shape[-1]
    return finish_of_shards(records, labels, ignore_index, unlabelled, width, of)


def finish(
    records: Tensor, labels: Tensor, vocabulary: int, ignore_index: int, unlabelled: bool
) -> Outputs:
    """Outputs ``[rows]`` from records ``[sets, rows, 13]``; NaN where a label lies outside the
    vocabulary, unless rows are ``unlabelled``."""
    outputs = empty_outputs(records, labels.shape)
    of_core = _outputs(outputs)
    kernels.run_finish(records, labels, vocabulary, ignore_index, of_core, unlabelled)
    return outputs


def finish_of_shards(
    records: Tensor,
    labels: Tensor,
    ignore_index: int,
    unlabelled: bool,
    width: int,
    shard: Shard,
) -> Outputs:
    """Outputs ``[...]`` from this process's records ``[N, 13]`` and those of the others."""
    gathered, agreed = gather_records(records, labels, width, shard)
    with_header = kernels.labels_with_header(labels, ignore_index)
    outputs = finish(gathered, with_header, shard.total, ignore_index, unlabelled)
    logps, reference_logps, *rest = kernels.without_header(outputs, agreed, labels.shape)
    forward_kl, reverse_kl, entropy, reference_entropy, saved = rest
    return logps, reference_logps, forward_kl, reverse_kl, entropy, reference_entropy, saved


def write_gradient(
    gradient: Tensor,
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    normalizers: Tensor,
    grad_policy_logps: Tensor,
    grad_forward_kl: Tensor,
    grad_reverse_kl: Tensor,
    grad_policy_entropy: Tensor,
    ignore_index: int = IGNORED,
) -> None:
    """The gradient of whole rows, or of a tile, from whose first column labels then count:

        dz = g_m (onehot(y) - p) + g_k (p - q)
             + g_r p (log p - log q - KL(p || q)) - g_H p (log p + H)

    ``gradient`` has the logits' dtype and may be the policy's logits or the reference's.
    """
    of_rows = grad_policy_logps, grad_forward_kl, grad_reverse_kl, grad_policy_entropy
    if not kernels.serves(gradient.device):
        arguments = (labels, normalizers, *of_rows, ignore_index)
        fallback.divergences_backward(gradient, policy_logits, reference_logits, *arguments)
        return
    # Upstream gradients are often expanded scalars, whose rows have no addresses of their own.
    logps, forward_kl, reverse_kl, entropy = (x.contiguous() for x in of_rows)
    upstream = kernels.core.Upstream(
        policy_logps=logps.data_ptr(),
        forward_kl=forward_kl.data_ptr(),
        **kernels.NO_PAIRS,
        reverse_kl=reverse_kl.data_ptr(),
        policy_entropy=entropy.data_ptr(),
    )
    tensors = policy_logits, reference_logits, labels, normalizers
    kernels.run_backward(gradient, *tensors, upstream, ignore_index)
