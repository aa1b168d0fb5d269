"""The figures of README.md, from benchmarks/results/: docs/fill.py puts them between its marks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import render_gpu
from render_gpu import Report, bare_products, full_step, fused_times, least_to_most

Row = dict[str, str]
ROW_OF_LOGITS = 128256
ROW_OF_FUSED_HEAD = [8, 1024, 4096, 151936]
CPU_VOCABULARIES = (32000, 151936)


def load(name: str) -> Report:
    report: Report = json.loads((render_gpu.RESULTS / name).read_text())
    return report


def row(what: str, ours: str, limit: str, eager: str, compiled: str, memory: str) -> Row:
    return {
        "what": what,
        "tdpo_ext": ours,
        "against its limit": limit,
        "eager PyTorch": eager,
        "torch.compile": compiled,
        "memory, and eager's": memory,
    }


def of_logits(report: Report) -> Iterator[Row]:
    rows = report["measurements"]
    [one] = [r for r in rows if r["vocabulary"] == ROW_OF_LOGITS and r["ignored"] == 0]
    ours, extra = full_step(one, "tdpo_ext"), one["steps_extra_bytes"]
    assert ours is not None
    needed, copy = one["needed_bytes"], one["passes_ms"]["copy"]["median"]
    share = (needed["forward"] + needed["backward, any"]) / ours * copy / needed["copy"]
    others = [full_step(one, peer) or 0.0 for peer in ("eager", "torch.compile")]
    memory = [extra[f"{who}: forward + backward"] / 2**30 for who in ("tdpo_ext", "eager")]
    yield row(
        f"from logits, {report['rows']} tokens, V = {ROW_OF_LOGITS}",
        f"{ours:.2f} ms",
        f"{share:.0%} of a copy's bandwidth",
        *(f"{other / ours:.1f}x" for other in others),
        f"{memory[0]:.1f} GiB, {memory[1]:.1f}",
    )


def of_fused_head(report: Report) -> Iterator[Row]:
    rows = report["measurements"]
    [one] = [r for r in rows if r["shape"] == ROW_OF_FUSED_HEAD and r["ignored"] == 0]
    times, extra = fused_times(one, on_card=True), one["extra_bytes"]
    sequences, tokens, width, vocabulary = one["shape"]
    shape = f"{sequences} x {tokens} tokens, H = {width}, V = {vocabulary}"
    names = {
        "tdpo_ext": f"from hidden states, {shape}",
        "tdpo_ext, frozen head": "the same with a frozen head",
    }
    for path, name in names.items():
        ours, eager = times[path], times["eager"] if path == "tdpo_ext" else None
        assert ours is not None
        memory = f"{extra[path] / 2**30:.1f} GiB"
        units = report["ways"][path]
        yield row(
            name,
            f"{ours:.0f} ms",
            f"{ours / bare_products(one, units):.2f}x its {sum(units)} units of bare products",
            f"{eager / ours:.1f}x" if eager else "-",
            "-",
            memory + (f", {extra['eager'] / 2**30:.1f}" if eager else ""),
        )


def of_step(report: Report) -> Iterator[Row]:
    ours, alone, eager = (
        report["ways"][name] for name in ("attach_tdpo", "backbone alone", "eager formula")
    )
    yield row(
        f"a whole training step, {render_gpu.counted(report['model']['parameters'])} parameters",
        f"{ours['milliseconds']:.0f} ms",
        f"{ours['milliseconds'] / alone['milliseconds']:.2f}x the backbones alone",
        f"{eager['milliseconds'] / ours['milliseconds']:.1f}x",
        "-",
        f"{ours['peak_gib']:.1f} GiB in all, {eager['peak_gib']:.1f}",
    )


def on_cpu(report: Report) -> Iterator[Row]:
    for vocabulary in CPU_VOCABULARIES:
        for threads in (1, 2):
            shape = (vocabulary, threads)
            rows = [r for r in report["measurements"] if (r["vocabulary"], r["threads"]) == shape]
            yield of_cpu_shape(
                f"from logits, {report['rows']} tokens, V = {vocabulary}", rows, threads
            )


def of_cpu_shape(what: str, rows: list[Report], threads: int) -> Row:
    """float32 and bfloat16 together."""

    def times(name: str) -> list[float]:
        return [row["nanoseconds"][name]["median"] for row in rows]

    def multiples(of: list[float], divided_by: list[float]) -> str:
        return least_to_most((a / b for a, b in zip(of, divided_by, strict=True)), "{:.1f}") + "x"

    ours = times("tdpo_ext in place: both")
    limits = [sum(pair) for pair in zip(times("read"), times("read + write"), strict=True)]
    extra = [[r["extra_bytes"][who] for r in rows] for who in ("tdpo_ext in place", "eager")]
    tensors = [r["tensor_bytes"] for r in rows]
    memory = "-"
    if None not in extra[0] + extra[1]:
        of_all = [
            least_to_most((x / t for x, t in zip(of, tensors, strict=True)), "{:.0f}")
            for of in extra
        ]
        memory = f"{of_all[0]} tensors of logits, {of_all[1]}"
    return row(
        f"{what}, {threads} thread{'s' * (threads > 1)}",
        least_to_most(ours, "{:.2f}") + " ns a pair",
        multiples(ours, limits) + " a read and a write",
        multiples(times("eager: both"), ours),
        multiples(times("torch.compile: both"), ours),
        memory,
    )


def small_on_cpu(report: Report) -> Iterator[Row]:
    small = report["small_call_microseconds"]
    ours = small["tdpo_ext"]
    others = [f"{small[name] / ours:.2f}x" for name in ("eager", "torch.compile")]
    yield row("a small call, 2 tokens, V = 32", f"{ours:.0f} us", "-", *others, "-")


def tables() -> dict[str, list[Row]]:
    logits, fused = render_gpu.load(render_gpu.LOGITS), render_gpu.load(render_gpu.FUSED)
    step, cpu = render_gpu.training_step(), load("logits-cpu.json")
    on_gpu = [*of_logits(logits), *of_fused_head(fused), *(of_step(step) if step else [])]
    return {"on_a_gpu": on_gpu, "on_a_cpu": [*on_cpu(cpu), *small_on_cpu(cpu)]}


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
        f"At a vocabulary of {ROW_OF_LOGITS:,} and 512 tokens, on the CPU in float32, that takes "
        f"about {full} of the memory of the formula in eager PyTorch, the head's gradient "
        f"included; with a frozen head {frozen} ([how](docs/fused-head.md))."
    )


def about_the_gpu() -> str:
    logits, step = render_gpu.load(render_gpu.LOGITS), render_gpu.training_step()
    steps = f" The training step: {render_gpu.step_text(step)}" if step else ""
    notes = render_gpu.by_hand().get("notes", [])
    return " ".join(
        [f"{render_gpu.made_on(logits)}; {logits['dtype']}, all tokens kept.{steps}", *notes[:1]]
    )


def about_the_cpu() -> str:
    cpu = load("logits-cpu.json")
    return (
        f"{cpu['processor']}, {cpu['instruction_set'].upper()}, commit {cpu['commit']}, torch "
        f"{cpu['torch']}; in place; float32 and bfloat16 where there are two numbers."
    )


def shortcomings() -> str:
    small = load("logits-cpu.json")["small_call_microseconds"]
    return "\n".join(
        [
            *render_gpu.bandwidth_findings(),
            *render_gpu.fused_findings(render_gpu.load(render_gpu.FUSED)),
            *render_gpu.step_findings(),
            *render_gpu.small_findings(),
            f"- A call of a few tokens on the CPU is Python's: {small['tdpo_ext']:.0f} us against "
            f"{small['eager']:.0f} of eager PyTorch and {small['torch.compile']:.0f} of "
            "`torch.compile`.",
        ]
    )


def texts() -> dict[str, str]:
    return {
        "memory_of_the_head": memory_of_the_head(),
        "about_the_gpu": about_the_gpu(),
        "about_the_cpu": about_the_cpu(),
        "shortcomings": shortcomings(),
    }
