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
from tables import table

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


def distillation_section(report: Report) -> list[str]:
    times, (tokens, width, teacher_width, vocabulary) = report["milliseconds"], report["shape"]
    low, high = report["kl"]
    rows = []
    for name, taken in times.items():
        error = report["error"].get(name)
        ratio = f"{taken / times['products']:.2f}x"
        rows.append([name, f"{taken:.0f}", ratio, "-" if error is None else f"{error:.0e}"])
    threads = "one thread" if report["threads"] == 1 else f"{report['threads']} threads"
    return [
        "## A distillation loss from hidden states, CPU",
        "",
        f"{repeat('python benchmarks/distillation_cpu.py OUT')} {report['processor']}, "
        f"{report['instruction_set'].upper()}, commit {report['commit']}, torch "
        f"{report['torch']}, {threads}, float32, medians of {report['rounds']} interleaved rounds: "
        "forward and backward of the mean of KL(student ‖ teacher), with the gradient of the "
        f"student's head. {tokens} tokens, H = {width}, the teacher's H = {teacher_width}, V = "
        f"{vocabulary}. `products` are the matrix products of ours: both logits twice, dh, dW. "
        "Eager PyTorch keeps the logits instead of making them twice. TRL is its "
        "`ChunkedDivergenceFunction`. `with entropy`: the same call with an entropy bonus. The "
        f"last column is the largest relative error of values between {low:.0e} and {high:.0e} "
        "nats.",
        *table(["loss", "ms", "of the products", "error of small values"], rows),
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


def divergences_section(report: Report) -> list[str]:
    names = list(report["measurements"][0]["nanoseconds"])
    rows = []
    for measured in report["measurements"]:
        for which in ("forward", "backward"):
            times = [measured["nanoseconds"][name][which] for name in names]
            rows.append([measured["dtype"], f"{measured['gap']}", which])
            rows[-1] += [f"{times[0]:.2f} ns", *(f"{time / times[0]:.2f}x" for time in times[1:])]
    return [
        "## Divergences in both directions and entropies, CPU",
        "",
        f"{repeat('python benchmarks/divergences_cpu.py OUT')} {report['processor']}, "
        f"{report['instruction_set'].upper()}, commit {report['commit']}, torch "
        f"{report['torch']}, one thread, {report['rows']} rows, V = {report['vocabulary']}, "
        f"medians of {report['rounds']} interleaved rounds. Nanoseconds for each pair of logits, "
        "and the others' times as multiples. All but `token_stats` give KL(pi_ref || pi), "
        "KL(pi || pi_ref) and the policy's entropy, with a gradient from each. The gap is the "
        "standard deviation of policy minus reference logits.",
        *table(["dtype", "gap", "pass", *names], rows),
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

To repeat one table, run the command above it, which writes a report into the folder OUT. Its
`python` is one that has this package: `.venv/bin/python` after `make bench`, or on a machine with a
GPU the one into which you installed it. What `gpu_check.sh` does and needs:
[kernels.md](kernels.md#with-a-gpu).

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
        "distillation-cpu.json": distillation_section,
        "training-step-cpu.json": step_section,
        "small-calls-cpu.json": small_section,
        "divergences-cpu.json": divergences_section,
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
