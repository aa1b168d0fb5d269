"""IMDb sentences, a small GPT-2, a sentiment reward; then DPO and TDPO2 from the same start.

    python examples/sentiment [--seed N] [--output FOLDER] [--quick]

It needs no network and no model hub: the models are trained here. It takes about 5 minutes on two
free cores, 8 if they are busy.
"""

from __future__ import annotations

import os

# By default OpenMP's threads spin while they wait. On a busy machine a spinning thread occupies the
# core that the awaited one needs, and a step takes seconds. OpenMP reads this as torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from config import QUICK, Config
from data import (
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
from report import console, draw, print_closing, print_completions, print_table
from reward import SentimentReward
from training import Run, train_on_preferences
from transformers import GPT2LMHeadModel

import tdpo_ext


def main() -> None:
    began = time.perf_counter()
    config, output = parse_arguments()
    output.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: dict[str, float] = {}
    console.print(f"Device: {device}, {torch.get_num_threads()} CPU threads. {kernel_line(device)}")

    with stage("Learning the sentiment reward from the labels", seconds, "reward"):
        reviews, held_out = split_reviews(load_reviews(), config.held_out_share, config.seed)
        reward = SentimentReward(reviews, config.seed)
        accuracy = reward.accuracy(held_out)
    console.print(
        f"  held-out accuracy: {accuracy['sentence']:.1%} of single sentences (labelled as their "
        f"review is), {accuracy['review']:.1%} of reviews"
    )

    limits = config.shortest_sentence, config.longest_sentence
    sentences = plain_sentences(reviews, *limits)
    vocabulary = build_vocabulary(sentences, config.vocabulary_size)
    text = covered(sentences, vocabulary)[: config.sft_sentences]
    held_out_text = covered(plain_sentences(held_out, *limits), vocabulary)

    with stage(f"Training a GPT-2 on {len(text):,} sentences (SFT)", seconds, "sft"):
        reference, sft = train_reference(config, vocabulary, text, held_out_text, device)
    console.print(
        f"  {sft['parameters']:,} parameters; loss {sft['train_loss']:.2f} in the last epoch, "
        f"{sft['held_out_loss']:.2f} on held-out reviews (nats per token)"
    )

    with stage("Sampling preference pairs from it", seconds, "pairs"):
        pairs = sample_pairs(
            reference,
            prompts_of(text, vocabulary, config.prompt_words)[: config.pair_prompts],
            reward,
            vocabulary,
            completions=config.completions,
            max_tokens=config.max_tokens,
            smallest_gap=config.smallest_gap,
        )
    console.print(f"  {len(pairs):,} pairs whose rewards differ by {config.smallest_gap} or more")

    prompts = prompts_of(held_out_text, vocabulary, config.prompt_words)
    prompts = prompts[: config.evaluation_prompts]
    evaluator = Evaluator(reference, prompts, reward, vocabulary, config.max_tokens, config.seed)
    start = {"examples": 0.0, **evaluator(reference)}
    with stage("DPO and TDPO2: same start, same pairs, same batches", seconds, "preferences"):
        runs, policies = train_runs(config, reference, pairs, evaluator)

    completions = complete({"SFT start": reference, **policies}, evaluator)
    print_table(start, runs)
    print_completions(completions)
    print_closing(start, runs, config.steps, sft["parameters"])
    picture, numbers = output / "reward_and_kl.png", output / "results.json"
    draw(start, runs, str(picture))
    seconds["total"] = time.perf_counter() - began
    results = {
        "config": asdict(config),
        "device": device,
        "versions": versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "reward_accuracy": accuracy,
        "sft": sft,
        "pairs": len(pairs),
        "start": start,
        "runs": [asdict(run) for run in runs],
        "completions": completions,
    }
    numbers.write_text(json.dumps(results, indent=1), encoding="utf-8")
    console.print(f"\n{seconds['total']:.0f} seconds. Picture: {picture}", soft_wrap=True)
    console.print(f"Every number: {numbers}", soft_wrap=True)


def parse_arguments() -> tuple[Config, Path]:
    parser = argparse.ArgumentParser(description="DPO and TDPO2 on movie-review sentences.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--quick", action="store_true", help="all of it with small numbers: a test")
    arguments = parser.parse_args()
    config = Config(seed=arguments.seed)
    return (replace(config, **QUICK) if arguments.quick else config), arguments.output


@contextmanager
def stage(title: str, seconds: dict[str, float], key: str) -> Iterator[None]:
    """Print what is being done, and the time that it took."""
    console.print(f"[bold]{title}[/] ...")
    began = time.perf_counter()
    yield
    seconds[key] = time.perf_counter() - began
    console.print(f"  done in {seconds[key]:.0f} s")


def kernel_line(device: str) -> str:
    kernel = tdpo_ext.backends()[device]
    if not kernel["compiled"]:
        return f"The loss runs in plain PyTorch: {kernel['reason']}."
    return "The loss runs in tdpo_ext's compiled kernel."


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tdpo_ext": tdpo_ext.__version__,
    }


def train_reference(
    config: Config,
    vocabulary: Vocabulary,
    text: list[list[str]],
    held_out_text: list[list[str]],
    device: str,
) -> tuple[GPT2LMHeadModel, dict[str, float]]:
    """The SFT model, frozen. All runs start from it, and it is the reference of all."""
    positions = 2 + config.prompt_words + max(config.max_tokens, config.longest_sentence)
    model = build_model(vocabulary, config.width, config.layers, positions).to(device)
    train_loss = train_on_text(
        model,
        vocabulary.encode(text),
        epochs=config.sft_epochs,
        batch_size=config.sft_batch_size,
        learning_rate=config.sft_learning_rate,
    )
    model.eval().requires_grad_(False)
    return model, {
        "parameters": model.num_parameters(),
        "train_loss": train_loss,
        "held_out_loss": held_out_loss(model, vocabulary.encode(held_out_text[:1024])),
    }


def train_runs(
    config: Config, reference: GPT2LMHeadModel, pairs: PreferencePairs, evaluator: Evaluator
) -> tuple[list[Run], dict[str, GPT2LMHeadModel]]:
    """Train each method with each learning rate, since the rate is part of the comparison."""
    runs, policies = [], {}
    for method, alpha in (("DPO", 0.0), ("TDPO2", config.alpha)):
        for learning_rate in config.learning_rates:
            run = Run(method, alpha, learning_rate)
            policies[run.name] = train_on_preferences(
                run,
                reference,
                pairs,
                evaluator,
                beta=config.beta,
                steps=config.steps,
                batch_size=config.batch_size,
                evaluations=config.evaluations,
                seed=config.seed,
            )
            runs.append(run)
    return runs, policies


def complete(
    models: dict[str, GPT2LMHeadModel], evaluator: Evaluator
) -> dict[str, list[tuple[str, float]]]:
    """Each model's completions of the first six different held-out prompts, with their rewards."""
    first_seen: dict[tuple[int, ...], int] = {}
    for index, prompt in enumerate(evaluator.prompts.tolist()):
        first_seen.setdefault(tuple(prompt), index)
    rows = list(first_seen.values())[:6]
    shown = {}
    for name, model in models.items():
        tokens = evaluator.complete(model)[rows]
        texts = [evaluator.vocabulary.decode(row) for row in tokens]
        shown[name] = list(zip(texts, evaluator.rewards(tokens).tolist(), strict=True))
    return shown


if __name__ == "__main__":
    main()
