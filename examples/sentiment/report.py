"""The table, the picture, the completions, and the conclusions that they allow."""

from __future__ import annotations

import math
import re
from typing import Any

import matplotlib
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from training import Metrics, Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Style = dict[str, Any]
console = Console(highlight=False)

# Okabe and Ito's palette: distinguishable for colour-blind readers.
COLOURS = {"DPO": "#D55E00", "TDPO2": "#0072B2"}
MARKERS = ("o", "s", "^", "D")
LAST_STEPS = 10
SMOOTHING = 10

WHAT_IT_DOES_NOT_SHOW = """\
[bold]What it does not show.[/] An ordering of DPO and TDPO2. A higher learning rate buys reward \
with KL in either method: compare whole curves at equal KL, beyond the error bars, which cover the \
choice of prompts and nothing else. Another seed can change the order, and toy text says nothing \
about large models. The reward is the very classifier that ranked the pairs: part of its rise is \
the policy learning that classifier's taste.\
"""


def readable(text: str) -> str:
    return re.sub(r" ([.,!?])", r"\1", text)


def last_steps(run: Run, key: str) -> float:
    """Mean over the last updates: a single batch is noisy."""
    return float(np.mean([metrics[key] for metrics in run.training[-LAST_STEPS:]]))


def print_table(start: Metrics, runs: list[Run]) -> None:
    # Fits 80 columns.
    table = Table(title="After training", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", no_wrap=True)
    for heading in (
        "\nreward",
        "on-policy\nKL",
        "SeqKL\nchosen",
        "SeqKL\nrejected",
        "entropy\nper token",
        "\ntokens",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("SFT start", *evaluated(start), "0.00", "0.00", *described(start))
    for run in runs:
        sequential = [f"{last_steps(run, f'kl/{side}'):.2f}" for side in ("chosen", "rejected")]
        final = run.evaluation[-1]
        table.add_row(run.name, *evaluated(final), *sequential, *described(final))
    console.print(table)
    console.print(
        "KL and entropy in nats. Reward: P(positive) on held-out prompts, ± one standard "
        "error. On-policy KL: KL(pi || pi_ref) along the policy's own completions of them. "
        "SeqKL: KL(pi_ref || pi) along the pairs' responses, mean of the last "
        f"{LAST_STEPS} updates.\n"
    )


def evaluated(metrics: Metrics) -> tuple[str, str]:
    reward, error = metrics["reward"], metrics["reward_standard_error"]
    return f"{reward:.3f} ± {error:.3f}", f"{metrics['on_policy_kl']:.2f}"


def described(metrics: Metrics) -> tuple[str, str]:
    return f"{metrics['entropy_per_token']:.2f}", f"{metrics['tokens_per_completion']:.1f}"


def print_completions(completions: dict[str, list[tuple[str, float]]]) -> None:
    """Prompt by prompt, every model's completion and its reward."""
    table = Table(
        title="Completions of held-out prompts, not picked", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("model", no_wrap=True)
    table.add_column("reward")
    table.add_column("text")
    for prompt in zip(*completions.values(), strict=True):
        for name, (text, reward) in zip(completions, prompt, strict=True):
            table.add_row(name, f"{reward:.2f}", readable(text))
        table.add_section()
    console.print(table)


def print_closing(start: Metrics, runs: list[Run], steps: int, parameters: float) -> None:
    """Print conclusions from the numbers of this run, and what they do not show."""
    ends = [run.evaluation[-1] for run in runs]
    gains = [end["reward"] - start["reward"] for end in ends]
    errors = [math.hypot(*(m["reward_standard_error"] for m in (start, end))) for end in ends]
    clear = sum(gain > 3 * error for gain, error in zip(gains, errors, strict=True))
    console.print(
        f"[bold]What this shows.[/] One seed, {steps} updates, a model of {parameters / 1e6:.1f} "
        f"million parameters: in {clear} of {len(runs)} runs the reward of held-out prompts rises "
        f"over the SFT start by more than three standard errors ({min(gains):+.2f} to "
        f"{max(gains):+.2f}), and the KL paid for it is measured in both directions."
    )
    console.print(WHAT_IT_DOES_NOT_SHOW)


def draw(start: Metrics, runs: list[Run], path: str) -> None:
    rates = sorted({run.learning_rate for run in runs})
    styles = {
        run.name: {
            "color": COLOURS[run.method],
            "marker": MARKERS[rates.index(run.learning_rate)],
            "markersize": 5,
            "linewidth": 1.2,
            "alpha": 0.85,
        }
        for run in runs
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 5.2), width_ratios=(1.4, 1, 1))
    draw_reward(axes[0], start, runs, styles)
    draw_sequential_kl(axes[1], "chosen", runs, styles)
    draw_sequential_kl(axes[2], "rejected", runs, styles)
    top = max(axis.get_ylim()[1] for axis in axes[1:])
    for axis in axes[1:]:
        axis.set_ylim(0.05, top)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=7, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_reward(axes: Axes, start: Metrics, runs: list[Run], styles: dict[str, Style]) -> None:
    axes.plot(0, start["reward"], "k*", markersize=12, label="SFT start", zorder=5, clip_on=False)
    for run in runs:
        points = [start, *run.evaluation]
        axes.errorbar(
            [point["on_policy_kl"] for point in points],
            [point["reward"] for point in points],
            yerr=[point["reward_standard_error"] for point in points],
            elinewidth=0.6,
            label=run.name,
            **styles[run.name],
        )
    # Reward grows about like the square root of the KL, so this spreads the points.
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(left=0)
    largest = axes.get_xlim()[1]
    axes.set_xticks([tick for tick in (0, 1, 2, 4, 8, 16, 32, 64) if tick < largest])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("on-policy KL(π‖π_ref) per completion (nats)")
    axes.set_ylabel("reward, P(positive) ± one standard error")
    axes.set_title("Held-out prompts, along training")
    axes.grid(alpha=0.3)


def draw_sequential_kl(axes: Axes, side: str, runs: list[Run], styles: dict[str, Style]) -> None:
    for run in runs:
        examples = [metrics["examples"] for metrics in run.training]
        values = smoothed([metrics[f"kl/{side}"] for metrics in run.training])
        axes.plot(examples, values, markevery=max(1, len(values) // 5), **styles[run.name])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training examples (pairs)")
    axes.set_ylabel("SeqKL(π_ref‖π) per response (nats)")
    axes.set_title(f"Training pairs, {side} responses")
    axes.grid(alpha=0.3)


def smoothed(values: list[float]) -> np.ndarray:
    """Mean of the last ``SMOOTHING`` updates; of fewer at the beginning."""
    windows = (values[max(0, end - SMOOTHING) : end] for end in range(1, len(values) + 1))
    return np.array([np.mean(window) for window in windows])
