"""What the study measures during training: the demo's figures, and others on fixed pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from data import IGNORE_INDEX, response_labels
from evaluation import Evaluator
from preferences import PreferencePairs
from torch import Tensor
from training import Metrics
from transformers import GPT2LMHeadModel

from tdpo_ext import TDPOLoss


@dataclass(frozen=True)
class Measure:
    evaluator: Evaluator
    pairs: PreferencePairs  # some of those that are trained on
    held_out_pairs: PreferencePairs

    @torch.no_grad()
    def __call__(self, policy: GPT2LMHeadModel) -> Metrics:
        if not all(weight.isfinite().all() for weight in policy.parameters()):
            return {}  # training has diverged, and nothing can be sampled
        tokens = self.evaluator.complete(policy)
        trained_on = pair_metrics(policy, self.evaluator.reference, self.pairs)
        held_out = pair_metrics(policy, self.evaluator.reference, self.held_out_pairs)
        return {
            **self.evaluator.measure(policy, tokens),
            "distinct_2": distinct_bigrams(tokens, self.evaluator.prompts.shape[1]),
            "seq_kl_chosen": trained_on["kl/chosen"],
            "seq_kl_rejected": trained_on["kl/rejected"],
            "accuracy": held_out["rewards/accuracies"],
        }


def pair_metrics(
    policy: GPT2LMHeadModel, reference: GPT2LMHeadModel, pairs: PreferencePairs
) -> Metrics:
    """Means over all of these pairs. The options of the loss do not change them."""
    tokens, labels = pairs.batch(torch.arange(len(pairs)))
    tokens, labels = tokens.to(policy.device), labels.to(policy.device)
    output = TDPOLoss()(policy(tokens).logits, reference(tokens).logits, labels)
    return {name: value.item() for name, value in output.metrics().items()}


def distinct_bigrams(tokens: Tensor, prompt_length: int) -> float:
    """Distinct pairs of neighbouring tokens in all completions, as a share of all such pairs."""
    labels = response_labels(tokens, prompt_length)
    kept = (labels[:, :-1] != IGNORE_INDEX) & (labels[:, 1:] != IGNORE_INDEX)
    bigrams = torch.stack([labels[:, :-1][kept], labels[:, 1:][kept]], dim=1)
    return len(bigrams.unique(dim=0)) / max(1, len(bigrams))


def curve_of(points: list[Metrics]) -> dict[str, list[float]]:
    """A list for each quantity; NaN where training had diverged."""
    names = [name for name in points[0] if name != "reward_standard_error"]
    return {name: [point.get(name, math.nan) for point in points] for name in names}
