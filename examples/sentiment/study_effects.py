"""The effects that the paper's claims speak of: a mean over seeds, above 0 if it is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from study_analysis import (
    Group,
    Runs,
    Value,
    at_reward,
    best,
    by_rate,
    kl_at,
    measured,
    over_learning_rates,
    reward_at,
)
from study_bootstrap import Estimate, combined, plain
from study_plan import DPO, TDPO2, Setting

KL_LEVELS = (1.0, 2.0, 4.0)
REWARD_LEVELS = (0.5, 0.6, 0.65)
ALPHAS = (DPO, *TDPO2)  # DPO is alpha 0


class Effect(NamedTuple):
    estimate: Estimate
    levels: tuple[float, ...] = ()  # of KL or reward: those over which it is a mean


def over_levels(
    levels: tuple[float, ...], estimate_at: Callable[[float], Estimate | None]
) -> Effect | None:
    """The mean over the levels that are reached."""
    found = {level: x for level in levels if (x := estimate_at(level)) is not None}
    if not found:
        return None
    return Effect(mean_of(list(found.values())), tuple(found))


def mean_of(estimates: list[Estimate]) -> Estimate:
    return combined(estimates, np.full(len(estimates), 1 / len(estimates)))


def there(runs: Runs, *groups: Group) -> bool:
    return all(set(group) <= set(runs.settings) for group in groups)


def difference(
    runs: Runs, one: Group, other: Group, choose_by: Value, **options: Any
) -> Estimate | None:
    """``one`` minus ``other``; None if either does not reach the level."""
    if not there(runs, one, other):
        return None
    first, second = (best(runs, group, choose_by, **options) for group in (one, other))
    if first is None or second is None:
        return None
    return combined([first.estimate, second.estimate], [1, -1])


def more_reward(one: Group, other: Group) -> Callable[[Runs], Effect | None]:
    return lambda runs: over_levels(
        KL_LEVELS, lambda kl: difference(runs, one, other, reward_at(kl), largest=True)
    )


def less_kl(one: Group, other: Group) -> Callable[[Runs], Effect | None]:
    return lambda runs: over_levels(
        REWARD_LEVELS, lambda reward: difference(runs, other, one, kl_at(reward), largest=False)
    )


def more_reward_at_the_same_rate(one: Setting, other: Setting) -> Callable[[Runs], Effect | None]:
    """The mean over the learning rates with which both reach the KL on every seed."""

    def at(runs: Runs, kl: float) -> Estimate | None:
        if not there(runs, (one, other)):
            return None
        rewards = (by_rate(runs, setting, reward_at(kl)) for setting in (one, other))
        found = over_learning_rates(np.subtract(*rewards))
        return None if found is None else plain(found)

    return lambda runs: over_levels(KL_LEVELS, lambda kl: at(runs, kl))


def more_entropy(one: Group, other: Group) -> Callable[[Runs], Effect | None]:
    """Each with the learning rate that needs the least KL for the reward."""

    def at(runs: Runs, reward: float) -> Estimate | None:
        value = at_reward(reward, "entropy_per_token")
        return difference(runs, one, other, kl_at(reward), largest=False, value=value)

    return lambda runs: over_levels(REWARD_LEVELS, lambda reward: at(runs, reward))


def slope_over_alpha(estimates: list[Estimate]) -> Estimate:
    """The least-squares slope of a seed's values, one for each of ``ALPHAS``."""
    away = np.array([setting.alpha for setting in ALPHAS])
    away = away - away.mean()
    return combined(estimates, away / (away @ away))


def slope_of_the_best(
    levels: tuple[float, ...], value: Callable[[float], Value], *, largest: bool
) -> Callable[[Runs], Effect | None]:
    """Over alpha; positive where a larger alpha is better."""

    def at(runs: Runs, level: float) -> Estimate | None:
        if not there(runs, ALPHAS):
            return None
        every = [best(runs, (setting,), value(level), largest=largest) for setting in ALPHAS]
        found = [x.estimate for x in every if x is not None]
        if len(found) < len(ALPHAS):
            return None
        slope = slope_over_alpha(found)
        return slope if largest else combined([slope], [-1])

    return lambda runs: over_levels(levels, lambda level: at(runs, level))


def log_seq_kl(runs: Runs, setting: Setting, side: str) -> np.ndarray:
    """[learning rates, seeds] at the end of training."""
    return np.log(by_rate(runs, setting, measured(f"seq_kl_{side}")))


def seq_kl_falls(side: str) -> Callable[[Runs], Effect | None]:
    def effect(runs: Runs) -> Effect | None:
        if not there(runs, ALPHAS):
            return None
        tables = [log_seq_kl(runs, setting, side) for setting in ALPHAS]
        rates = np.isfinite(tables).all(axis=(0, 2))  # with which no run has diverged
        if not rates.any():
            return None
        slope = slope_over_alpha([plain(table[rates].mean(axis=0)) for table in tables])
        return Effect(combined([slope], [-1]))

    return effect


def seq_kl_above(one: Setting, other: Setting, side: str) -> Callable[[Runs], Effect | None]:
    def effect(runs: Runs) -> Effect | None:
        if not there(runs, (one, other)):
            return None
        found = over_learning_rates(log_seq_kl(runs, one, side) - log_seq_kl(runs, other, side))
        return None if found is None else Effect(plain(found))

    return effect


def more_accuracy(one: Group, other: Group) -> Callable[[Runs], Effect | None]:
    def effect(runs: Runs) -> Effect | None:
        found = difference(runs, one, other, measured("accuracy"), largest=True)
        return None if found is None else Effect(found)

    return effect
