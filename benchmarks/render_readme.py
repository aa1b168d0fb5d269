"""The figures and the picture of README.md, from benchmarks/results/ and the study's results:
docs/fill.py puts the tables and sentences between its marks, benchmarks/render.py draws the
picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import render_gpu
from render_gpu import Report, full_step, fused_times, least_to_most

sys.path.append(str(Path(__file__).parent.parent / "examples" / "sentiment"))
import study_page

Row = dict[str, str]
ROW_OF_LOGITS = 128256
ROW_OF_FUSED_HEAD = [8, 1024, 4096, 151936]
CPU_VOCABULARIES = (32000, 151936)
CPU_THREADS = 2
SMALL_ON_CPU = "small-calls-cpu.json"
LIGER, TRL = "Liger DPO (no KL)", "TRL's parts"


def load(name: str) -> Report:
    report: Report = json.loads((render_gpu.RESULTS / name).read_text())
    return report


def row(
    what: str,
    ours: str,
    eager: str = "-",
    compiled: str = "-",
    trl: str = "-",
    liger: str = "-",
    memory: str = "-",
) -> Row:
    """Times of others are multiples of ours."""
    return {
        "what": what,
        "tdpo_ext": ours,
        "eager PyTorch": eager,
        "torch.compile": compiled,
        "TRL's parts": trl,
        "Liger DPO (no KL)": liger,
        "memory: ours, eager": memory,
    }


def multiple(others: float | None, ours: float) -> str:
    if others is None:
        return "-"
    return f"{others / ours:.2f}x" if others < 2 * ours else f"{others / ours:.1f}x"


def of_logits(report: Report) -> Iterator[Row]:
    rows = report["measurements"]
    [one] = [r for r in rows if r["vocabulary"] == ROW_OF_LOGITS and r["ignored"] == 0]
    ours, extra = full_step(one, "tdpo_ext"), one["steps_extra_bytes"]
    assert ours is not None
    memory = [extra[f"{who}: forward + backward"] / 2**30 for who in ("tdpo_ext", "eager")]
    yield row(
        f"from logits, {report['rows']} tokens, V = {ROW_OF_LOGITS}",
        f"{ours:.2f} ms",
        *(multiple(full_step(one, peer), ours) for peer in ("eager", "torch.compile")),
        memory=f"{memory[0]:.1f} GiB, {memory[1]:.1f}",
    )


def shape_in_words(shape: list[int]) -> str:
    sequences, tokens, width, vocabulary = shape
    return f"{sequences} x {tokens} tokens, H = {width}, V = {vocabulary}"


def of_fused_head(
    report: Report, shape: list[int], dtype: str, ignored: tuple[float, ...]
) -> Iterator[Row]:
    on_card = report["device"] != "CPU"
    unit, size = ("GiB", 2**30) if on_card else ("MiB", 2**20)
    for share in ignored:
        one = next(
            r
            for r in report["measurements"]
            if (r["shape"], r["dtype"], r["ignored"]) == (shape, dtype, share)
        )
        times, extra = fused_times(one), one["extra_bytes"]
        ours = times["tdpo_ext"]
        memory = "-"
        if "eager" in extra:
            sizes = [extra[path] / size for path in ("tdpo_ext", "eager")]
            memory = f"{sizes[0]:.{int(on_card)}f} {unit}, {sizes[1]:.{int(on_card)}f}"
        kept = "" if share == 0 else f", {1 - share:.0%} of the tokens kept"
        yield row(
            f"fused head, {shape_in_words(shape)}{kept}",
            f"{ours:.0f} ms",
            multiple(times["eager"], ours),
            trl=multiple(times[TRL], ours),
            liger=multiple(times[LIGER], ours),
            memory=memory,
        )
        if share == 0:
            frozen = times["tdpo_ext, frozen head"]
            memory = f"{extra['tdpo_ext, frozen head'] / size:.{int(on_card)}f} {unit}"
            yield row("the same, head frozen (LoRA)", f"{frozen:.0f} ms", memory=memory)


def of_step(report: Report) -> Row:
    ours, eager = (report["ways"][name] for name in ("attach_tdpo", "eager formula"))
    return row(
        f"a whole training step, {render_gpu.counted(report['model']['parameters'])} parameters",
        f"{ours['milliseconds']:.0f} ms",
        multiple(eager["milliseconds"], ours["milliseconds"]),
        memory=f"{ours['peak_gib']:.1f} GiB in all, {eager['peak_gib']:.1f}",
    )


def of_small_call(report: Report) -> Row:
    ours, *others = (
        report["rows"][name]["microseconds"] for name in ("tdpo_ext", "eager", "torch.compile")
    )
    multiples = [multiple(other, ours) for other in others]
    return row("a small call, 2 tokens, V = 32", f"{ours:.0f} us", *multiples)


def logits_on_cpu(report: Report) -> Iterator[Row]:
    """float32 and bfloat16 together, where they differ."""
    for vocabulary in CPU_VOCABULARIES:
        shape = (vocabulary, CPU_THREADS)
        rows = [r for r in report["measurements"] if (r["vocabulary"], r["threads"]) == shape]
        ours = [r["nanoseconds"]["tdpo_ext in place: both"]["median"] for r in rows]
        multiples = []
        for peer in ("eager", "torch.compile"):
            theirs = [r["nanoseconds"][f"{peer}: both"]["median"] for r in rows]
            ratios = (a / b for a, b in zip(theirs, ours, strict=True))
            multiples.append(least_to_most(ratios, "{:.1f}") + "x")
        pairs = report["rows"] * vocabulary
        extra = [tensors(rows, who) for who in ("tdpo_ext in place", "eager")]
        yield row(
            f"from logits in place, {report['rows']} tokens, V = {vocabulary}",
            least_to_most((x * pairs / 1e6 for x in ours), "{:.1f}") + " ms",
            *multiples,
            memory=f"{extra[0]} tensors of logits, {extra[1]}",
        )


def tensors(rows: list[Report], who: str) -> str:
    """Extra memory, in tensors of logits."""
    return least_to_most((r["extra_bytes"][who] / r["tensor_bytes"] for r in rows), "{:.0f}")


def tables() -> dict[str, list[Row]]:
    logits, fused = render_gpu.load(render_gpu.LOGITS), render_gpu.load(render_gpu.FUSED)
    cpu, cpu_fused = load("logits-cpu.json"), load("fused-head-cpu.json")
    on_gpu = [
        *of_logits(logits),
        *of_fused_head(fused, ROW_OF_FUSED_HEAD, "bfloat16", (0.0, 0.5)),
        of_step(render_gpu.load(render_gpu.STEP)),
        of_small_call(render_gpu.load(render_gpu.SMALL)),
    ]
    shape = cpu_fused["measurements"][0]["shape"]
    on_cpu = [
        *logits_on_cpu(cpu),
        *of_fused_head(cpu_fused, shape, "float32", (0.0,)),
        of_small_call(load(SMALL_ON_CPU)),
    ]
    return {"on_a_gpu": filled(on_gpu), "on_a_cpu": filled(on_cpu)}


def filled(rows: list[Row]) -> list[Row]:
    """Without the columns in which nothing stands."""
    names = [name for name in rows[0] if any(r[name] != "-" for r in rows)]
    return [{name: r[name] for name in names} for r in rows]


def share(value: float) -> str:
    """A rounded fraction in words."""
    names = {2: "half", 3: "a third", 4: "a fourth", 5: "a fifth", 6: "a sixth", 7: "a seventh"}
    return names.get(round(1 / value), f"{value:.0%}")


def memory_of_the_head() -> str:
    rows = load("fused-head-cpu.json")["memory_by_vocabulary"]
    [extra] = [r["extra_bytes"] for r in rows if r["vocabulary"] == ROW_OF_LOGITS]
    full, frozen = (
        share(extra[path] / extra["eager"]) for path in ("tdpo_ext", "tdpo_ext, frozen head")
    )
    return (
        f"At a vocabulary of {ROW_OF_LOGITS:,} and 512 tokens, on the CPU in float32, the fused "
        f"head takes about {full} of the memory of the formula in eager PyTorch, the head's "
        f"gradient included; with a frozen head {frozen}."
    )


def about_the_gpu() -> str:
    logits, step = render_gpu.load(render_gpu.LOGITS), render_gpu.load(render_gpu.STEP)
    folder = f"benchmarks/results/{render_gpu.RUN.name}/"
    return (
        f"**{render_gpu.made_on(logits)}**, {logits['dtype']}. The training step: "
        f"{render_gpu.step_text(step)} {render_gpu.tests_passed().replace('../', '')} From "
        f"[{folder}]({folder})."
    )


def about_the_cpu() -> str:
    cpu, fused, small = map(load, ("logits-cpu.json", "fused-head-cpu.json", SMALL_ON_CPU))
    assert fused["threads"] == CPU_THREADS
    isa = fused["backend"]["instruction_set"].upper()
    fused_on = f"{isa}, processor and commit not recorded"
    if "processor" in fused:
        fused_on = f"{fused['processor']}, {isa}, commit {fused['commit']}"
    return "\n".join(
        (
            f"- From logits: {cpu['processor']}, {cpu['instruction_set'].upper()}, commit "
            f"{cpu['commit']}, torch {cpu['torch']}, {CPU_THREADS} threads. A range (x to y) has "
            "the results of float32 and bfloat16 at its ends, the smaller first.",
            f"- The fused head: {fused_on}, torch {fused['torch']}, {CPU_THREADS} threads, "
            "float32.",
            f"- The small call: {small['processor']}, {small['instruction_set'].upper()}, commit "
            f"{small['commit']}, torch {small['torch']}, one thread, float32.",
        )
    )


def where_it_is_slower() -> str:
    findings = render_gpu.fused_findings(render_gpu.load(render_gpu.FUSED))
    lines = [line for line in findings if "not everywhere faster than Liger" in line]
    for where, report in (
        ("a GPU", render_gpu.load(render_gpu.SMALL)),
        ("the CPU", load(SMALL_ON_CPU)),
    ):
        small = {name: row["microseconds"] for name, row in report["rows"].items()}
        if small["tdpo_ext"] > min(small["eager"], small["torch.compile"]):
            lines.append(
                f"- A call of a few tokens on {where} is bound by Python: {small['tdpo_ext']:.0f} "
                f"us against {small['eager']:.0f} of eager PyTorch and "
                f"{small['torch.compile']:.0f} of `torch.compile`."
            )
    lines += slower_distillation(load("distillation-cpu.json"))
    lines.append(
        "- With bfloat16 heads on a CPU that multiplies bfloat16 in hardware (AVX512-BF16, AMX) "
        "the fused head is slower than eager PyTorch, which rounds its logits to bfloat16. No "
        "report times this."
    )
    return "\n".join(lines)


def slower_distillation(report: Report) -> list[str]:
    """The sentence on a distillation loss if eager PyTorch is faster there, which keeps the logits
    that the fused head makes twice."""
    ours, eager = (report["milliseconds"][name] for name in ("tdpo_ext", "eager"))
    if ours <= eager:
        return []
    tokens, width, _, vocabulary = report["shape"]
    return [
        f"- A distillation loss from hidden states on the CPU ({tokens} tokens, H = {width}, V = "
        f"{vocabulary}) takes {ours:.0f} ms against {eager:.0f} of eager PyTorch, which keeps the "
        "logits and does not make them again in backward."
    ]


def texts() -> dict[str, str]:
    return {
        "memory_of_the_head": memory_of_the_head(),
        "about_the_gpu": about_the_gpu(),
        "about_the_cpu": about_the_cpu(),
        "where_it_is_slower": where_it_is_slower(),
    }


# The picture: reward against KL in the study, time and memory of the fused head.

PLACES = {  # of the names beside their points
    "tdpo_ext": (8, 4),
    "tdpo_ext, frozen head": (8, 2),
    "eager": (8, -4),
    TRL: (-8, 8),
    LIGER: (8, -4),
}


def picture(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary = study_page.committed()
    assert summary is not None
    figure, (reward, head) = pyplot.subplots(1, 2, figsize=(10, 4.1))
    draw_reward(reward, summary)
    draw_head(head, render_gpu.load(render_gpu.FUSED))
    figure.tight_layout(w_pad=3)
    figure.savefig(path, dpi=90)


def draw_reward(axes: Any, summary: Report) -> None:
    import study_pictures

    study_pictures.reward_against_kl(axes, summary)
    axes.set_title(f"Study: reward against KL, {len(summary['seeds'])} seeds")
    axes.set_ylim(bottom=0.28)  # room for the names
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=7.5, loc="lower right", ncols=2)


def draw_head(axes: Any, report: Report) -> None:
    rows = report["measurements"]
    [one] = [r for r in rows if r["shape"] == ROW_OF_FUSED_HEAD and r["ignored"] == 0]
    times = fused_times(one)
    for name, place in PLACES.items():
        ours = name.startswith("tdpo_ext")
        point = (times[name], one["extra_bytes"][name] / 2**30)
        axes.plot(*point, "o", color="#0072B2" if ours else "#777777", markersize=8)
        axes.annotate(
            "eager PyTorch" if name == "eager" else name,
            point,
            xytext=place,
            textcoords="offset points",
            ha="right" if place[0] < 0 and name == TRL else "left",
            weight="bold" if ours else "normal",
            fontsize=9,
        )
    axes.set_yscale("log")
    axes.set_yticks(sizes := [1, 2, 4, 8, 16, 32], map(str, sizes))
    axes.minorticks_off()
    axes.set_xlim(0, 210)
    axes.set(
        title="Fused head: time and memory of a step",
        xlabel=f"forward + backward, ms; {report['device']}, {one['dtype']},\n"
        f"{shape_in_words(ROW_OF_FUSED_HEAD)}, all tokens kept",
        ylabel="memory beyond the batch, GiB",
    )
    axes.grid(alpha=0.3)
