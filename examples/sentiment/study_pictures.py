"""frontier.png and seq_kl.png: the curves of a study's summary, with bands over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Summary = dict[str, Any]

# Okabe and Ito's colours for the methods; the darker the blue, the larger alpha.
STYLES: dict[str, dict[str, Any]] = {
    "DPO": {"color": "#D55E00"},
    "DPO, best beta": {"color": "#D55E00", "linestyle": "--"},
    "TDPO1": {"color": "#009E73"},
    "TDPO2, alpha = 0.1": {"color": "#9BD0F0"},
    "TDPO2, alpha = 0.3": {"color": "#56A8E0"},
    "TDPO2, alpha = 0.5": {"color": "#0072B2"},
    "TDPO2, alpha = 0.5, best beta": {"color": "#0072B2", "linestyle": "--"},
    "TDPO2, alpha = 0.7": {"color": "#00335C"},
}
KL_AXIS = "on-policy KL(π‖π_ref) per completion, nats"
REWARD_AXIS = "reward, P(positive)"


def draw(summary: Summary, folder: Path) -> None:
    if summary["seeds"]:
        draw_frontier(summary, folder / "frontier.png")
        draw_seq_kl(summary, folder / "seq_kl.png")


def verdict_line(summary: Summary, *names: str) -> str:
    claims = {claim["name"]: claim for claim in summary["claims"]}
    return "\n".join(f"{claims[name]['claim']}: {claims[name]['verdict']}." for name in names)


def draw_frontier(summary: Summary, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(1.5, 1))
    reward_against_kl(left, summary)
    bands(right, summary["curves"]["entropy"])
    right.set(xlabel=REWARD_AXIS, ylabel="entropy per token, nats")
    left.set_title(verdict_line(summary, "tdpo2_reward", "alpha_reward"), fontsize=10)
    right.set_title(verdict_line(summary, "tdpo2_entropy"), fontsize=10, wrap=True)
    finish(figure, (left, right), path)


def reward_against_kl(axes: Axes, summary: Summary) -> None:
    """README's picture has this panel too."""
    bands(axes, summary["curves"]["frontier"])
    # Reward grows about like the root of the KL, so this axis spreads the points.
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(left=0)
    axes.set_xticks([tick for tick in (0, 0.5, 1, 2, 4, 8) if tick < axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=KL_AXIS, ylabel=REWARD_AXIS)


def bands(axes: Axes, curves: list[dict[str, Any]]) -> None:
    """The mean over seeds, and its 95 % interval."""
    for curve in curves:
        if not curve["at"]:
            continue
        style = STYLES[curve["method"]]
        axes.plot(curve["at"], curve["mean"], label=curve["method"], linewidth=1.8, **style)
        if None not in curve["low"]:
            axes.fill_between(
                curve["at"],
                curve["low"],
                curve["high"],
                alpha=0.15,
                linewidth=0,
                color=style["color"],
            )


def draw_seq_kl(summary: Summary, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    for axes, side in zip(panels, ("chosen", "rejected"), strict=True):
        bands(axes, summary["curves"][f"seq_kl_{side}"])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("training examples (pairs)")
        axes.set_ylabel(f"SeqKL(π_ref‖π), {side} responses, nats", labelpad=8)
        axes.set_title(verdict_line(summary, f"alpha_{side}", f"tdpo1_{side}"), fontsize=10)
    panels[0].set_ylim(bottom=0.01)  # of both; all methods are alike below
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
