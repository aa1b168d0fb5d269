"""docs/benchmarks.md, its pictures and README's, from benchmarks/results/*.json:
`python benchmarks/render.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import render_readme
from render_gpu import (
    ABOUT_FUSED_TABLE,
    ABOUT_SMALL_CALLS,
    RESULTS,
    fused_table,
    gpu_pictures,
    gpu_section,
    repeat,
    small_table,
    step_table,
    step_text,
)
from render_logits import logits_pictures, logits_section

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
Report = dict[str, Any]


def fused_section(report: Report) -> list[str]:
    return [
        "## The fused head, CPU",
        "",
        f"{repeat('python benchmarks/fused_head.py OUT')} Torch {report['torch']}, "
        f"{report['threads']} threads, medians of {report['rounds']} interleaved rounds. "
        f"{ABOUT_FUSED_TABLE} What takes over 5 seconds ran once, and over 30 not again for "
        "its memory or with half of the tokens ignored.",
        *fused_table(report),
    ]


def step_section(report: Report) -> list[str]:
    return [
        "## A training step of a tiny model, CPU",
        "",
        f"{repeat('python benchmarks/training_step.py OUT')} To see that it runs: the model is too "
        f"small, and the machine was too busy, for its times to mean much. {report['processor']}, "
        f"commit {report['commit']}, torch {report['torch']}, threads: {report['threads']}. "
        f"{step_text(report)} Peak memory is beyond both models.",
        *step_table(report),
    ]


def small_section(report: Report) -> list[str]:
    return [
        "## Small calls, CPU",
        "",
        f"{repeat('python benchmarks/small_calls.py OUT')} {report['processor']}, "
        f"{report['instruction_set'].upper()}, commit {report['commit']}, torch "
        f"{report['torch']}, one thread, medians of {report['rounds']} interleaved rounds: "
        f"{ABOUT_SMALL_CALLS}",
        *small_table(report),
    ]


def fused_picture(report: Report) -> None:
    """docs/fused-head.png: memory against the vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["memory_by_vocabulary"]
    vocabularies = [row["vocabulary"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in rows[0]["extra_bytes"]:
        sizes = [row["extra_bytes"][name] / 2**30 for row in rows]
        axes.plot(vocabularies, sizes, marker="o", label=name)
    axes.plot(vocabularies, [v * 768 * 4 / 2**30 for v in vocabularies], "k:", label="dW alone")
    axes.set(xlabel="vocabulary", ylabel="extra memory, GiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PAGE.parent / "fused-head.png", dpi=110)


def load(name: str) -> Report | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


HOW = """\
All figures of this page come from the reports in `benchmarks/results/`
([which report is behind which figure](../benchmarks/results/README.md)). Two tables of the fused
head on a GPU come from `by-hand.json`, which was filled in by hand. To repeat the others, on a
machine that does nothing else:

```bash
make bench                               # the CPU's, then this page and its pictures
bash benchmarks/gpu_check.sh OUT         # a GPU's, with build and tests: about 8 minutes
bash benchmarks/gpu_check.sh OUT --choices   # shares of a copy by gap, alternatives: a minute
.venv/bin/python benchmarks/render.py    # this page and its pictures, from the reports
make docs                                # the figures of the other pages
```

One table alone: the command that stands before it. It writes a report into the folder OUT. Its
`python` is one that has this package: `.venv/bin/python` after `make bench`, or on a machine with a
GPU the one into which you installed it. `gpu_check.sh` needs nvcc and some packages, which its head
lists, and writes over the logs and reports of an earlier run in OUT.

To put a run on a GPU on this page: its reports go into a folder of their own in
`benchmarks/results/`, which `RUN` in `benchmarks/render_gpu.py` names."""


def page() -> str:
    lines = [
        "# Benchmarks",
        "",
        *HOW.splitlines(),
        "",
        *gpu_section(),
    ]
    sections = {
        "logits-cpu.json": logits_section,
        "fused-head-cpu.json": fused_section,
        "training-step-cpu.json": step_section,
        "small-calls-cpu.json": small_section,
    }
    for name, section in sections.items():
        report = load(name)
        lines += ["", *section(report)] if report else []
    return "\n".join(lines) + "\n"


def write_page() -> None:
    PAGE.write_text(page())
    render_readme.picture(PAGE.parent / "front.png")
    gpu_pictures(PAGE.parent)
    fused = load("fused-head-cpu.json")
    if fused:
        fused_picture(fused)
    logits = load("logits-cpu.json")
    if logits:
        logits_pictures(logits, PAGE.parent)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    write_page()
