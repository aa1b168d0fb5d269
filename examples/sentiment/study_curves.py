"""The curves of the pictures: a mean over seeds and its interval along a grid, for each method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from study_analysis import (
    Group,
    Runs,
    at_reward,
    best,
    geometric_mean,
    kl_at,
    measured,
    reward_at,
)
from study_bootstrap import Estimate, interval, plain
from study_plan import Setting
from study_results import rounded

Row = dict[str, Any]
KLS = np.square(np.linspace(0.1, 3, 30))
REWARDS = np.linspace(0.4, 0.8, 41)


def curve(
    method: str, grid: Iterable[float], estimate_at: Callable[[float], Estimate | None]
) -> Row:
    """A point of the grid without an estimate is left out."""
    found = [(x, y) for x in grid if (y := estimate_at(x)) is not None]
    bounds = [interval(y) for _, y in found]
    return {
        "method": method,
        "at": [rounded(x) for x, _ in found],
        "mean": [rounded(y.by_seed.mean()) for _, y in found],
        "low": [rounded(low) for low, _ in bounds],
        "high": [rounded(high) for _, high in bounds],
    }


def frontier(runs: Runs, groups: Mapping[str, Group]) -> list[Row]:
    """Reward against KL, each point with the learning rate that earns the most there."""

    def reward(group: Group, kl: float) -> Estimate | None:
        found = best(runs, group, reward_at(kl), largest=True)
        return None if found is None else found.estimate

    return [curve(name, KLS, partial(reward, group)) for name, group in groups.items()]


def entropy(runs: Runs, groups: Mapping[str, Group]) -> list[Row]:
    """Entropy against reward, each point with the learning rate that needs the least KL for it."""

    def per_token(group: Group, reward: float) -> Estimate | None:
        value = at_reward(reward, "entropy_per_token")
        found = best(runs, group, kl_at(reward), largest=False, value=value)
        return None if found is None else found.estimate

    return [curve(name, REWARDS, partial(per_token, group)) for name, group in groups.items()]


def seq_kl(runs: Runs, settings: Mapping[str, Setting], side: str) -> list[Row]:
    """SeqKL against training examples, as a geometric mean over learning rates."""
    if not runs.curves:
        return []
    examples = next(iter(runs.curves.values()))["examples"].tolist()

    def mean(setting: Setting, shown: float) -> Estimate | None:
        value = measured(f"seq_kl_{side}", examples.index(shown))
        found = geometric_mean(runs, setting, value)
        return None if found is None else plain(found)

    return [curve(name, examples[1:], partial(mean, setting)) for name, setting in settings.items()]
