"""summary.json: the tables and claims of a study, from its lines of results."""

from __future__ import annotations

from typing import Any

import numpy as np
import study_curves
from study_analysis import (
    Best,
    Group,
    Runs,
    Value,
    at_reward,
    best,
    geometric_mean,
    kl_at,
    measured,
    reward_at,
    runs_of,
)
from study_claims import (
    KL_LEVELS,
    REWARD_LEVELS,
    STRONGEST_DPO,
    judged,
    numbers,
)
from study_plan import DPO, TDPO1, TDPO2, RunKey
from study_results import Line

Row = dict[str, Any]
GROUPS: dict[str, Group] = {
    "DPO": (DPO,),
    "DPO, best beta": STRONGEST_DPO,
    "TDPO1": (TDPO1,),
    **{f"TDPO2, alpha = {setting.alpha}": (setting,) for setting in TDPO2},
}
SIDES = ("chosen", "rejected")
SINGLE = {name: group[0] for name, group in GROUPS.items() if len(group) == 1}


def summary_of(lines: dict[RunKey, Line], about: dict[str, Any]) -> dict[str, Any]:
    """``about``: where and with what the runs were made."""
    runs = runs_of(lines)
    used = len(runs.curves)
    return {
        "about": about,
        "seeds": list(runs.seeds),
        "learning_rates": list(runs.learning_rates),
        "runs": used,
        "runs_of_incomplete_seeds": len(lines) - used,
        "hours_of_training": round(sum(line["seconds"] for line in lines.values()) / 3600, 2),
        "claims": judged(runs),
        "reward_at_kl": table(runs, KL_LEVELS, reward_at, largest=True),
        "kl_at_reward": table(runs, REWARD_LEVELS, kl_at, largest=False),
        "at_reward": at_equal_reward(runs),
        "at_the_end": at_the_end(runs),
        "curves": curves(runs),
    }


def present(runs: Runs) -> dict[str, Group]:
    """The groups whose settings have all run."""
    there = {name: group for name, group in GROUPS.items() if set(group) <= set(runs.settings)}
    return there if runs.seeds else {}


def curves(runs: Runs) -> dict[str, list[Row]]:
    """What the pictures show."""
    single = {name: SINGLE[name] for name in present(runs) if name in SINGLE}
    return {
        "frontier": study_curves.frontier(runs, present(runs)),
        "entropy": study_curves.entropy(runs, present(runs)),
        **{f"seq_kl_{side}": study_curves.seq_kl(runs, single, side) for side in SIDES},
    }


def table(runs: Runs, levels: tuple[float, ...], value: Any, *, largest: bool) -> list[Row]:
    rows = []
    for name, group in present(runs).items():
        cells = {}
        for level in levels:
            of_dpo, own = (best(runs, x, value(level), largest=largest) for x in ((DPO,), group))
            cells[f"{level:g}"] = cell(runs, own, of_dpo)
        rows.append({"method": name, "at": cells})
    return rows


def cell(runs: Runs, own: Best | None, of_dpo: Best | None) -> Row | None:
    """A method's value at a level, and its difference from DPO's, seed by seed."""
    if own is None:
        return None
    edges = runs.learning_rates[0], runs.learning_rates[-1]
    return {
        **(numbers(own.values) or {}),
        "minus_dpo": None if of_dpo is None else numbers(own.values - of_dpo.values),
        "learning_rate": own.learning_rate,
        "beta": own.setting.beta,
        "at_the_edge": own.learning_rate in edges,
    }


def at_equal_reward(runs: Runs) -> list[Row]:
    """Entropy and diversity where each method needs the least KL for a reward of 0.6."""
    names = {"entropy": "entropy_per_token", "distinct_2": "distinct_2"}
    names["tokens"] = "tokens_per_completion"
    level = REWARD_LEVELS[1]

    def values(group: Group, value: Value) -> np.ndarray | None:
        found = best(runs, group, kl_at(level), largest=False, value=value)
        return None if found is None else found.values

    return [
        {
            "method": method,
            "reward": level,
            **{name: numbers(values(group, at_reward(level, key))) for name, key in names.items()},
        }
        for method, group in present(runs).items()
    ]


def at_the_end(runs: Runs) -> list[Row]:
    """SeqKL over learning rates, as geometric means; the accuracy of the best learning rate."""
    rows = []
    for method, setting in SINGLE.items():
        if method not in present(runs):
            continue
        accuracy = best(runs, (setting,), measured("accuracy"), largest=True)
        row: Row = {"method": method}
        for side in SIDES:
            row[f"seq_kl_{side}"] = numbers(
                geometric_mean(runs, setting, measured(f"seq_kl_{side}"))
            )
        rows.append({**row, "accuracy": numbers(accuracy and accuracy.values)})
    return rows
