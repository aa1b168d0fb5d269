"""The paper's claims, each as an effect on every seed that is above 0 if the claim is true."""

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
    interval,
    kl_at,
    logs,
    measured,
    over_learning_rates,
    reward_at,
)
from study_plan import DPO, DPO_OTHER_BETAS, TDPO1, TDPO2, Setting
from study_results import rounded

KL_LEVELS = (1.0, 2.0, 4.0)
REWARD_LEVELS = (0.5, 0.6, 0.65)
FEWEST_SEEDS = 5
ALPHAS = (DPO, *TDPO2)  # DPO is alpha 0
MIDDLE = TDPO2[2]  # alpha 0.5, the paper's default
STRONGEST_DPO = (DPO, *DPO_OTHER_BETAS)

Effects = np.ndarray  # [seeds]


class Claim(NamedTuple):
    sentence: str
    measure: str  # what the number is
    effects: Callable[[Runs], Effects | None]


def over_levels(
    levels: tuple[float, ...], effect: Callable[[float], Effects | None]
) -> Effects | None:
    """The mean over the levels that have an effect."""
    found = [values for level in levels if (values := effect(level)) is not None]
    return np.mean(found, axis=0) if found else None


def difference(runs: Runs, one: Group, other: Group, choose_by: Value, **how: Any) -> Any:
    """``one`` minus ``other`` on each seed; None if either does not reach the level."""
    if not (set(one) | set(other)) <= set(runs.settings):
        return None
    first, second = (best(runs, group, choose_by, **how) for group in (one, other))
    return None if first is None or second is None else first.values - second.values


def more_reward(one: Group, other: Group) -> Callable[[Runs], Effects | None]:
    return lambda runs: over_levels(
        KL_LEVELS, lambda kl: difference(runs, one, other, reward_at(kl), largest=True)
    )


def less_kl(one: Group, other: Group) -> Callable[[Runs], Effects | None]:
    return lambda runs: over_levels(
        REWARD_LEVELS, lambda reward: difference(runs, other, one, kl_at(reward), largest=False)
    )


def more_entropy(one: Group, other: Group) -> Callable[[Runs], Effects | None]:
    """Each with the learning rate that needs the least KL for the reward."""

    def at(runs: Runs, reward: float) -> Effects | None:
        value = at_reward(reward, "entropy_per_token")
        return difference(runs, one, other, kl_at(reward), largest=False, value=value)

    return lambda runs: over_levels(REWARD_LEVELS, lambda reward: at(runs, reward))


def slope_over_alpha(values: list[np.ndarray]) -> Effects:
    """[seeds]: the least-squares slope of a seed's values, one for each of ``ALPHAS``."""
    away = np.array([setting.alpha for setting in ALPHAS])
    away = away - away.mean()
    return away @ np.stack(values) / (away @ away)


def reward_grows_with_alpha(runs: Runs) -> Effects | None:
    def at(kl: float) -> Effects | None:
        found = [best(runs, (setting,), reward_at(kl), largest=True) for setting in ALPHAS]
        values = [x.values for x in found if x is not None]
        return slope_over_alpha(values) if len(values) == len(ALPHAS) else None

    return over_levels(KL_LEVELS, at) if set(ALPHAS) <= set(runs.settings) else None


def log_seq_kl(runs: Runs, setting: Setting, side: str) -> np.ndarray:
    """[learning rates, seeds] at the end of training."""
    return logs(runs, setting, measured(f"seq_kl_{side}"))


def seq_kl_falls(side: str) -> Callable[[Runs], Effects | None]:
    def effects(runs: Runs) -> Effects | None:
        if not set(ALPHAS) <= set(runs.settings):
            return None
        tables = np.stack([log_seq_kl(runs, setting, side) for setting in ALPHAS])
        slopes = [slope_over_alpha(list(tables[:, row])) for row in range(tables.shape[1])]
        found = over_learning_rates(np.array(slopes))
        return None if found is None else -found

    return effects


