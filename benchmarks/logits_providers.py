"""Statistics of tokens from logits to be timed: ours and the formula's. Also why no peer's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from formula import formula
from torch import Tensor

import tdpo_ext

# (policy, reference, labels) -> log p(y), KL
Provider = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

SKIPPED = {
    "TRL": "its divergence starts from hidden states: see the fused head",
    "Liger-Kernel": "its divergences are Triton kernels, which need a GPU",
}


def ours(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels)
    return stats.policy_logps, stats.forward_kl


def ours_in_place(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=True)
    return stats.policy_logps, stats.forward_kl


def providers() -> dict[str, Provider]:
    torch.compiler.reset()  # after too many recompilations torch.compile would run eager code
    return {
        "tdpo_ext": ours,
        "tdpo_ext in place": ours_in_place,
        "eager": formula,
        "torch.compile": torch.compile(formula),
    }
