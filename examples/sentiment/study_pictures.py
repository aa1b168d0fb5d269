"""frontier.png and seq_kl.png: the tables of a study as curves, with bands over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from study_analysis import (
    Runs,
    at_reward,
    best,
    geometric_mean,
    interval,
    kl_at,
    measured,
    reward_at,
    runs_of,
)
from study_plan import RunKey
from study_results import Line
from study_summary import SINGLE, present

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's colours for the methods; the darker the blue, the larger alpha.
STYLES: dict[str, dict[str, Any]] = {
    "DPO": {"color": "#D55E00"},
    "DPO, best of four betas": {"color": "#D55E00", "linestyle": "--"},
    "TDPO1": {"color": "#009E73"},
    "TDPO2, alpha = 0.1": {"color": "#9BD0F0"},
    "TDPO2, alpha = 0.3": {"color": "#56A8E0"},
    "TDPO2, alpha = 0.5": {"color": "#0072B2"},
    "TDPO2, alpha = 0.7": {"color": "#00335C"},
}
KLS = np.square(np.linspace(0.1, 4, 40))
REWARDS = np.linspace(0.4, 0.95, 56)


def draw(lines: dict[RunKey, Line], summary: dict[str, Any], folder: Path) -> None:
    runs = runs_of(lines)
    if not runs.seeds:
        return
    draw_frontier(runs, summary, folder / "frontier.png")
    draw_seq_kl(runs, summary, folder / "seq_kl.png")


def verdict_line(summary: dict[str, Any], *names: str) -> str:
    claims = {claim["name"]: claim for claim in summary["claims"]}
    return "\n".join(f"{claims[name]['claim']}: {claims[name]['verdict']}." for name in names)


def draw_frontier(runs: Runs, summary: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(1.5, 1))
    for name, group in present(runs).items():

        def reward(kl: float, group: Any = group) -> np.ndarray | None:
            found = best(runs, group, reward_at(kl), largest=True)
            return found and found.values

        def entropy(level: float, group: Any = group) -> np.ndarray | None:
            value = at_reward(level, "entropy_per_token")
            found = best(runs, group, kl_at(level), largest=False, value=value)
            return found and found.values

        band(left, name, KLS, reward)
        band(right, name, REWARDS, entropy)
    # Reward grows about like the root of the KL, so this axis spreads the points.
    left.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    left.set_xlim(left=0)
    left.set_xticks([tick for tick in (0, 0.5, 1, 2, 4, 8, 16) if tick < left.get_xlim()[1]])
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="on-policy KL(π‖π_ref) per completion, nats", ylabel="reward, P(positive)")
    right.set(xlabel="reward, P(positive)", ylabel="entropy per token, nats")
    left.set_title(verdict_line(summary, "tdpo2_reward", "alpha_reward"), fontsize=10)
    right.set_title(verdict_line(summary, "tdpo2_entropy"), fontsize=10, wrap=True)
    finish(figure, (left, right), path)


def band(
    axes: Axes, name: str, grid: Iterable[float], values: Callable[[float], np.ndarray | None]
) -> None:
    """The mean over seeds, and its 95 % interval, where the method has a value."""
    found = [(x, y) for x in grid if (y := values(x)) is not None]
    if not found:
        return
    at = [x for x, _ in found]
    low, high = np.transpose([interval(y) for _, y in found])
    axes.plot(at, [y.mean() for _, y in found], label=name, linewidth=1.8, **STYLES[name])
    axes.fill_between(at, low, high, alpha=0.15, linewidth=0, color=STYLES[name]["color"])


def draw_seq_kl(runs: Runs, summary: dict[str, Any], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    claims = {
        "chosen": ("alpha_chosen", "tdpo1_chosen"),
        "rejected": ("alpha_rejected", "tdpo1_rejected"),
    }
    examples = next(iter(runs.curves.values()))["examples"].tolist()
    for axes, side in zip(panels, claims, strict=True):
        for name in [x for x in present(runs) if x in SINGLE]:

            def seq_kl(shown: float, name: str = name, side: str = side) -> np.ndarray | None:
                point = examples.index(shown)
                return geometric_mean(runs, SINGLE[name], measured(f"seq_kl_{side}", point))

            band(axes, name, examples[1:], seq_kl)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(
            xlabel="training examples (pairs)", ylabel=f"SeqKL(π_ref‖π), {side} responses, nats"
        )
        axes.set_title(verdict_line(summary, *claims[side]), fontsize=10)
    finish(figure, panels, path)


def finish(figure: Any, panels: Any, path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
