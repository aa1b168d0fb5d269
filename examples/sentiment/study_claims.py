"""The paper's claims as sentences, each with its effect and the verdict of its interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from study_analysis import Runs, kl_at, reward_at
from study_bootstrap import Estimate, interval
from study_effects import (
    KL_LEVELS,
    REWARD_LEVELS,
    Effect,
    less_kl,
    more_accuracy,
    more_entropy,
    more_reward,
    more_reward_at_the_same_rate,
    seq_kl_above,
    seq_kl_falls,
    slope_of_the_best,
)
from study_plan import DPO, DPO_OTHER_BETAS, TDPO1, TDPO2, TDPO2_OTHER_BETAS
from study_results import rounded

FEWEST_SEEDS = 5
MIDDLE = TDPO2[2]  # alpha 0.5, the paper's default
ANY_BETA_DPO = (DPO, *DPO_OTHER_BETAS)
ANY_BETA_TDPO2 = (MIDDLE, *TDPO2_OTHER_BETAS)


class Claim(NamedTuple):
    sentence: str
    measure: str  # what the number is; {levels} are those of its effect
    effect: Callable[[Runs], Effect | None]


REWARDS = "difference of rewards, mean over KL = {levels}"
NATS = "nats saved, mean over reward = {levels}"
OVER_RATES = "mean over learning rates, after the same updates"
CLAIMS = {
    "tdpo2_reward": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than DPO",
        REWARDS,
        more_reward((MIDDLE,), (DPO,)),
    ),
    "tdpo2_kl": Claim(
        "For equal reward, TDPO2 (alpha = 0.5) spends less KL than DPO",
        NATS,
        less_kl((MIDDLE,), (DPO,)),
    ),
    "tdpo2_strongest": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than DPO with its best beta",
        REWARDS,
        more_reward((MIDDLE,), ANY_BETA_DPO),
    ),
    "best_betas": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than DPO, each with its best beta",
        REWARDS,
        more_reward(ANY_BETA_TDPO2, ANY_BETA_DPO),
    ),
    "alpha_reward": Claim(
        "At equal KL, the reward rises with alpha on the whole",
        "reward per unit of alpha, mean over KL = {levels}",
        slope_of_the_best(KL_LEVELS, reward_at, largest=True),
    ),
    "alpha_kl": Claim(
        "For equal reward, the KL falls with alpha on the whole",
        "nats saved per unit of alpha, mean over reward = {levels}",
        slope_of_the_best(REWARD_LEVELS, kl_at, largest=False),
    ),
    "same_rate": Claim(
        "At equal KL and with the same learning rate, TDPO2 (alpha = 0.5) earns more than DPO",
        REWARDS + ", and over the learning rates with which both reach it",
        more_reward_at_the_same_rate(MIDDLE, DPO),
    ),
    "tdpo1_reward": Claim(
        "At equal KL, TDPO1 earns more reward than DPO", REWARDS, more_reward((TDPO1,), (DPO,))
    ),
    "tdpo2_tdpo1": Claim(
        "At equal KL, TDPO2 (alpha = 0.5) earns more reward than TDPO1",
        REWARDS,
        more_reward((MIDDLE,), (TDPO1,)),
    ),
    "alpha_rejected": Claim(
        "The SeqKL of rejected responses falls with alpha",
        f"fall of log SeqKL per unit of alpha, {OVER_RATES}",
        seq_kl_falls("rejected"),
    ),
    "alpha_chosen": Claim(
        "The SeqKL of chosen responses falls with alpha",
        f"fall of log SeqKL per unit of alpha, {OVER_RATES}",
        seq_kl_falls("chosen"),
    ),
    "tdpo1_chosen": Claim(
        "TDPO1's SeqKL of chosen responses is above DPO's",
        f"difference of log SeqKL, {OVER_RATES}",
        seq_kl_above(TDPO1, DPO, "chosen"),
    ),
    "tdpo1_rejected": Claim(
        "TDPO1's SeqKL of rejected responses is below DPO's",
        f"difference of log SeqKL, {OVER_RATES}",
        seq_kl_above(DPO, TDPO1, "rejected"),
    ),
    "tdpo2_entropy": Claim(
        "At equal reward, TDPO2 (alpha = 0.5) has more entropy than DPO",
        "nats per token, mean over reward = {levels}",
        more_entropy((MIDDLE,), (DPO,)),
    ),
    "tdpo2_accuracy": Claim(
        "TDPO2 (alpha = 0.5) ranks held-out pairs more accurately than DPO",
        "difference of accuracies at the end, each with its best learning rate",
        more_accuracy((MIDDLE,), (DPO,)),
    ),
}


def verdict(estimate: Estimate | None) -> str:
    if estimate is None or len(estimate.by_seed) < FEWEST_SEEDS:
        return "cannot be told"
    low, high = interval(estimate)
    return "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"


def judged(runs: Runs) -> list[dict[str, Any]]:
    """Every claim with its verdict and the numbers that it rests on."""
    rows = []
    for name, claim in CLAIMS.items():
        estimate, levels = (claim.effect(runs) if runs.seeds else None) or (None, ())
        rows.append(
            {
                "name": name,
                "claim": claim.sentence,
                "verdict": verdict(estimate),
                "measure": claim.measure.format(levels=listed(levels)),
                "effect": numbers(estimate),
            }
        )
    return rows


def listed(levels: tuple[float, ...]) -> str:
    """1, 2 and 4"""
    *first, last = [f"{level:g}" for level in levels] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def numbers(estimate: Estimate | None) -> dict[str, Any] | None:
    """Mean, interval and the values of the seeds, in four digits; None if there is no estimate."""
    if estimate is None:
        return None
    return {
        "mean": rounded(estimate.by_seed.mean()),
        "interval": [rounded(bound) for bound in interval(estimate)],
        "by_seed": [rounded(value) for value in estimate.by_seed],
    }
