"""Inputs whose results are whole numbers without rounding, whatever the order of products and sums.

Logits are multiples of 1024, so that exp of any gap between two of them is 0 in every dtype: one
entry of a row has all of the probability. Log-probabilities, the KL and the gradients are then
small whole numbers that every dtype holds. Every implementation must find log p, and plain PyTorch
all of them, without any error. The kernels compute the KL and p - q from differences of policy and
reference, and may round them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 1024
"""exp(-1024) is 0 in float64."""


class Whole(NamedTuple):
    """Inputs and what must come out; float64, and whole numbers throughout."""

    policy: Tensor
    """``[N, V]`` logits."""
    reference: Tensor
    labels: Tensor
    upstream: Tensor
    """``[2, N]``, of log p and of the KL."""
    policy_logps: Tensor
    reference_logps: Tensor
    forward_kl: Tensor
    gradient: Tensor
    """``[N, V]``, of the policy's logits."""


def one_top(logits: Tensor) -> Tensor:
    """Where no entry shares its row's largest number with another."""
    return (logits == logits.amax(-1, keepdim=True)).sum(-1) == 1


def expected(policy: Tensor, reference: Tensor) -> Whole:
    rows, vocabulary = policy.shape
    labels = torch.randint(0, vocabulary, (rows,))
    upstream = torch.randint(-2, 3, (2, rows)).double()
    top, likely = policy.argmax(-1), reference.argmax(-1)
    labels[::3] = top[::3]

    def at(logits: Tensor, index: Tensor) -> Tensor:
        return (logits.gather(-1, index[:, None]) - logits.amax(-1, keepdim=True))[:, 0]

    def one_hot(index: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(index, vocabulary).double()

    g_m, g_k = upstream[..., None]
    return Whole(
        policy,
        reference,
        labels,
        upstream,
        at(policy, labels),
        at(reference, labels),
        -at(policy, likely),
        g_m * (one_hot(labels) - one_hot(top)) + g_k * (one_hot(top) - one_hot(likely)),
    )


def logits(rows: int, vocabulary: int) -> Whole:
    """Each second row has its largest entry at the same place in policy and reference."""
    policy, reference = torch.randint(-15, 15, (2, rows, vocabulary)).double()
    top = torch.randint(0, vocabulary, (2, rows))
    top[1, ::2] = top[0, ::2]
    policy[torch.arange(rows), top[0]] = reference[torch.arange(rows), top[1]] = 16
    return expected(GAP * policy, GAP * reference)


class Heads(NamedTuple):
    """Whole numbers whose products are the logits of ``whole``."""

    policy_hidden: Tensor
    policy_weight: Tensor
    reference_hidden: Tensor
    reference_weight: Tensor
    whole: Whole

    @property
    def hidden_gradient(self) -> Tensor:
        return self.whole.gradient @ self.policy_weight

    @property
    def weight_gradient(self) -> Tensor:
        return self.whole.gradient.mT @ self.policy_hidden


def heads(rows: int, width: int, vocabulary: int) -> Heads:
    """Hidden states of small numbers; of many those whose largest logit is alone in its row."""
    weights = [GAP * torch.randint(-1, 2, (vocabulary, width)).double() for _ in range(2)]
    # A column of its own for some entries makes ties rare.
    for weight in weights:
        weight[:, 0] = GAP * torch.randint(-4, 5, (vocabulary,)).double()
    hidden = [torch.randint(-2, 3, (40 * rows, width)).double() for _ in range(2)]
    alone = one_top(hidden[0] @ weights[0].mT) & one_top(hidden[1] @ weights[1].mT)
    kept = alone.nonzero()[:rows, 0]
    assert len(kept) == rows, f"only {len(kept)} rows without ties"
    policy, reference = (x[kept] for x in hidden)
    whole = expected(policy @ weights[0].mT, reference @ weights[1].mT)
    return Heads(policy, weights[0], reference, weights[1], whole)


def check(ours: Tensor, truth: Tensor, backend: str, quantity: str) -> None:
    error = (ours.double() - truth).abs().max()
    if backend == "fallback" or "logps" in quantity:
        assert error == 0, f"{quantity}: {error}"
    unit = torch.finfo(torch.float32).eps
    if ours.dtype == torch.float64:  # exp is rounded in proportion to the logits
        unit = 32 * GAP * torch.finfo(torch.float64).eps
    assert error <= 4 * unit * max(1.0, truth.abs().max().item()), f"{quantity}: {error}"
