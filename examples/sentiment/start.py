"""The steps before training on preferences: reward, text, SFT model, pairs, and held-out prompts.

The demo takes these steps once and prints something about each; the study takes them for each seed.
"""

from __future__ import annotations

from dataclasses import dataclass

from config import Config
from data import (
    Review,
    Vocabulary,
    build_vocabulary,
    covered,
    load_reviews,
    plain_sentences,
    prompts_of,
    split_reviews,
)
from evaluation import Evaluator
from language_model import build_model, held_out_loss, train_on_text
from preferences import PreferencePairs, sample_pairs
from reward import SentimentReward
from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class Text:
    vocabulary: Vocabulary
    sentences: list[list[str]]
    held_out: list[list[str]]


def learn_reward(config: Config) -> tuple[SentimentReward, list[Review], list[Review]]:
    """The reward, the reviews that it was trained on, and those held out."""
    reviews, held_out = split_reviews(load_reviews(), config.held_out_share, config.seed)
    reviews, held_out = reviews[: config.reviews], held_out[: config.reviews]
    return SentimentReward(reviews, config.seed), reviews, held_out


def choose_text(config: Config, reviews: list[Review], held_out: list[Review]) -> Text:
    limits = config.shortest_sentence, config.longest_sentence
    sentences = plain_sentences(reviews, *limits)
    vocabulary = build_vocabulary(sentences, config.vocabulary_size)
    return Text(
        vocabulary,
        covered(sentences, vocabulary)[: config.sft_sentences],
        covered(plain_sentences(held_out, *limits), vocabulary),
    )


def train_reference(
    config: Config, text: Text, device: str
) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """The SFT model, frozen. All runs start from it, and it is the reference of all."""
    positions = 2 + config.prompt_words + max(config.max_tokens, config.longest_sentence)
    model = build_model(text.vocabulary, config.width, config.layers, positions).to(device)
    train_loss = train_on_text(
        model,
        text.vocabulary.encode(text.sentences),
        epochs=config.sft_epochs,
        batch_size=config.sft_batch_size,
        learning_rate=config.sft_learning_rate,
    )
    model.eval().requires_grad_(False)
    return model, {
        "parameters": model.num_parameters(),
        "train_loss": train_loss,
        "held_out_loss": held_out_loss(model, text.vocabulary.encode(text.held_out[:1024])),
    }


def make_pairs(
    config: Config,
    reference: GPT2LMHeadModel,
    reward: SentimentReward,
    vocabulary: Vocabulary,
    sentences: list[list[str]],
    prompts: int,
) -> PreferencePairs:
    """Pairs from at most ``prompts`` prompts, which are beginnings of these sentences."""
    return sample_pairs(
        reference,
        prompts_of(sentences, vocabulary, config.prompt_words)[:prompts],
        reward,
        vocabulary,
        completions=config.completions,
        max_tokens=config.max_tokens,
        smallest_gap=config.smallest_gap,
    )


def make_evaluator(
    config: Config, reference: GPT2LMHeadModel, reward: SentimentReward, text: Text
) -> Evaluator:
    prompts = prompts_of(text.held_out, text.vocabulary, config.prompt_words)
    prompts = prompts[: config.evaluation_prompts]
    return Evaluator(reference, prompts, reward, text.vocabulary, config.max_tokens, config.seed)
