"""Made-up results of the study, with an order of the methods that is known."""

from __future__ import annotations

import numpy as np
import sentiment  # noqa: F401  # the path to the modules below
from study_plan import FULL, RunKey, Setting
from study_results import Line, line_of

NOISE = 0.02
POINTS = (np.arange(11) / 10) ** 2


def strength(setting: Setting) -> float:
    """How far a method is from DPO."""
    return 0.3 if setting.method == "TDPO1" else setting.alpha


def made_up(order: float, *, seeds: int = 5, draw: int = 0) -> dict[RunKey, Line]:
    """The paper's order for a positive ``order``, the reverse for a negative one, none for 0."""
    rng = np.random.default_rng(draw)
    starts = rng.normal(0.38, 0.03, size=seeds)
    keys = [RunKey(x, rate, n) for n in range(seeds) for x in FULL.settings for rate in RATES]
    return {key: line_of(key, 60.0, curve(key, order, starts[key.seed], rng)) for key in keys}


RATES = (1e-4, 4e-4, 1.6e-3)


def curve(
    key: RunKey, order: float, start: float, rng: np.random.Generator
) -> dict[str, list[float]]:
    better = order * strength(key.setting)

    def noisy(values: np.ndarray) -> np.ndarray:
        """Every run has luck of its own, and every measurement; the start has none."""
        luck = rng.normal(0, NOISE / 2) + rng.normal(0, NOISE / 2, size=len(values))
        return values + luck * (POINTS > 0)

    kl = 5 * (key.learning_rate / 4e-4) ** 0.5 * POINTS
    reward = noisy(start + (0.15 + 0.1 * better) * np.sqrt(kl))
    chosen = better if key.setting.method == "TDPO1" else -better
    return {
        "examples": (5120 * POINTS).tolist(),
        "reward": reward.tolist(),
        "on_policy_kl": kl.tolist(),
        "entropy_per_token": noisy(4 - (2 - 2 * better) * (reward - start)).tolist(),
        "tokens_per_completion": noisy(np.full(11, 10.0)).tolist(),
        "distinct_2": noisy(np.full(11, 0.5)).tolist(),
        "seq_kl_chosen": (4 * POINTS * np.exp(noisy(POINTS) + chosen)).tolist(),
        "seq_kl_rejected": (6 * POINTS * np.exp(noisy(POINTS) - better)).tolist(),
        "accuracy": noisy(0.5 + 0.2 * POINTS * (1 + better)).tolist(),
    }
