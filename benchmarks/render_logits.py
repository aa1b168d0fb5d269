"""The part of docs/benchmarks.md, and the pictures, that come from results/logits-cpu.json."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tables import table

Report = dict[str, Any]
PROVIDERS = ("tdpo_ext", "tdpo_ext in place", "eager", "torch.compile")
IN_PLACE = "tdpo_ext in place"
# (name, pass of ours, its limit)
LIMITS = (
    ("forward", "tdpo_ext: no grad", "read"),
    ("backward in place", f"{IN_PLACE}: backward", "read + write"),
)


def median(row: Report, name: str) -> float | None:
    return row["nanoseconds"].get(name, {}).get("median")


def cell(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def of_shape(row: Report) -> list[str]:
    return [str(row["vocabulary"]), row["dtype"], str(row["threads"])]


def against_limit(row: Report) -> list[str]:
    cells = of_shape(row)
    for _, ours, limit in LIMITS:
        taken, least = median(row, ours), median(row, limit)
        cells += [cell(least), cell(taken), cell(taken / least, "{:.1f}x")]
    return cells


def by_pass(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        for which in ("no grad", "forward", "backward", "both"):
            times = [median(row, f"{name}: {which}") for name in PROVIDERS]
            ours = times[1] if times[1] is not None else times[0]
            ratios = [cell(time / ours, "{:.1f}x") for time in times[2:]]
            yield [*of_shape(row), which, *map(cell, times), *ratios]


def memory_and_error(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        if row["threads"] > 1:
            continue
        for name in PROVIDERS:
            extra, error = row["extra_bytes"][name], row["error"][name]
            tensors = None if extra is None else extra / row["tensor_bytes"]
            errors = [f"{error[which]:.0e}" for which in ("logps", "kl")]
            yield [*of_shape(row)[:2], name, cell(tensors), *errors]


def logits_section(report: Report) -> list[str]:
    head = ["V", "dtype", "threads"]
    limits = [[f"{limit}, ns", f"{name}, ns", "ratio"] for name, _, limit in LIMITS]
    return [
        "## From logits, on the CPU",
        "",
        f"To repeat: `python benchmarks/logits_cpu.py OUT`. {report['processor']}, torch "
        f"{report['torch']}, commit {report['commit']}, instruction set "
        f"{report['instruction_set']}, {report['rows']} rows, medians of {report['rounds']} "
        "interleaved rounds, nanoseconds for each pair (policy logit, reference logit). `eager` is "
        "the formula in PyTorch (`benchmarks/formula.py`), which `torch.compile` compiles.",
        "",
        *([report["note"], ""] if report.get("note") else []),
        *(f"{name} is left out: {reason}." for name, reason in report["skipped"].items()),
        "",
        "Against the limits, in the same rounds: a read of both sides (`amax`), and a read of both "
        "with a write over one (`add`).",
        *table([*head, *limits[0], *limits[1]], map(against_limit, report["measurements"])),
        "",
        "![Time against the vocabulary](logits-time.png)",
        "![Times the limit](logits-limit.png)",
        "",
        "From the same run, each pass; `both` is forward and backward. The last columns are "
        "multiples of ours, in place where there is a backward.",
        *table([*head, "pass", *PROVIDERS, "eager", "torch.compile"], by_pass(report)),
        "",
        "From the same run, memory at its peak beyond the batch, in tensors of logits, and the "
        "largest error relative to float64 on the same logits:",
        *table(["V", "dtype", "what", "extra memory", "log p(y)", "KL"], memory_and_error(report)),
    ]


def time_picture(report: Report, path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    rows = [row for row in report["measurements"] if row["threads"] == 1]
    for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        vocabularies = [row["vocabulary"] for row in of_dtype]
        for name in (*PROVIDERS, "read + write"):
            key = name if name == "read + write" else f"{name}: both"
            times = [
                median(row, key) * row["vocabulary"] * report["rows"] / 1e6 for row in of_dtype
            ]
            style = "k:" if name == "read + write" else "o-"
            axes.loglog(vocabularies, times, style, label=name)
        axes.set(title=f"{dtype}, one thread", xlabel="vocabulary")
    panels[0].set_ylabel(f"forward + backward of {report['rows']} rows, ms")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def limit_picture(report: Report, path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    rows = [row for row in report["measurements"] if row["threads"] == 1]
    names = [f"{row['vocabulary']}\n{row['dtype']}" for row in rows]
    for index, (name, ours, limit) in enumerate(LIMITS):
        ratios = [median(row, ours) / median(row, limit) for row in rows]
        places = [place + 0.4 * index - 0.2 for place in range(len(rows))]
        axes.bar(places, ratios, 0.38, label=f"{name} / {limit}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_ylabel("times the limit, one thread")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def logits_pictures(report: Report, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    time_picture(report, folder / "logits-time.png")
    limit_picture(report, folder / "logits-limit.png")
