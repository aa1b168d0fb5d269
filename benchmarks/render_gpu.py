"""The part of docs/benchmarks.md, and the pictures, that come from a run on a GPU.

Each run has a folder in results/, named after card and commit, with the reports of
benchmarks/gpu_check.sh. The pages show the run that RUN names, and the figures of BY_HAND, which
nothing has measured since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tables import table

Report = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
RUN = RESULTS / "h200-2a7c665"
BY_HAND = RESULTS / "h200-3f694a0" / "by-hand.json"
LOGITS, FUSED = "gpu-against-copy.json", "fused-head-cuda.json"
STEP, SMALL = "training-step-cuda.json", "small-calls-cuda.json"
CHOICES, CHECK, PARITY = "choices.json", "gpu-check.json", "parity.json"
KINDS = {
    "any": "any",
    "tdpo1": "TDPO1",
    "tdpo2": "TDPO2",
    "dpo": "DPO",
    "rejected": "rejected rows of TDPO2",
}
AS_IT_STANDS = "as it stands"
TIME_CHOICES = "bash benchmarks/gpu_check.sh OUT --choices"
PASSES_OF_CHOICES = {
    "forward": (),
    "one side": ("tdpo1", "dpo"),
    "both sides": ("any", "rejected"),
}


def load(name: str) -> Report:
    """A report of the run."""
    report: Report = json.loads((RUN / name).read_text())
    return report


def by_hand() -> Report:
    report: Report = json.loads(BY_HAND.read_text())
    return report


NOTED = "Noted by hand (`by-hand.json`) from a script that was not kept"


def made_on(report: Report) -> str:
    """Card, commit, torch and CUDA, to be named at every table. A report that lacks one of them has
    it from another of its run."""
    known = {**load(LOGITS), **report}
    return (
        f"{known['device']}, commit {known['commit']}, torch {known['torch']}, CUDA {known['cuda']}"
    )


def repeat(command: str) -> str:
    """The line before a table that says how to take it anew."""
    return f"To repeat: `{command}`."


def percent(value: float) -> str:
    return f"{value:.0%}"


def least_to_most(values: Iterable[float], form: str = "{:.0f}") -> str:
    """A range in words, or one number where both ends look the same."""
    values = list(values)
    ends = [form.format(end) for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def percents(values: Iterable[float]) -> str:
    return least_to_most(100 * value for value in values) + " %"


# From logits


def share_of_copy(row: Report, name: str) -> float | None:
    """The bandwidth of a pass as a share of the copy's; None: out of memory."""
    needed, taken = row["needed_bytes"], row["passes_ms"]
    if name not in taken:
        return None
    copy = needed["copy"] / taken["copy"]["median"]
    return needed[name] / taken[name]["median"] / copy


def of_batch(row: Report) -> list[str]:
    return [str(row["vocabulary"]), percent(row["ignored"])]


def bandwidth_rows(report: Report, names: list[str]) -> Iterable[list[str]]:
    for row in report["measurements"]:
        copy = row["needed_bytes"]["copy"] / row["passes_ms"]["copy"]["median"] / 1e9
        shares = [share_of_copy(row, name) for name in names]
        cells = ["out of memory" if share is None else percent(share) for share in shares]
        yield [*of_batch(row), f"{copy:.2f}", *cells]


def full_step(row: Report, provider: str) -> float | None:
    """Milliseconds of forward and backward."""
    taken = row["steps_ms"].get(f"{provider}: forward + backward")
    return None if taken is None else float(taken["median"])


def providers(report: Report) -> list[str]:
    names = [name for row in report["measurements"] for name in row["steps_ms"]]
    return list(dict.fromkeys(name.split(": ")[0] for name in names if "backward" in name))


def peer_rows(report: Report, peers: list[str]) -> Iterable[list[str]]:
    for row in report["measurements"]:
        ours, cells = full_step(row, "tdpo_ext"), []
        assert ours is not None
        for peer in peers:
            taken = full_step(row, peer)
            if taken is None:
                cells.append("out of memory")
                continue
            extra = row["steps_extra_bytes"][f"{peer}: forward + backward"] / row["tensor_bytes"]
            cells.append(f"{taken / ours:.2f}x, {extra:.2f}")
        yield [*of_batch(row), f"{ours:.2f}", *cells]


