"""Means over seeds and their intervals, from a bootstrap that repeats each choice.

A method's value on a seed belongs to the learning rate that is best on average over the other
seeds. A draw of the bootstrap takes as many seeds as there are, some of them more than once, and
chooses again: for a seed on the other seeds of the draw. Without that, the interval would ignore
that the choice itself depends on luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import norm, t

DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds: what it is the mean of, and the means of the bootstrap's draws."""

    by_seed: np.ndarray  # [seeds]
    by_draw: np.ndarray  # [different draws]


@cache
def draws(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed is in a draw, [different draws, seeds], and how often a draw comes."""
    drawn = np.random.default_rng(0).integers(seeds, size=(DRAWS, seeds))
    copies = (drawn[:, :, None] == np.arange(seeds)).sum(axis=1)
    return np.unique(copies, axis=0, return_counts=True)


def plain(by_seed: np.ndarray) -> Estimate:
    """Nothing was chosen."""
    copies, _ = draws(len(by_seed))
    return Estimate(by_seed, copies @ by_seed / len(by_seed))


def of_the_best(scores: np.ndarray, values: np.ndarray) -> Estimate:
    """``values`` of the choices whose ``scores`` are best; both [choices, seeds]."""
    seeds = scores.shape[1]
    copies, _ = draws(seeds)
    seed = np.arange(seeds)
    all_once = best_on_the_others(scores, np.ones((1, seeds)))[0]
    chosen = best_on_the_others(scores, copies)
    by_draw = (copies * values[chosen, seed]).sum(axis=1) / seeds
    return Estimate(values[all_once, seed], by_draw)


def best_on_the_others(scores: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """[draws, seeds]: the choice with the largest sum of scores over the draw's other seeds.

    Where a draw has no other seed, the choice is the best on that one.
    """
    total = copies @ scores.T  # [draws, choices]
    own = np.where(copies < scores.shape[1], copies, 0)
    others: np.ndarray = total[:, :, None] - own[:, None, :] * scores
    return np.asarray(others.argmax(axis=1))


def combined(estimates: Sequence[Estimate], weights: Sequence[float] | np.ndarray) -> Estimate:
    """The weighted sum."""
    by_seed = np.tensordot(weights, [x.by_seed for x in estimates], axes=1)
    by_draw = np.tensordot(weights, [x.by_draw for x in estimates], axes=1)
    return Estimate(by_seed, by_draw)


def interval(estimate: Estimate) -> tuple[float, float]:
    """95 %: percentiles of the draws.

    With five seeds the usual percentiles contain the true mean of normal values 85 times in 100,
    not 95. So they are moved outwards, as Student's distribution has wider ones than the normal
    (Hesterberg 2015), which makes it 91 times. The draws are the same at every call.
    """
    count = len(estimate.by_seed)
    if count < 2 or not np.isfinite(estimate.by_seed).all():
        return float("nan"), float("nan")
    tail = norm.cdf((count / (count - 1)) ** 0.5 * t.ppf(0.025, count - 1))
    means = np.repeat(estimate.by_draw, draws(count)[1])
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
