"""summary.json: the tables and claims of a study, from its lines of results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import study_curves
from study_analysis import (
    Best,
    Group,
    Runs,
    Value,
    at_kl,
    at_reward,
    best,
    geometric_mean,
    kl_at,
    measured,
    reward_at,
    runs_of,
)
from study_bootstrap import combined, plain
from study_claims import ANY_BETA_DPO, ANY_BETA_TDPO2, judged, numbers
from study_effects import ALPHAS, KL_LEVELS, REWARD_LEVELS, log_seq_kl, there
from study_plan import DPO, FULL, TDPO1, TDPO2, RunKey
from study_results import Line, rounded

Row = dict[str, Any]
GROUPS: dict[str, Group] = {
    "DPO": (DPO,),
    "DPO, best beta": ANY_BETA_DPO,
    "TDPO1": (TDPO1,),
    **{f"TDPO2, alpha = {setting.alpha}": (setting,) for setting in TDPO2},
    "TDPO2, alpha = 0.5, best beta": ANY_BETA_TDPO2,
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
        "seconds_of_a_run": rounded(np.median([line["seconds"] for line in lines.values()])),
        "claims": judged(runs),
        "reward_at_kl": table(runs, KL_LEVELS, reward_at, at_kl, largest=True),
        "kl_at_reward": table(runs, REWARD_LEVELS, kl_at, at_reward, largest=False),
        "at_reward": at_equal_reward(runs),
        "at_the_end": at_the_end(runs),
        "seq_kl_by_rate": seq_kl_by_rate(runs),
        "curves": curves(runs),
    }


def present(runs: Runs) -> dict[str, Group]:
    """The groups whose settings have all run."""
    found = {name: group for name, group in GROUPS.items() if there(runs, group)}
    return found if runs.seeds else {}


def curves(runs: Runs) -> dict[str, list[Row]]:
    """What the pictures show."""
    single = {name: SINGLE[name] for name in present(runs) if name in SINGLE}
    return {
        "frontier": study_curves.frontier(runs, present(runs)),
        "entropy": study_curves.entropy(runs, present(runs)),
        **{f"seq_kl_{side}": study_curves.seq_kl(runs, single, side) for side in SIDES},
    }


def table(
    runs: Runs,
    levels: tuple[float, ...],
    value: Callable[[float], Value],
    where: Callable[[float, str], Value],
    *,
    largest: bool,
) -> list[Row]:
    """``value`` of every method at the levels, which a run reaches at ``where``."""

    def chosen(group: Group, level: float, shown: Value | None = None) -> Best | None:
        return best(runs, group, value(level), largest=largest, value=shown)

    rows = []
    for name, group in present(runs).items():
        cells = {}
        for level in levels:
            examples = chosen(group, level, where(level, "examples"))
            cells[f"{level:g}"] = cell(
                runs, group, chosen(group, level), chosen((DPO,), level), examples
            )
        rows.append({"method": name, "at": cells})
    return rows


def cell(
    runs: Runs, group: Group, own: Best | None, of_dpo: Best | None, examples: Best | None
) -> Row | None:
    """A method's value at a level, and its difference from DPO's, seed by seed."""
    if own is None or examples is None:
        return None
    rates, betas = runs.learning_rates, sorted(setting.beta for setting in group)
    return {
        **(numbers(own.estimate) or {}),
        "minus_dpo": of_dpo and numbers(combined([own.estimate, of_dpo.estimate], [1, -1])),
        "learning_rate": own.learning_rate,
        "rate_at_the_edge": own.learning_rate in (rates[0], rates[-1]),
        "beta": own.setting.beta,
        "beta_at_the_edge": len(betas) > 1 and own.setting.beta in (betas[0], betas[-1]),
        "updates": round(examples.estimate.by_seed.mean() / FULL.config.batch_size),
    }


def at_equal_reward(runs: Runs) -> list[Row]:
    """Entropy and diversity where each method needs the least KL for a reward of 0.6, and the
    reference's own."""
    names = {"entropy": "entropy_per_token", "distinct_2": "distinct_2"}
    names["tokens"] = "tokens_per_completion"
    level = REWARD_LEVELS[1]

    def shown(group: Group, value: Value) -> Row | None:
        found = best(runs, group, kl_at(level), largest=False, value=value)
        return None if found is None else numbers(found.estimate)

    rows: list[Row] = [
        {
            "method": method,
            "reward": level,
            **{name: shown(group, at_reward(level, key)) for name, key in names.items()},
        }
        for method, group in present(runs).items()
    ]
    return [reference(runs, names), *rows] if rows else []


def reference(runs: Runs, names: dict[str, str]) -> Row:
    """Its figures are the first of every run of a seed."""
    setting, rate = runs.settings[0], runs.learning_rates[0]
    measures = {name: measured(key, 0) for name, key in {**names, "reward": "reward"}.items()}
    found = {name: runs.values(setting, rate, value) for name, value in measures.items()}
    return {
        "method": "the reference",
        "reward": rounded(found.pop("reward").mean()),
        **{name: numbers(plain(values)) for name, values in found.items()},
    }


def at_the_end(runs: Runs) -> list[Row]:
    """SeqKL over learning rates, as geometric means; the accuracy of the best learning rate."""
    rows = []
    for method, setting in SINGLE.items():
        if method not in present(runs):
            continue
        accuracy = best(runs, (setting,), measured("accuracy"), largest=True)
        row: Row = {"method": method}
        for side in SIDES:
            found = geometric_mean(runs, setting, measured(f"seq_kl_{side}"))
            row[f"seq_kl_{side}"] = None if found is None else numbers(plain(found))
        rows.append({**row, "accuracy": accuracy and numbers(accuracy.estimate)})
    return rows


def seq_kl_by_rate(runs: Runs) -> list[Row]:
    """SeqKL of rejected responses at the end, geometric means over seeds, for each alpha."""
    if not there(runs, ALPHAS) or not runs.seeds:
        return []
    means = {x.alpha: np.exp(log_seq_kl(runs, x, "rejected").mean(axis=1)) for x in ALPHAS}
    return [
        {
            "learning_rate": rate,
            "at": {f"{alpha:g}": rounded(values[row]) for alpha, values in means.items()},
        }
        for row, rate in enumerate(runs.learning_rates)
    ]