def error_rows(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        errors = [row["errors"][who][of] for of in ("log p", "KL") for who in ("tdpo_ext", "eager")]
        yield [*of_batch(row), *(f"{error:.0e}" for error in errors)]


def kernel_times(build: str) -> list[Report]:
    """What benchmarks/kernel_times.cu has measured of a build with some of choices.cuh."""
    return [row for row in load(CHOICES)["measurements"] if row["build"] == build]


def gap_rows(rows: list[Report]) -> Iterable[list[str]]:
    for row in rows:
        copy = f"{row['copy_gigabytes_per_second'] / 1e3:.2f}"
        shares = [*row["forward"].values(), *(row["backward"][kind] for kind in KINDS)]
        yield [str(row["vocabulary"]), row["dtype"], copy, *map(percent, shares)]


def logits_section(report: Report) -> list[str]:
    passes = ["forward", *(f"backward, {kind}" for kind in ("any", "tdpo1", "tdpo2", "dpo"))]
    names = ["forward", *(f"backward, {KINDS[name.split(', ')[1]]}" for name in passes[1:])]
    peers = providers(report)
    of_errors = [f"{of}, {who}" for of in ("log p", "KL") for who in ("tdpo_ext", "eager")]
    return [
        "### From logits",
        "",
        f"{made_on(report)}. {repeat('python benchmarks/gpu_against_copy.py OUT')} "
        f"{report['dtype']}, {report['rows']} rows, a policy that lies 0.3 from its reference, "
        f"medians of {report['rounds']} interleaved rounds. Bandwidth of each pass, bytes counted "
        "as the algebra needs them, as a share of what a device-to-device copy of one logits "
        "tensor reaches in the same rounds:",
        *table(["V", "ignored", "copy, TB/s", *names], bandwidth_rows(report, passes)),
        "",
        *gap_section(),
        f"{made_on(report)}. From the same run. Forward + backward, any upstream gradients: ours "
        "in milliseconds; for each the time as a multiple of that, and the extra memory at its "
        "peak in logits tensors. `eager` is the formula in PyTorch (`benchmarks/formula.py`), "
        "which `torch.compile` compiles. Liger's kernel takes the same two tensors to another "
        "number, the total variation instead of the KL:",
        *table(["V", "ignored", "tdpo_ext, ms", *peers], peer_rows(report, peers)),
        "",
        f"{made_on(report)}. From the same run. The largest error of 32 rows against float64, "
        "relative to the largest value:",
        *table(["V", "ignored", *of_errors], error_rows(report)),
    ]


def gap_section() -> list[str]:
    report, rows = load(CHOICES), kernel_times(AS_IT_STANDS)
    gaps = [f"forward, gap {gap}" for gap in rows[0]["forward"]]
    choices = ", ".join(f"`{name} {value}`" for name, value in report["choices"].items())
    return [
        f"{made_on(report)}. {repeat(TIME_CHOICES)} The same share by how far the policy lies from "
        "its reference (standard deviation of the gap of two logits, which are N(0, 1)) and by the "
        "kind of upstream gradients, from `benchmarks/kernel_times.cu`, without PyTorch. Shares "
        "above 100 %: there the copy of the same run reached less. V = 4096 in float32 is a tile "
        "of the fused head:",
        *table(["V", "dtype", "copy, TB/s", *gaps, *KINDS.values()], gap_rows(rows)),
        "",
        "![Share of a copy's bandwidth](gpu-copy.png)",
        "",
        f"{made_on(report)}. From the same run. What each alternative of `csrc/cuda/choices.cuh` "
        f"gains over the build as it stood at that commit ({choices}). Forward: all gaps; one "
        "side: TDPO1 and DPO; both sides: any and rejected rows. "
        "[What was chosen, and why](tried.md#chosen-on-a-gpu):",
        *table(["alternative", "pass", *map(name_of, rows)], choice_rows(rows)),
        "",
    ]


def name_of(row: Report) -> str:
    return f"{row['dtype']}, V = {row['vocabulary']}"


def mean_share(row: Report, names: tuple[str, ...]) -> float:
    """Shares of forward over all gaps (no names), or of some kinds of backward."""
    shares = [row["backward"][name] for name in names] or list(row["forward"].values())
    return sum(shares) / len(shares)


def choice_rows(now: list[Report]) -> Iterable[list[str]]:
    for build in dict.fromkeys(row["build"] for row in load(CHOICES)["measurements"]):
        for what, names in PASSES_OF_CHOICES.items():
            if build != AS_IT_STANDS and what in passes_of_choice(build):
                pairs = zip(kernel_times(build), now, strict=True)
                gains = [mean_share(a, names) / mean_share(b, names) - 1 for a, b in pairs]
                yield [build, what, *(f"{100 * gain:+.1f} %" for gain in gains)]


def passes_of_choice(build: str) -> set[str]:
    """The passes that a build changes, by its name in benchmarks/gpu_check.sh."""
    changed = {what for what in PASSES_OF_CHOICES if build.startswith(what)}
    return changed or {"one side", "both sides"}


# The fused head


def shape_of(row: Report) -> str:
    sequences, tokens, width, vocabulary = row["shape"]
    return f"{sequences} x {tokens}, {width}, {vocabulary}"


def bare_products(row: Report, units: list[float]) -> float:
    """Milliseconds of so many units of logits, dh and dW."""
    alone = [row["milliseconds"][f"unit of {name}"] for name in ("logits", "dh", "dW")]
    return sum(n * unit for n, unit in zip(units, alone, strict=True))


def fused_times(row: Report) -> dict[str, float]:
    """Milliseconds by path or peer."""
    return {
        name: taken for name, taken in row["milliseconds"].items() if not name.startswith("unit")
    }


def fused_rows(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        times, extra = fused_times(row), row["extra_bytes"]
        for name, taken in times.items():
            units = report["ways"].get(name)
            bare = f"{taken / bare_products(row, units):.2f}x" if units else "-"
            cells = [f"{taken:.0f}", bare, f"{taken / times['tdpo_ext']:.2f}x"]
            memory = f"{extra[name] / 2**20:.0f}" if name in extra else "-"
            kind = [shape_of(row), row["dtype"], percent(row["ignored"])]
            yield [*kind, name, *cells, memory]


def fused_table(report: Report) -> list[str]:
    head = ["2B x T, H, V", "dtype", "ignored", "what", "ms", "against its bare products"]
    return table([*head, "against tdpo_ext", "extra memory, MiB"], fused_rows(report))


FUSED_CHOICES = "python benchmarks/fused_head.py OUT --device cuda --choices"
ABOUT_FUSED_TABLE = (
    "Forward and backward of TDPO2 if not said otherwise. Bare products: as many of the same as "
    "that path has units ([fused-head.md](fused-head.md)), operands cast beforehand. `eager` and "
    "Liger round bfloat16 logits to bfloat16, ours and TRL's are float32. Liger's is DPO: no KL. "
    "Memory is beyond the batch, gradients included."
)


def unit_rows(report: Report) -> Iterable[list[str]]:
    for row in report["measurements"]:
        sequences, tokens, width, vocabulary = row["shape"]
        operations = 2 * sequences * tokens * (1 - row["ignored"]) * width * vocabulary
        cells = []
        for name in ("logits", "dh", "dW"):
            taken = row["milliseconds"][f"unit of {name}"]
            cells += [f"{taken:.1f}", f"{operations / taken / 1e9:.0f}"]
        yield [shape_of(row), percent(row["ignored"]), *cells]


def fused_section(report: Report) -> list[str]:
    units = [f"{name}, {what}" for name in ("logits", "dh", "dW") for what in ("ms", "TFLOP/s")]
    return [
        "### The fused head",
        "",
        f"{made_on(report)}. {repeat('python benchmarks/fused_head.py OUT --device cuda')} "
        f"Medians of {report['rounds']} interleaved rounds. {ABOUT_FUSED_TABLE}",
        *fused_table(report),
        "",
        "![Time and memory of the fused head](gpu-fused-head.png)",
        "",
        f"{made_on(report)}. From the same run. The bare products, one unit each:",
        *table(["2B x T, H, V", "ignored", *units], unit_rows(report)),
        "",
        *chunk_section(by_hand()),
        "",
        *products_section(by_hand()),
    ]


def chunk_section(noted: Report) -> list[str]:
    chunks = noted["chunk_bytes"]
    rows = [[str(r["mebibytes"]), str(r["full_ms"]), str(r["frozen_ms"])] for r in chunks["rows"]]
    return [
        f"{made_on(noted['run'])}. Milliseconds by `chunk_bytes`, at {shape_of(chunks)}, before "
        "gradients of logits were kept in bfloat16: only the largest held a pair's logits then, so "
        f"that they need not be made again, and a step took {chunks['peak_gib_of_the_last']} GiB. "
        f"{NOTED}; `{FUSED_CHOICES}` takes such a table now, into a report of its own:",
        *table(["chunk_bytes, MiB", "full, ms", "frozen head, ms"], rows),
    ]


def products_section(noted: Report) -> list[str]:
    products = noted["products_teraflops"]
    rows = [[name, *map(str, values)] for name, values in products["results"].items()]
    columns = [f"{n} columns" for n in products["columns"]]
    return [
        f"{made_on(noted['run'])}. TFLOP/s of products alone by the columns of a tile, "
        f"{products['rows']} tokens, H = {products['width']}, bfloat16 operands. {NOTED}; "
        f"whole steps by the columns of a tile: `{FUSED_CHOICES}`.",
        *table(["result", *columns], rows),
    ]


# A whole step, and small calls


def step_rows(report: Report) -> Iterable[list[str]]:
    alone = report["ways"]["backbone alone"]
    wanted = report["ways"]["eager formula"]
    gib = "{:.1f}" if alone["peak_gib"] > 1 else "{:.3f}"
    for name, row in report["ways"].items():
        against = f"{row['milliseconds'] / alone['milliseconds']:.2f}x"
        above = row["peak_gib"] - alone["peak_gib"]
        memory = [gib.format(row["peak_gib"]), gib.format(above)]
        cells = [f"{row['milliseconds']:.0f}", against, *memory]
        yield [name, *cells, *(of_formula(row, wanted, of) for of in ("loss", "gradient_norm"))]


def of_formula(row: Report, wanted: Report, name: str) -> str:
    if row is wanted or name not in row:
        return "-"
    return f"{abs(row[name] / wanted[name] - 1):.0e}"


def step_table(report: Report) -> list[str]:
    head = ["what", "ms", "against the backbones", "peak, GiB", "above the backbones, GiB"]
    head += ["loss, off the formula's", "gradient norm, off the formula's"]
    return table(head, step_rows(report))


def counted(number: float) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def step_text(report: Report) -> str:
    model = report["model"]
    return (
        f"Llama-shaped policy and reference of {counted(model['parameters'])} parameters each (H = "
        f"{model['hidden_size']}, {model['layers']} layers, V = {model['vocabulary']}, tied), "
        f"{report['dtype']}, {report['sequences']} x {report['tokens']} tokens, "
        f"{report['ignored']:.0%} of them prompt, gradient checkpointing, forward and backward."
    )


def step_section(report: Report) -> list[str]:
    return [
        "### A whole training step",
        "",
        f"{made_on(report)}. {repeat('python benchmarks/training_step.py OUT --device cuda')} "
        f"{step_text(report)} The limit is the two backbones alone, without head and loss. Peak "
        "memory is all that was allocated, models included.",
        *step_table(report),
    ]


ABOUT_SMALL_CALLS = (
    "forward and backward of the loss of one pair of one token each, V = 32, by the wall clock. "
    "`eager` is the whole loss in PyTorch, which `torch.compile` compiles. Two bounds: "
    "`token_stats` has no loss of pairs, and `save and sum` is an autograd.Function that only "
    "saves its inputs and sums one."
)


def small_table(report: Report) -> list[str]:
    rows = report["rows"]
    ours = rows["tdpo_ext"]["microseconds"]
    cells = [
        [name, f"{row['microseconds']:.0f}", f"{row['microseconds'] / ours:.2f}x"]
        for name, row in rows.items()
    ]
    head = ["what", "us", "against tdpo_ext"]
    if "kernels" in rows["tdpo_ext"]:
        head.append("kernels")
        cells = [
            [*line, str(row["kernels"])] for line, row in zip(cells, rows.values(), strict=True)
        ]
    return table(head, cells)


def small_section(report: Report) -> list[str]:
    return [
        "### Small calls",
        "",
        f"{made_on(report)}. {repeat('python benchmarks/small_calls.py OUT --device cuda')} "
        f"Medians of {report['rounds']} interleaved rounds: {ABOUT_SMALL_CALLS} Almost all is the "
        "host's time. Kernels are all that run on the GPU, PyTorch's own among them.",
        *small_table(report),
    ]


# Findings


def findings() -> list[str]:
    """Sentences on the limits, and on what falls short of them, from the numbers of the tables."""
    return [
        f"- {tests_passed()}",
        bandwidth_finding(),
        formula_finding(load(LOGITS)),
        *fused_findings(load(FUSED)),
        step_finding(load(STEP)),
        small_finding(load(SMALL)),
    ]


def tests_passed() -> str:
    tests = load(CHECK)["tests"]["last_line"].split(", ")
    failed, passed = (
        next(int(part.split()[0]) for part in tests if part.endswith(outcome))
        for outcome in ("failed", "passed")
    )
    bounds = load(PARITY)["rows"]
    kept = [row for row in bounds if row["kept"]]
    return (
        f"At that commit {passed} of {passed + failed} tests passed on the GPU, and {len(kept)} "
        f"of {len(bounds)} bounds of `python -m tdpo_ext.parity` were kept "
        "([what failed](../benchmarks/results/README.md#the-run-on-a-gpu))."
    )


def bandwidth_finding() -> str:
    rows = [row for row in kernel_times(AS_IT_STANDS) if row["dtype"] == "bfloat16"]
    forward, backward = (
        {row["vocabulary"]: percents(row[which].values()) for row in rows}
        for which in ("forward", "backward")
    )
    copy = {row["vocabulary"]: row["copy_gigabytes_per_second"] / 1e3 for row in rows}
    nearest, *_, farthest = rows[0]["forward"]
    return (
        f"- From logits in bfloat16, for gaps of {nearest} to {farthest} between policy and "
        "reference, forward and backward run at these shares of a copy's bandwidth: "
        + "; ".join(
            f"at V = {v} {forward[v]} and {backward[v]} of {copy[v]:.2f} TB/s" for v in forward
        )
        + "."
    )


def formula_finding(report: Report) -> str:
    rows = [row for row in report["measurements"] if row["ignored"] == 0]
    eager, compiled = (
        least_to_most((full_step(r, peer) / full_step(r, "tdpo_ext") for r in rows), "{:.1f}")
        for peer in ("eager", "torch.compile")
    )
    return (
        f"- The formula takes {eager} times as long in eager PyTorch and {compiled} times under "
        "`torch.compile`, with all tokens kept."
    )


def against_products(report: Report, path: str) -> str:
    """The time of a path as a multiple of its bare products, no token ignored."""
    rows = [row for row in report["measurements"] if row["ignored"] == 0]
    units = report["ways"][path]
    return least_to_most(
        (row["milliseconds"][path] / bare_products(row, units) for row in rows), "{:.2f}"
    )


def fused_findings(report: Report) -> list[str]:
    forward, full, again, frozen = (
        against_products(report, f"tdpo_ext{path}")
        for path in (": forward", "", ", recomputed", ", frozen head")
    )
    lines = [
        f"- The fused head takes {forward} times its bare products in forward, {full} in a full "
        f"step, {again} in one that makes logits again, {frozen} with a frozen head, with all "
        "tokens kept."
    ]
    for ignored in (0.0, 0.5):
        rows = [row for row in report["measurements"] if row["ignored"] == ignored]
        times = [fused_times(row) for row in rows]
        pairs = [(one["tdpo_ext"], one["Liger DPO (no KL)"]) for one in times]
        ours, theirs = (least_to_most(side) for side in zip(*pairs, strict=True))
        kept = "all tokens" if ignored == 0 else f"{1 - ignored:.0%} of the tokens"
        who = "faster" if all(a < b for a, b in pairs) else "not everywhere faster"
        lines.append(
            f"- With {kept} kept the fused head is {who} than Liger's fused DPO, which computes no "
            f"KL: {ours} ms against {theirs}."
        )
    return lines


def step_finding(step: Report) -> str:
    alone, logits, inside = (
        step["ways"][name] for name in ("backbone alone", "TDPOLoss", "attach_tdpo")
    )
    times = [f"{x['milliseconds'] / alone['milliseconds']:.2f}" for x in (inside, logits)]
    above = [f"{x['peak_gib'] - alone['peak_gib']:.1f}" for x in (inside, logits)]
    return (
        f"- A whole training step takes {times[0]} times as long as its backbones alone with "
        f"`attach_tdpo`, {above[0]} GiB above them, and {times[1]} times with `TDPOLoss` on "
        f"logits, {above[1]} GiB above."
    )


def small_finding(report: Report) -> str:
    rows = report["rows"]
    ours, eager = rows["tdpo_ext"], rows["eager"]
    return (
        "- A call of a few tokens is bound by the host: "
        f"{ours['microseconds'] / eager['microseconds']:.2f} of the time of eager PyTorch, with "
        f"{ours['kernels']} kernels instead of {eager['kernels']}."
    )


def gpu_section() -> list[str]:
    logits = load(LOGITS)
    return [
        f"## On a GPU: {made_on(logits)}",
        "",
        *findings(),
        "",
        *logits_section(logits),
        "",
        *fused_section(load(FUSED)),
        "",
        *step_section(load(STEP)),
        "",
        *small_section(load(SMALL)),
    ]


# Pictures


def copy_picture(rows: list[Report], path: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    names = [name_of(row) for row in rows]
    gaps, backward = panels
    for row, name in zip(rows, names, strict=True):
        distances = [float(gap) for gap in row["forward"]]
        gaps.semilogx(distances, list(row["forward"].values()), "o-", label=name)
    gaps.set(title="forward", xlabel="gap of policy and reference", ylabel="share of a copy")
    gaps.set_xticks(distances, list(row["forward"]))
    gaps.minorticks_off()
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places = [place + width * (index - (len(rows) - 1) / 2) for place in range(len(KINDS))]
        backward.bar(places, [row["backward"][kind] for kind in KINDS], width)
    labels = [name.replace(" rows of ", "\nrows of ") for name in KINDS.values()]
    backward.set_xticks(range(len(KINDS)), labels, fontsize=8)
    backward.set(title="backward")
    for axes in panels:
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylim(0, 1.15)
    gaps.legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(made_on(load(CHOICES)), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def fused_picture(report: Report, path: Path) -> None:
    from matplotlib import pyplot

    rows = [row for row in report["measurements"] if row["ignored"] == 0]
    names = [name for name in fused_times(rows[0]) if "TDPO1" not in name]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(9, 4))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + width * (index - (len(names) - 1) / 2) for place in range(len(rows))]
        taken = [fused_times(row)[name] for row in rows]
        times.bar(places, taken, width, label=name)
        sizes = [row["extra_bytes"].get(name, 0) / 2**30 for row in rows]
        memory.bar(places, sizes, width)
    for index, row in enumerate(rows):
        least = bare_products(row, [2, 1, 1])
        line = {"color": "black", "linestyle": ":", "label": "4 units" if not index else None}
        times.plot([index - 0.4, index + 0.4], [least, least], **line)
    shapes = [f"H = {row['shape'][2]}\nV = {row['shape'][3]}" for row in rows]
    for axes in (times, memory):
        axes.set_xticks(range(len(rows)), shapes, fontsize=8)
    times.set_ylabel("forward + backward, ms")
    memory.set(ylabel="extra memory, GiB")
    named = times.get_legend_handles_labels()
    figure.legend(*named, frameon=False, fontsize=8, ncols=4, loc="lower center")
    figure.suptitle(f"{made_on(report)}; 8 x 1024 tokens, all kept", fontsize=9)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=90)


def gpu_pictures(folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    copy_picture(kernel_times(AS_IT_STANDS), folder / "gpu-copy.png")
    fused_picture(load(FUSED), folder / "gpu-fused-head.png")