def seq_kl_above(one: Setting, other: Setting, side: str) -> Callable[[Runs], Effects | None]:
    def effects(runs: Runs) -> Effects | None:
        if not {one, other} <= set(runs.settings):
            return None
        return over_learning_rates(log_seq_kl(runs, one, side) - log_seq_kl(runs, other, side))

    return effects


def more_accuracy(one: Group, other: Group) -> Callable[[Runs], Effects | None]:
    return lambda runs: difference(runs, one, other, measured("accuracy"), largest=True)


OVER_KL = "mean over those of KL = 1, 2 and 4 that all reach"
OVER_REWARDS = "mean over those of reward = 0.5, 0.6 and 0.65 that all reach"
REWARDS = f"difference of rewards, {OVER_KL}"
CLAIMS = {
    "tdpo2_reward": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than DPO",
        REWARDS,
        more_reward((MIDDLE,), (DPO,)),
    ),
    "tdpo2_kl": Claim(
        "For equal reward, TDPO2 (alpha = 0.5) spends less KL than DPO",
        f"nats that DPO spends beyond it, {OVER_REWARDS}",
        less_kl((MIDDLE,), (DPO,)),
    ),
    "tdpo2_strongest": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than DPO with its best beta",
        REWARDS,
        more_reward((MIDDLE,), STRONGEST_DPO),
    ),
    "tdpo1_reward": Claim(
        "At equal KL, TDPO1 earns more reward than DPO", REWARDS, more_reward((TDPO1,), (DPO,))
    ),
    "alpha_reward": Claim(
        "At equal KL, the reward grows with alpha",
        f"reward per unit of alpha, {OVER_KL}",
        reward_grows_with_alpha,
    ),
    "alpha_rejected": Claim(
        "The SeqKL of rejected responses falls with alpha",
        "fall of log SeqKL per unit of alpha, mean over learning rates",
        seq_kl_falls("rejected"),
    ),
    "alpha_chosen": Claim(
        "The SeqKL of chosen responses falls with alpha",
        "fall of log SeqKL per unit of alpha, mean over learning rates",
        seq_kl_falls("chosen"),
    ),
    "tdpo1_chosen": Claim(
        "TDPO1's SeqKL of chosen responses is above DPO's",
        "difference of log SeqKL, mean over learning rates",
        seq_kl_above(TDPO1, DPO, "chosen"),
    ),
    "tdpo1_rejected": Claim(
        "TDPO1's SeqKL of rejected responses is below DPO's",
        "difference of log SeqKL, mean over learning rates",
        seq_kl_above(DPO, TDPO1, "rejected"),
    ),
    "tdpo2_entropy": Claim(
        "At equal reward, TDPO2 (alpha = 0.5) keeps more entropy than DPO",
        f"nats per token, {OVER_REWARDS}",
        more_entropy((MIDDLE,), (DPO,)),
    ),
    "tdpo2_accuracy": Claim(
        "TDPO2 (alpha = 0.5) ranks held-out pairs more accurately than DPO",
        "difference of accuracies at the end, each with its best learning rate",
        more_accuracy((MIDDLE,), (DPO,)),
    ),
}


def verdict(effects: Effects | None) -> str:
    if effects is None or len(effects) < FEWEST_SEEDS:
        return "cannot be told"
    low, high = interval(effects)
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"


def judged(runs: Runs) -> list[dict[str, Any]]:
    """Every claim with its verdict and the numbers that it rests on."""
    rows = []
    for name, claim in CLAIMS.items():
        effects = claim.effects(runs) if runs.seeds else None
        row = {"name": name, "claim": claim.sentence, "verdict": verdict(effects)}
        rows.append({**row, "measure": claim.measure, "effect": numbers(effects)})
    return rows


def numbers(values: np.ndarray | None) -> dict[str, Any] | None:
    """Mean, interval and the values of the seeds, in four digits; None if there are no values."""
    if values is None:
        return None
    return {
        "mean": rounded(values.mean()),
        "interval": [rounded(bound) for bound in interval(values)],
        "by_seed": [rounded(value) for value in values],
    }
