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
from evaluation import Evaluator
from preferences import PreferencePairs
from report import console, draw, print_closing, print_completions, print_table
from start import choose_text, learn_reward, make_evaluator, make_pairs, train_reference
from training import Run, train_on_preferences
from transformers import GPT2LMHeadModel

import tdpo_ext
from tdpo_ext import TDPOLoss


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
        reward, reviews, held_out = learn_reward(config)
        accuracy = reward.accuracy(held_out)
    console.print(
        f"  held-out accuracy: {accuracy['sentence']:.1%} of single sentences (labelled as their "
        f"review is), {accuracy['review']:.1%} of reviews"
    )

    text = choose_text(config, reviews, held_out)
    with stage(f"Training a GPT-2 on {len(text.sentences):,} sentences (SFT)", seconds, "sft"):
        reference, sft = train_reference(config, text, device)
    console.print(
        f"  {sft['parameters']:,} parameters; loss {sft['train_loss']:.2f} in the last epoch, "
        f"{sft['held_out_loss']:.2f} on held-out reviews (nats per token)"
    )

    with stage("Sampling preference pairs from it", seconds, "pairs"):
        pairs = make_pairs(
            config, reference, reward, text.vocabulary, text.sentences, config.pair_prompts
        )
    console.print(f"  {len(pairs):,} pairs whose rewards differ by {config.smallest_gap} or more")

    evaluator = make_evaluator(config, reference, reward, text)
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


def train_runs(
    config: Config, reference: GPT2LMHeadModel, pairs: PreferencePairs, evaluator: Evaluator
) -> tuple[list[Run], dict[str, GPT2LMHeadModel]]:
    """Train each method with each learning rate, since the rate is part of the comparison."""
    runs, policies = [], {}
    evaluate_at = [
        round(config.steps * (i + 1) / config.evaluations) for i in range(config.evaluations)
    ]
    for method, alpha in (("DPO", 0.0), ("TDPO2", config.alpha)):
        for learning_rate in config.learning_rates:
            run = Run(method, alpha, learning_rate)
            policies[run.name] = train_on_preferences(
                run,
                reference,
                pairs,
                evaluator,
                loss_function=TDPOLoss(beta=config.beta, alpha=alpha),
                steps=config.steps,
                batch_size=config.batch_size,
                evaluate_at=evaluate_at,
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
