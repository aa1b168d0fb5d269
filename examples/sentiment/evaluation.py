"""A policy on held-out prompts: its reward, its KL to the reference, and its entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from data import IGNORE_INDEX, Vocabulary, response_labels
from language_model import sample
from reward import SentimentReward
from torch import Tensor
from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class Evaluator:
    reference: GPT2LMHeadModel
    prompts: Tensor
    reward: SentimentReward
    vocabulary: Vocabulary
    max_tokens: int
    seed: int

    def complete(self, policy: GPT2LMHeadModel) -> Tensor:
        torch.manual_seed(self.seed)  # the same draws for every policy
        return sample(policy, self.prompts, max_tokens=self.max_tokens)

    def rewards(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.reward([self.vocabulary.decode(row) for row in tokens]))

    def __call__(self, policy: GPT2LMHeadModel) -> dict[str, float]:
        return self.measure(policy, self.complete(policy))

    @torch.no_grad()
    def measure(self, policy: GPT2LMHeadModel, tokens: Tensor) -> dict[str, float]:
        """The figures from ``tokens``, the policy's own completions."""
        rewards = self.rewards(tokens)
        kept = response_labels(tokens, self.prompts.shape[1])[:, 1:] != IGNORE_INDEX
        log_p = policy(tokens).logits[:, :-1].log_softmax(dim=-1)
        log_q = self.reference(tokens).logits[:, :-1].log_softmax(dim=-1)
        reverse_kl, entropy = reverse_kl_and_entropy(log_p, log_q)
        return {
            "reward": rewards.mean().item(),
            "reward_standard_error": (rewards.std() / len(rewards) ** 0.5).item(),
            "on_policy_kl": (reverse_kl * kept).sum(dim=1).mean().item(),
            "entropy_per_token": (entropy * kept).sum().item() / kept.sum().item(),
            "tokens_per_completion": kept.sum(dim=1).float().mean().item(),
        }


def reverse_kl_and_entropy(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(pi || pi_ref) and the entropy of pi at each state, over the whole vocabulary.

    Summed along sequences drawn from pi, the first is an unbiased estimate of the KL between the
    distributions of whole completions. Its variance is lower than that of the sum of log pi - log
    pi_ref.
    """
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(dim=-1), -(p * log_p).sum(dim=-1)
