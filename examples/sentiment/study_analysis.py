"""Frontiers of reward against KL from the lines of results.

A run's curve goes through its measurements in the order of training, beginning with the reference
(KL 0). Between two of them it is a straight line over the root of the KL, since reward grows about
like that root. The run's reward at a KL is taken where the curve first reaches that KL, and its KL
at a reward where it first reaches that reward. A method's value on a seed is that of one of its
learning rates: the one that is best on average over the *other* seeds, so that no run is chosen for
its own luck. Only learning rates that reach the level on every seed can be chosen; if there are
none, the method has no value there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from study_bootstrap import Estimate, of_the_best
from study_plan import RunKey, Setting
from study_results import Line

Curve = dict[str, np.ndarray]
Value = Callable[[Curve], float]
Group = tuple[Setting, ...]  # one setting, or several whose best is taken


@dataclass(frozen=True)
class Runs:
    """The runs of whole seeds, on which every setting has run with every learning rate."""

    curves: dict[RunKey, Curve]
    settings: tuple[Setting, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def values(self, setting: Setting, learning_rate: float, value: Value) -> np.ndarray:
        """[seeds]"""
        keys = [RunKey(setting, learning_rate, seed) for seed in self.seeds]
        return np.array([value(self.curves[key]) for key in keys])


def runs_of(lines: dict[RunKey, Line]) -> Runs:
    settings = tuple(dict.fromkeys(key.setting for key in lines))
    rates = tuple(sorted({key.learning_rate for key in lines}))
    seeds = tuple(
        seed
        for seed in sorted({key.seed for key in lines})
        if all(RunKey(setting, rate, seed) in lines for setting in settings for rate in rates)
    )
    curves = {key: curve_of(line) for key, line in lines.items() if key.seed in seeds}
    return Runs(curves, settings, rates, seeds)


def curve_of(line: Line) -> Curve:
    curve = {name: np.array(values, dtype=float) for name, values in line["curve"].items()}
    return {**curve, "root_kl": np.sqrt(curve["on_policy_kl"])}


def crossing(curve: Curve, along: str, level: float, wanted: str) -> float:
    """``wanted`` where ``along`` first reaches the level; NaN if it does not."""
    x, y = curve[along], curve[wanted]
    reached = np.flatnonzero(x >= level)  # false for NaN, where training had diverged
    if len(reached) == 0:
        return float("nan")
    end = reached[0]
    if end == 0:
        return float(y[0])
    share = (level - x[end - 1]) / (x[end] - x[end - 1])
    return float(y[end - 1] + share * (y[end] - y[end - 1]))


def at_kl(kl: float, name: str) -> Value:
    return lambda curve: crossing(curve, "root_kl", kl**0.5, name)


def at_reward(reward: float, name: str) -> Value:
    return lambda curve: crossing(curve, "reward", reward, name)


def reward_at(kl: float) -> Value:
    return at_kl(kl, "reward")


def kl_at(reward: float) -> Value:
    root = at_reward(reward, "root_kl")
    return lambda curve: root(curve) ** 2


def measured(name: str, point: int = -1) -> Value:
    """At one of the measurements; by default at the last one, the end of training."""
    return lambda curve: float(curve[name][point])


def by_rate(runs: Runs, setting: Setting, value: Value) -> np.ndarray:
    """[learning rates, seeds]"""
    return np.array([runs.values(setting, rate, value) for rate in runs.learning_rates])


def over_learning_rates(values: np.ndarray) -> np.ndarray | None:
    """[seeds]: the mean over the learning rates with which no run has diverged."""
    whole = values[np.isfinite(values).all(axis=1)]
    return whole.mean(axis=0) if len(whole) else None


def geometric_mean(runs: Runs, setting: Setting, value: Value) -> np.ndarray | None:
    """[seeds], over learning rates."""
    found = over_learning_rates(np.log(by_rate(runs, setting, value)))
    return None if found is None else np.exp(found)


@dataclass(frozen=True)
class Best:
    """A method's value, and the setting and learning rate best over all seeds."""

    estimate: Estimate
    setting: Setting
    learning_rate: float


def best(
    runs: Runs, group: Group, choose_by: Value, *, largest: bool, value: Value | None = None
) -> Best | None:
    """``value`` of the learning rate for which ``choose_by`` is best; that itself if not given."""
    every = [(setting, rate) for setting in group for rate in runs.learning_rates]
    scores = {choice: runs.values(*choice, choose_by) for choice in every}
    choices = [choice for choice in every if np.isfinite(scores[choice]).all()]
    if not choices or not runs.seeds:
        return None
    table = np.stack([scores[choice] for choice in choices]) * (1 if largest else -1)
    values = np.stack([runs.values(*choice, value or choose_by) for choice in choices])
    return Best(of_the_best(table, values), *choices[int(table.sum(axis=1).argmax())])
