"""DPO and TDPO2 in a plain PyTorch loop. ``preference_step`` is the part to copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from preferences import PreferencePairs
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from tdpo_ext import TDPOLoss

Metrics = dict[str, float]


@dataclass
class Run:
    """One training run; ``training`` and ``evaluation`` hold a record per measurement."""

    method: str
    alpha: float
    learning_rate: float
    training: list[Metrics] = field(default_factory=list)
    evaluation: list[Metrics] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.method}, lr {self.learning_rate:.0e}".replace("e-0", "e-")


def preference_step(
    policy: GPT2LMHeadModel,
    reference: GPT2LMHeadModel,
    loss_function: TDPOLoss,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """One update on [chosen; rejected] sequences; labels are -100 on the prompt and the padding."""
    with torch.no_grad():
        reference_logits = reference(tokens).logits
    output = loss_function(policy(tokens).logits, reference_logits, labels)
    optimizer.zero_grad()
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return output.metrics()


def train_on_preferences(
    run: Run,
    reference: GPT2LMHeadModel,
    pairs: PreferencePairs,
    evaluate: Callable[[GPT2LMHeadModel], Metrics],
    *,
    loss_function: TDPOLoss,
    steps: int,
    batch_size: int,
    evaluate_at: Collection[int],
    seed: int,
) -> GPT2LMHeadModel:
    """Train a copy of the reference; all runs with one seed see the same batches.

    ``evaluate`` is called after each of the steps ``evaluate_at``.
    """
    policy = copy.deepcopy(reference).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.learning_rate, weight_decay=0.0)
    # The rate is constant after a warm-up, so that points along the curve are comparable.
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    order = torch.Generator().manual_seed(seed)

    for step in tqdm(range(1, steps + 1), desc=run.name, unit="step"):
        indices = torch.randint(len(pairs), (batch_size,), generator=order)
        tokens, labels = (tensor.to(policy.device) for tensor in pairs.batch(indices))
        metrics = preference_step(policy, reference, loss_function, optimizer, tokens, labels)
        warm_up.step()
        examples = float(step * batch_size)
        run.training.append({"examples": examples, **{k: v.item() for k, v in metrics.items()}})
        if step in evaluate_at:
            run.evaluation.append({"examples": examples, **evaluate(policy)})
            policy.train()
    return policy
