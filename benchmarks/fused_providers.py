"""Preference losses from hidden states to be timed: ours, the formula's, and those of peers.

Each takes a batch and returns a scalar loss. TRL and Liger-Kernel are timed if they are installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from formula import formula
from torch import Tensor

import tdpo_ext


class Batch(NamedTuple):
    policy_hidden: Tensor  # [2B, T, H]
    policy_weight: Tensor  # [V, H]
    reference_hidden: Tensor
    reference_weight: Tensor
    labels: Tensor  # [2B, T], aligned


Provider = Callable[[Batch], Tensor]


def make_batch(
    sequences: int,
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: str,
    ignored: float = 0.0,
) -> Batch:
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    hidden, weight = normal(sequences, tokens, width), normal(vocabulary, width) / width**0.5
    reference = hidden + 0.1 * normal(sequences, tokens, width)
    reference_weight = weight + 0.01 * normal(vocabulary, width) / width**0.5
    labels = torch.randint(0, vocabulary, (sequences, tokens), device=device)
    labels[:, : round(ignored * tokens)] = -100
    return Batch(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        reference.to(dtype),
        reference_weight.to(dtype),
        labels,
    )


def ours(batch: Batch, chunk_bytes: int | None = None) -> Tensor:
    return tdpo_ext.linear_tdpo_loss(
        *batch[:4], shift_labels=batch.labels, chunk_bytes=chunk_bytes
    ).loss


def ours_recomputed(batch: Batch, chunk_bytes: int | None = None) -> Tensor:
    """The path for any upstream gradients, and for pairs that do not fit chunk_bytes."""
    return tdpo_ext.linear_tdpo_loss(
        *batch[:4], shift_labels=batch.labels, reduction="none", chunk_bytes=chunk_bytes
    ).loss.mean()


def ours_tdpo1_recomputed(batch: Batch) -> Tensor:
    return tdpo_ext.linear_tdpo_loss(
        *batch[:4], shift_labels=batch.labels, reduction="none", variant="tdpo1"
    ).loss.mean()


def ours_frozen_head(batch: Batch, chunk_bytes: int | None = None) -> Tensor:
    frozen = batch._replace(policy_weight=batch.policy_weight.detach())
    return ours(frozen, chunk_bytes)


def loss_of(logps: Tensor, reference_logps: Tensor, kl: Tensor) -> Tensor:
    return tdpo_ext.pair_loss((logps - reference_logps).sum(-1), kl.sum(-1)).mean()


def formula_loss(logits: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """TDPO2 from logits by the formula; labels are aligned."""
    with torch.no_grad():
        log_q = reference.float().log_softmax(-1)
        label = labels.clamp(min=0).unsqueeze(-1)
        reference_logps = log_q.gather(-1, label).squeeze(-1) * (labels != -100)
        del log_q
    logps, kl = formula(logits, reference, labels)
    return loss_of(logps, reference_logps, kl)


def eager(batch: Batch) -> Tensor:
    """Both logits, then the formula."""
    logits = batch.policy_hidden @ batch.policy_weight.T
    with torch.no_grad():
        reference = batch.reference_hidden @ batch.reference_weight.T
    return formula_loss(logits, reference, batch.labels)


def trl_parts(batch: Batch) -> Tensor:
    """The cheapest TDPO from TRL's parts: its divergence, and its log-probabilities of both models,
    for the tokens that are not ignored."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    kept = batch.labels != -100
    hidden, reference = batch.policy_hidden[kept], batch.reference_hidden[kept]
    policy_head, reference_head = batch.policy_weight, batch.reference_weight
    labels = batch.labels[kept]
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, policy_head, None, reference, reference_head, None, 0.0
    )
    scored = [
        ChunkedLogProbFunction.apply(x, head, None, labels, 1.0, 8192, None, 1.0, ())[0]
        for x, head in ((hidden, policy_head), (reference, reference_head))
    ]

    def scattered(values: Tensor) -> Tensor:
        return torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept, values)

    return loss_of(*(scattered(values) for values in (*scored, kl)))


def liger_dpo(batch: Batch) -> Tensor:
    """DPO, which needs less: it has no KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(compiled=batch.labels.is_cuda)
    result = loss(
        batch.policy_weight,
        batch.policy_hidden,
        batch.labels,
        ref_input=batch.reference_hidden,
        ref_weight=batch.reference_weight,
    )
    return result[0] if isinstance(result, tuple) else result


PROVIDERS: dict[str, Provider] = {
    "tdpo_ext": ours,
    "tdpo_ext, recomputed": ours_recomputed,
    "tdpo_ext, TDPO1, recomputed": ours_tdpo1_recomputed,
    "tdpo_ext, frozen head": ours_frozen_head,
    "eager": eager,
}
if importlib.util.find_spec("trl"):
    PROVIDERS["TRL's parts"] = trl_parts
if importlib.util.find_spec("liger_kernel"):
    PROVIDERS["Liger DPO (no KL)"] = liger_dpo


def step(provider: Callable[..., Tensor], batch: Batch, **options: int | None) -> Tensor:
    """Forward and backward; the gradients are dropped."""
    loss = provider(batch, **options)
    frozen = provider is ours_frozen_head
    leaves = [batch.policy_hidden] if frozen else [batch.policy_hidden, batch.policy_weight]
    torch.autograd.grad(loss, leaves)
    return loss.detach()
