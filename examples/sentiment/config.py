"""The numbers of the demo, and the smaller ones of ``--quick``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    seed: int = 0
    reviews: int = 1_000_000  # at most
    held_out_share: float = 0.15
    vocabulary_size: int = 1024
    shortest_sentence: int = 5
    longest_sentence: int = 14
    width: int = 128
    layers: int = 4
    sft_sentences: int = 1_000_000  # at most
    sft_epochs: int = 6
    sft_batch_size: int = 64
    sft_learning_rate: float = 2e-3
    prompt_words: int = 3
    max_tokens: int = 14  # of a completion
    pair_prompts: int = 4096  # at most
    completions: int = 4  # of each prompt; the best and the worst make a pair
    smallest_gap: float = 0.2  # between the rewards of a pair
    beta: float = 0.1
    alpha: float = 0.5
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 5e-4)
    steps: int = 144
    batch_size: int = 32
    evaluations: int = 8
    evaluation_prompts: int = 512


QUICK = {
    "width": 64,
    "layers": 2,
    "sft_sentences": 2048,
    "sft_epochs": 1,
    "pair_prompts": 128,
    "learning_rates": (5e-4,),
    "steps": 8,
    "evaluations": 2,
    "evaluation_prompts": 64,
}
