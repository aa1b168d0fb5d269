"""The two sides that are compared: the library, and the usual formula in eager PyTorch.

Both return the same quantities: tensors by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

import tdpo_ext
from tdpo_ext.outputs import TokenDivergences, TokenStats
from tdpo_ext.parity.cases import HeadInputs, Inputs, upstream_of_divergences
from tdpo_ext.parity.wanted import DIVERGENCES

Quantities = dict[str, Tensor]


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it has that type."""
    return x if x.dtype == torch.float64 else x.float()


def eager_token_stats(policy: Tensor, reference: Tensor, labels: Tensor) -> TokenStats:
    """The formula as it is usually written, in float32 throughout (float64 for float64)."""
    ignored = labels == -100
    log_p = _wide(policy).masked_fill(ignored.unsqueeze(-1), 0).log_softmax(-1)
    log_q = _wide(reference).masked_fill(ignored.unsqueeze(-1), 0).log_softmax(-1)
    label = labels.masked_fill(ignored, 0).unsqueeze(-1)
    terms = (log_q.exp() * (log_q - log_p)).masked_fill(log_q == -torch.inf, 0)  # 0 log 0 = 0
    values = (log_p.gather(-1, label)[..., 0], log_q.gather(-1, label)[..., 0], terms.sum(-1))
    return TokenStats(*(x.masked_fill(ignored, 0) for x in values))


def _with_gradients(
    stats: TokenStats, leaves: dict[str, Tensor], grad_logps: Tensor, grad_kl: Tensor
) -> Quantities:
    outputs = (stats.policy_logps, stats.forward_kl)
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), (grad_logps, grad_kl))
    found = dict(zip(leaves, gradients, strict=True))
    return {**{name: x.detach() for name, x in stats._asdict().items()}, **found}


def from_logits(inputs: Inputs, *, eager: bool) -> Quantities:
    policy = inputs.policy.detach().requires_grad_()
    function = eager_token_stats if eager else tdpo_ext.token_stats
    stats = function(policy, inputs.reference, inputs.labels)
    return _with_gradients(stats, {"gradient": policy}, inputs.grad_logps, inputs.grad_kl)


def eager_divergences(policy: Tensor, reference: Tensor, labels: Tensor) -> TokenDivergences:
    ignored = labels == -100
    log_p = _wide(policy).masked_fill(ignored.unsqueeze(-1), 0).log_softmax(-1)
    log_q = _wide(reference).masked_fill(ignored.unsqueeze(-1), 0).log_softmax(-1)
    # 0 log 0 = 0, and its derivative too.
    finite = log_p.masked_fill(log_p == -torch.inf, 0)
    gaps = (finite - log_q).masked_fill(log_p == -torch.inf, 0)
    terms = (log_p.exp() * gaps, -log_p.exp() * finite, torch.special.entr(log_q.exp()))
    return TokenDivergences(
        **{
            name: x.sum(-1).masked_fill(ignored, 0)
            for name, x in zip(DIVERGENCES, terms, strict=True)
        }
    )


def divergences_from_logits(inputs: Inputs, *, eager: bool) -> Quantities:
    policy = inputs.policy.detach().requires_grad_()
    if eager:
        found = eager_divergences(policy, inputs.reference, inputs.labels)
    else:
        found = tdpo_ext.token_divergences(
            policy, inputs.reference, inputs.labels, outputs=DIVERGENCES
        )
    values = {name: getattr(found, name) for name in DIVERGENCES}
    differentiable = (values["reverse_kl"], values["policy_entropy"])
    (gradient,) = torch.autograd.grad(differentiable, policy, upstream_of_divergences(inputs))
    return {**{x: y.detach() for x, y in values.items()}, "gradient of divergences": gradient}


def from_heads(
    inputs: HeadInputs, *, eager: bool, chunk_bytes: int | None = None, as_run: bool = False
) -> Quantities:
    """``as_run``: eager PyTorch as people run it, with products in the operands' own type."""
    hidden = inputs.policy_hidden.detach().requires_grad_()
    weight = inputs.policy_weight.detach().requires_grad_()
    reference = (inputs.reference_hidden, inputs.reference_weight)
    if eager:
        blank = (inputs.labels == -100).unsqueeze(-1)
        widen = (lambda x: x) if as_run else _wide
        logits = [
            _wide(widen(h.masked_fill(blank, 0)) @ widen(w).T)
            for h, w in ((hidden, weight), reference)
        ]
        stats = eager_token_stats(logits[0], logits[1], inputs.labels)
    else:
        stats = tdpo_ext.linear_token_stats(
            hidden, weight, *reference, inputs.labels, chunk_bytes=chunk_bytes
        )
    leaves = {"gradient of hidden": hidden, "gradient of weight": weight}
    return _with_gradients(stats, leaves, inputs.grad_logps, inputs.grad_kl)
