"""The tasks of the study's processes: make the start of a seed, or train one run from it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from preferences import PreferencePairs
from start import choose_text, learn_reward, make_evaluator, make_pairs, train_reference
from study_measure import Measure, curve_of
from study_plan import Plan, RunKey
from study_results import Line, line_of
from training import Metrics, Run, train_on_preferences
from transformers import GPT2LMHeadModel

from tdpo_ext import TDPOLoss


@dataclass(frozen=True)
class Start:
    """What all runs of a seed share."""

    conditions: dict[str, Any]
    reference: GPT2LMHeadModel
    pairs: PreferencePairs
    measure: Measure
    measured: Metrics  # of the reference itself
    about: dict[str, float]  # for the report


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def start_path(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}.pt"


def prepare(plan: Plan, folder: Path, seed: int) -> dict[str, float]:
    """Make the start of a seed and keep it in the folder, unless it is there already."""
    path = start_path(folder, seed)
    if path.exists() and (start := load(path)).conditions == plan.conditions():
        return start.about
    load.cache_clear()
    start = make_start(plan, seed)
    part = path.with_suffix(".part")
    torch.save(start, part)
    os.replace(part, path)
    return start.about


@lru_cache(maxsize=1)  # a process trains one run of a seed after another
def load(path: Path) -> Start:
    return torch.load(path, map_location=device(), weights_only=False)


def make_start(plan: Plan, seed: int) -> Start:
    began = time.perf_counter()
    config = plan.config_of(seed)
    torch.manual_seed(seed)
    reward, reviews, held_out = learn_reward(config)
    text = choose_text(config, reviews, held_out)
    reference, sft = train_reference(config, text, device())
    sources = reference, reward, text.vocabulary
    pairs = make_pairs(config, *sources, text.sentences, config.pair_prompts)
    held_out_pairs = make_pairs(config, *sources, text.held_out, 4 * plan.measured_pairs)
    measure = Measure(
        make_evaluator(config, reference, reward, text),
        pairs.first(plan.measured_pairs),
        held_out_pairs.first(plan.measured_pairs),  # not every prompt gives a pair
    )
    measured = measure(reference)
    about = {
        **sft,
        "pairs": len(pairs),
        "held_out_pairs": len(measure.held_out_pairs),
        "prompts": len(measure.evaluator.prompts),
        "seconds": time.perf_counter() - began,
    }
    return Start(plan.conditions(), reference, pairs, measure, measured, about)


def train(plan: Plan, folder: Path, key: RunKey) -> Line:
    """One run; its line of results begins with the reference's own figures."""
    began = time.perf_counter()
    start = load(start_path(folder, key.seed))
    setting, config = key.setting, plan.config_of(key.seed)
    run = Run(setting.method, setting.alpha, key.learning_rate)
    train_on_preferences(
        run,
        start.reference,
        start.pairs,
        start.measure,
        loss_function=TDPOLoss(setting.beta, setting.alpha, setting.variant),
        steps=config.steps,
        batch_size=config.batch_size,
        evaluate_at=plan.evaluate_at(),
        seed=config.seed,
    )
    points = [{"examples": 0.0, **start.measured}, *run.evaluation]
    return line_of(key, time.perf_counter() - began, curve_of(points))
