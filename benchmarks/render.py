"""docs/benchmarks.md from benchmarks/results/*.json: `python benchmarks/render.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from render_logits import logits_pictures, logits_section
from tables import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Report = dict[str, Any]


def share_of_copy(row: Report, name: str) -> str:
    """The bandwidth of a pass as a share of the copy's."""
    needed, taken = row["needed_bytes"], row["passes_ms"]
    if name not in taken:
        return "out of memory"
    copy = needed["copy"] / taken["copy"]["median"]
    return f"{needed[name] / taken[name]['median'] / copy:.0%}"


def of_batch(row: Report) -> list[str]:
    return [str(row["vocabulary"]), f"{row['ignored']:.0%}"]


def bandwidth_rows(report: Report, names: list[str]) -> Iterable[list[str]]:
    for row in report["measurements"]:
        copy = row["needed_bytes"]["copy"] / row["passes_ms"]["copy"]["median"] / 1e9
        shares = [share_of_copy(row, name) for name in names]
        yield [*of_batch(row), f"{copy:.2f}", *shares]


def peer_rows(report: Report, peers: list[str]) -> Iterable[list[str]]:
    for row in report["measurements"]:
        ours = row["steps_ms"]["tdpo_ext in place: forward + backward"]["median"]
        cells = [f"{ours:.2f}"]
        for peer in peers:
            name = f"{peer}: forward + backward"
            taken = row["steps_ms"].get(name)
            if taken is None:
                cells.append("out of memory")
                continue
            tensors = row["steps_extra_bytes"][name] / row["tensor_bytes"]
            cells.append(f"{taken['median'] / ours:.2f}x, {tensors:.2f}")
        yield [*of_batch(row), *cells]


def gpu_section(report: Report) -> list[str]:
    passes = ["forward", "backward, any", "backward, tdpo1", "backward, tdpo2"]
    steps = [name for row in report["measurements"] for name in row["steps_ms"]]
    peers = list(dict.fromkeys(name.split(": ")[0] for name in steps if "backward" in name))
    return [
        f"## On a GPU: {report['device']}",
        "",
        f"Made by `benchmarks/gpu_check.sh`: torch {report['torch']}, {report['dtype']}, "
        f"{report['rows']} rows, medians of {report['rounds']} interleaved rounds.",
        "",
        "Bandwidth of each pass, bytes counted as the algebra needs them, as a share of what a "
        "device-to-device copy of one logits tensor reaches in the same rounds:",
        *table(
            ["V", "ignored", "copy, TB/s", *passes],
            bandwidth_rows(report, passes),
        ),
        "",
        "Forward + backward: ours in place in milliseconds; for each the time as a multiple of "
        "that, and the extra memory at its peak in logits tensors:",
        *table(["V", "ignored", "ours in place, ms", *peers], peer_rows(report, peers)),
    ]


def fused_rows(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        times, extra = row["milliseconds"], row["extra_bytes"]
        units = [times[f"unit of {name}"] for name in ("logits", "dh", "dW")]
        sequences, tokens, width, vocabulary = row["shape"]
        shape = f"{sequences} x {tokens}, {width}, {vocabulary}"
        for name, taken in times.items():
            if name.startswith("unit"):
                continue
            bare = "-"
            if name in report["ways"]:
                limit = sum(n * unit for n, unit in zip(report["ways"][name], units, strict=True))
                bare = f"{taken / limit:.2f}x"
            memory = f"{extra[name] / 2**20:.0f}" if name in extra else "-"
            of_ours = f"{taken / times['tdpo_ext']:.2f}x"
            kind = [shape, row["dtype"], f"{row['ignored']:.0%}"]
            yield [*kind, name, f"{taken:.0f}", bare, of_ours, memory]


def fused_section(report: Report) -> list[str]:
    head = ["2B x T, H, V", "dtype", "ignored", "what", "ms", "against its bare products"]
    return [
        f"## The fused head, {report['device']}",
        "",
        f"Made by `benchmarks/fused_head.py`: torch {report['torch']}, {report['threads']} "
        f"threads, medians of {report['rounds']} interleaved rounds of forward and backward of "
        "TDPO2 if not said otherwise. Bare products: as many of the same as that way has units "
        "([fused-head.md](fused-head.md)), operands cast beforehand. `eager` and Liger round "
        "bfloat16 logits to bfloat16, ours and TRL's are float32. Liger's is DPO: no KL. What "
        "takes over 5 seconds ran once, and over 30 not again for its memory or with half of the "
        "tokens ignored. Memory is beyond the batch, gradients included.",
        *table([*head, "against tdpo_ext", "extra memory, MiB"], fused_rows(report)),
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


def page() -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `benchmarks/render.py` from `benchmarks/results/`.",
        "",
    ]
    gpu = load("gpu-against-copy.json")
    lines += gpu_section(gpu) if gpu else ["No measurements on a GPU are committed yet."]
    for device in ("cuda", "cpu"):
        fused = load(f"fused-head-{device}.json")
        lines += ["", *fused_section(fused)] if fused else []
    logits = load("logits-cpu.json")
    lines += ["", *logits_section(logits)] if logits else []
    return "\n".join(lines) + "\n"


def write_page() -> None:
    PAGE.write_text(page())
    fused = load("fused-head-cpu.json")
    if fused:
        fused_picture(fused)
    logits = load("logits-cpu.json")
    if logits:
        logits_pictures(logits, PAGE.parent)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    write_page()
