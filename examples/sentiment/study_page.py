"""The texts and tables of docs/study.md and README.md from the committed results (docs/fill.py).

It needs no package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from study_plan import FULL

RESULTS = Path(__file__).parent / "results"
NOTHING_YET = (
    "**No results are committed yet.** `make study` makes them: 2 to 3 hours on two cores."
)
README_CLAIMS = ("tdpo2_reward", "alpha_reward", "tdpo2_strongest", "best_betas")
TABLES = (
    "study_reward_at_kl",
    "study_kl_at_reward",
    "study_at_reward",
    "study_at_the_end",
    "study_seq_kl_by_rate",
)
Summary = dict[str, Any]


def committed() -> Summary | None:
    path = RESULTS / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def texts(summary: Summary | None = None) -> dict[str, str]:
    summary = summary or committed()
    if summary is None:
        return {
            "study_plan": plan_line(),
            "study_made": NOTHING_YET,
            "study_claims": NOTHING_YET,
            "study_frontier": "",
            "study_seq_kl": "",
            "study_readme": "",
        }
    return {
        "study_plan": plan_line(),
        "study_made": made_line(summary),
        "study_claims": "\n".join(claim_lines(summary)),
        "study_frontier": picture("reward against on-policy KL", "frontier"),
        "study_seq_kl": picture("sequential KL along training", "seq_kl"),
        "study_readme": readme_line(summary),
    }


def picture(words: str, name: str) -> str:
    return f"![{words}](../examples/sentiment/results/{name}.png)"


def plan_line() -> str:
    config = FULL.config
    rates = ", ".join(map(short, FULL.learning_rates))
    return (
        f"{len(FULL.seeds)} seeds, {len(FULL.settings)} settings and {len(FULL.learning_rates)} "
        f"learning rates ({rates}), {len(list(FULL.runs()))} runs in all. Each run: {config.steps} "
        f"updates of {config.batch_size} pairs, {config.evaluations} measurements on at most "
        f"{config.evaluation_prompts} held-out prompts, {FULL.measured_pairs} training pairs and "
        f"{FULL.measured_pairs} held-out pairs."
    )


def short(rate: float) -> str:
    return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def made_line(summary: Summary) -> str:
    commits: dict[str, list[str]] = {}
    for made in summary["about"]["made_on"]:
        machine = "{processor}, {device}, torch {torch}, tdpo_ext {tdpo_ext}".format(**made)
        commits.setdefault(machine, []).append(made["commit"])
    machines = "; ".join(f"{machine}, commit {', '.join(of)}" for machine, of in commits.items())
    planned = len(list(FULL.runs()))
    return (
        f"Made on {machines}. {summary['runs']} runs of {planned}, on {len(summary['seeds'])} "
        f"whole seeds; a run took {summary['seconds_of_a_run']:.0f} s of one process (median)."
    )


def claim_lines(summary: Summary) -> list[str]:
    return [
        f"- {claim['claim']}: **{claim['verdict']}**. {why(claim)}" for claim in summary["claims"]
    ]


def why(claim: dict[str, Any]) -> str:
    effect = claim["effect"]
    if effect is None:
        return "Not reached on every seed."
    measure = claim["measure"][0].upper() + claim["measure"][1:]
    above = sum(value > 0 for value in effect["by_seed"])
    seeds = f"above 0 on {above} of {len(effect['by_seed'])} seeds"
    return f"{measure}: {with_interval(effect, '+')}, {seeds}."


def with_interval(numbers: dict[str, Any] | None, sign: str = "") -> str:
    if numbers is None:
        return "not reached"
    low, high = numbers["interval"]
    if low is None:
        return f"{numbers['mean']:{sign}.3g} (one seed)"
    return f"{numbers['mean']:{sign}.3g} ({low:{sign}.3g} to {high:{sign}.3g})"


def readme_line(summary: Summary) -> str:
    """What the left half of README's picture shows."""
    shown = [x for x in summary["claims"] if x["name"] in README_CLAIMS]
    sentences = " ".join(f"{claim['claim']}: {claim['verdict']}." for claim in shown)
    return (
        f"Left: a model of {parameters(summary)} million parameters, {len(summary['seeds'])} "
        "seeds, learning rates swept for every method, bands of 95 %. "
        f"{sentences} [The study](docs/study.md)."
    )


def parameters(summary: Summary) -> str:
    starts = summary["about"]["starts"].values()
    return f"{max(start['parameters'] for start in starts) / 1e6:.2g}"


def tables(summary: Summary | None = None) -> dict[str, list[dict[str, str]]]:
    summary = summary or committed()
    names = (
        "study_reward_at_kl",
        "study_kl_at_reward",
        "study_at_reward",
        "study_at_the_end",
        "study_seq_kl_by_rate",
    )
    if summary is None:
        return {name: [{"method": "no results yet"}] for name in names}
    return {
        "study_reward_at_kl": level_rows(summary["reward_at_kl"], "KL"),
        "study_kl_at_reward": level_rows(summary["kl_at_reward"], "reward"),
        "study_at_reward": [
            {
                "method": row["method"],
                "reward": f"{row['reward']:.2f}",
                "entropy, nats per token": with_interval(row["entropy"]),
                "distinct bigrams": with_interval(row["distinct_2"]),
                "tokens": with_interval(row["tokens"]),
            }
            for row in summary["at_reward"]
        ],
        "study_at_the_end": [
            {
                "method": row["method"],
                "SeqKL chosen": with_interval(row["seq_kl_chosen"]),
                "SeqKL rejected": with_interval(row["seq_kl_rejected"]),
                "accuracy": with_interval(row["accuracy"]),
            }
            for row in summary["at_the_end"]
        ],
        "study_seq_kl_by_rate": [
            {
                "learning rate": short(row["learning_rate"]),
                **{alpha_name(alpha): digits(value) for alpha, value in row["at"].items()},
            }
            for row in summary["seq_kl_by_rate"]
        ],
    }


def level_rows(rows: list[dict[str, Any]], what: str) -> list[dict[str, str]]:
    return [
        {
            "method": row["method"],
            **{f"{what} = {level}": level_cell(row, at) for level, at in row["at"].items()},
        }
        for row in rows
    ]


def level_cell(row: dict[str, Any], at: dict[str, Any] | None) -> str:
    """The mean, the difference from DPO, and with what and when the level is reached; a star at
    what is at the edge of its grid."""
    if at is None:
        return "not reached"
    rate = f"lr {short(at['learning_rate'])}{star(at['rate_at_the_edge'])}"
    beta = f", beta {at['beta']:g}{star(at['beta_at_the_edge'])}"
    beta = beta if "best beta" in row["method"] else ""
    more = at["minus_dpo"]
    against = f"; {with_interval(more, '+')}" if more and row["method"] != "DPO" else ""
    return f"{at['mean']:.3g}{against}; {rate}{beta}, {at['updates']} updates"


def star(shown: bool) -> str:
    return "\\*" if shown else ""


def digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def alpha_name(alpha: str) -> str:
    return "DPO" if alpha == "0" else f"alpha = {alpha}"
