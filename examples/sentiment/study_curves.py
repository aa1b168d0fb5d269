"""The curves of the pictures: a mean over seeds and its interval along a grid, for each method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from study_analysis import (
    Group,
    Runs,
    at_reward,
    best,
    geometric_mean,
    interval,
    kl_at,
    measured,
    reward_at,
)
from study_plan import Setting
from study_results import rounded

Row = dict[str, Any]
KLS = np.square(np.linspace(0.1, 4, 40))
REWARDS = np.linspace(0.4, 0.95, 56)


def curve(method: str, grid: Iterable[float], values: Callable[[float], np.ndarray | None]) -> Row:
    """``values``: [seeds] at a point of the grid, or None, which leaves the point out."""
    found = [(x, y) for x in grid if (y := values(x)) is not None]
    bounds = [interval(y) for _, y in found]
    return {
        "method": method,
        "at": [rounded(x) for x, _ in found],
        "mean": [rounded(y.mean()) for _, y in found],
        "low": [rounded(low) for low, _ in bounds],
        "high": [rounded(high) for _, high in bounds],
    }


def frontier(runs: Runs, groups: Mapping[str, Group]) -> list[Row]:
    """Reward against KL, each point with the learning rate that earns the most there."""

    def reward(group: Group, kl: float) -> np.ndarray | None:
        found = best(runs, group, reward_at(kl), largest=True)
        return found and found.values

    return [
        curve(name, KLS, lambda kl, group=group: reward(group, kl))
        for name, group in groups.items()
    ]


def entropy(runs: Runs, groups: Mapping[str, Group]) -> list[Row]:
    """Entropy against reward, each point with the learning rate that needs the least KL for it."""

    def per_token(group: Group, reward: float) -> np.ndarray | None:
        value = at_reward(reward, "entropy_per_token")
        found = best(runs, group, kl_at(reward), largest=False, value=value)
        return found and found.values

    return [
        curve(name, REWARDS, lambda reward, group=group: per_token(group, reward))
        for name, group in groups.items()
    ]


def seq_kl(runs: Runs, settings: Mapping[str, Setting], side: str) -> list[Row]:
    """SeqKL against training examples, as a geometric mean over learning rates."""
    if not runs.curves:
        return []
    examples = next(iter(runs.curves.values()))["examples"].tolist()

    def mean(setting: Setting, shown: float) -> np.ndarray | None:
        return geometric_mean(runs, setting, measured(f"seq_kl_{side}", examples.index(shown)))

    return [
        curve(name, examples[1:], lambda shown, setting=setting: mean(setting, shown))
        for name, setting in settings.items()
    ]
