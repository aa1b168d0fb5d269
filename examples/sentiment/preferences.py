"""Preference pairs: of several completions of a prompt, that with the best and the worst reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from data import Vocabulary, response_labels
from language_model import sample
from reward import SentimentReward
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class PreferencePairs:
    """Row i of ``chosen`` is preferred to row i of ``rejected``; they share their prompt."""

    chosen: Tensor
    rejected: Tensor
    prompt_length: int

    def __len__(self) -> int:
        return len(self.chosen)

    def first(self, number: int) -> PreferencePairs:
        return PreferencePairs(self.chosen[:number], self.rejected[:number], self.prompt_length)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels, the chosen sequences stacked on the rejected ones: [2B, T]."""
        tokens = torch.cat([self.chosen[indices], self.rejected[indices]])
        return tokens, response_labels(tokens, self.prompt_length)


def sample_pairs(
    model: GPT2LMHeadModel,
    prompts: Tensor,
    reward: SentimentReward,
    vocabulary: Vocabulary,
    *,
    completions: int,
    max_tokens: int,
    smallest_gap: float,
) -> PreferencePairs:
    """Pairs whose rewards differ by at least ``smallest_gap``; the other prompts are dropped."""
    chosen, rejected = [], []
    for some in tqdm(prompts.split(256), desc="Sampling pairs", unit="batch"):
        tokens = sample(model, some.repeat_interleave(completions, dim=0), max_tokens=max_tokens)
        rewards = torch.from_numpy(reward([vocabulary.decode(row) for row in tokens]))
        rewards = rewards.view(len(some), completions)
        tokens = tokens.view(len(some), completions, -1)
        row = torch.arange(len(some))
        best, worst = rewards.argmax(dim=1), rewards.argmin(dim=1)
        clear = rewards[row, best] - rewards[row, worst] >= smallest_gap
        chosen.append(tokens[row, best][clear])
        rejected.append(tokens[row, worst][clear])
    return PreferencePairs(torch.cat(chosen), torch.cat(rejected), prompts.shape[1])
