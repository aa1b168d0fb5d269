"""Time, memory and error of token_stats on the CPU against PyTorch, eager and compiled.

Providers and limits take turns round by round in one process, so a drift of the machine's speed
meets all of them. The limits are a read of the same bytes, and a read with a write over the
policy's logits. Writes logits-cpu.json into a folder.

    python benchmarks/logits_cpu.py benchmarks/results [--rounds 5] [--rows 64]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from logits_providers import SKIPPED, Provider, providers
from torch import Tensor

import tdpo_ext

VOCABULARIES = (2048, 8192, 32000, 151936)
DTYPES = (torch.float32, torch.bfloat16)
ROWS_FOR_ERROR = 8
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Batch:
    """Logits of a reference, and of a policy at some distance from it."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(rows, vocabulary, generator=generator)
        gap = 0.3 * torch.randn(rows, vocabulary, generator=generator)
        self.original = (reference + gap).to(dtype)
        self.policy = self.original.clone().requires_grad_()
        self.reference = reference.to(dtype)
        self.labels = torch.randint(0, vocabulary, (rows,), generator=generator)
        self.weights = torch.randn(2, rows, generator=generator)

    def restore(self) -> None:
        """After a backward in place."""
        self.policy.detach().copy_(self.original)

    def as_integers(self) -> tuple[Tensor, Tensor]:
        width = torch.int32 if self.policy.element_size() == 4 else torch.int16
        return self.policy.detach().view(width), self.reference.view(width)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def passes(provider: Provider, batch: Batch, in_place: bool) -> dict[str, float]:
    """Seconds of forward without a gradient, forward, backward, and the last two together."""

    def forward() -> Tensor:
        logps, kl = provider(batch.policy, batch.reference, batch.labels)
        return (batch.weights[0] * logps + batch.weights[1] * kl).sum()

    taken = {}
    if not in_place:
        with torch.no_grad():
            taken["no grad"], _ = timed(forward)
    taken["forward"], loss = timed(forward)
    taken["backward"], _ = timed(lambda: torch.autograd.grad(loss, batch.policy))
    taken["both"] = taken["forward"] + taken["backward"]
    return taken


def limits(batch: Batch) -> dict[str, float]:
    policy, reference = batch.as_integers()
    read, _ = timed(lambda: (policy.amax(), reference.amax()))
    # As an in-place backward does, it overwrites the policy's logits, which are then restored.
    write, _ = timed(lambda: torch.add(policy, reference, out=policy))
    batch.restore()
    return {"read": read, "read + write": write}


def spread(seconds: list[float], pairs: int) -> dict[str, float]:
    """Nanoseconds for each pair of logits."""
    return {
        name: value / pairs * 1e9
        for name, value in (("median", statistics.median(seconds)), ("least", min(seconds)))
    }


def measure_time(batch: Batch, chosen: dict[str, Provider], rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        taken = limits(batch)
        for name, provider in chosen.items():
            in_place = name.endswith("in place")
            for which, seconds in passes(provider, batch, in_place).items():
                taken[f"{name}: {which}"] = seconds
            if in_place:
                batch.restore()
        if number:  # the first round warms up
            for name, seconds in taken.items():
                times.setdefault(name, []).append(seconds)
    return {name: spread(seconds, batch.policy.numel()) for name, seconds in times.items()}


def peak_bytes(function: Callable[[], object]) -> int | None:
    """The peak growth of this process; None except on Linux with glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if not CLEAR.exists() or trim is None:
        return None
    gc.collect()
    trim(0)  # else the function could use freed memory that the process still holds
    CLEAR.write_text("5")  # forget earlier peaks

    def field(name: str) -> int:
        return int(STATUS.read_text().split(f"{name}:")[1].split()[0]) * 1024

    before = field("VmRSS")
    function()
    return max(field("VmHWM") - before, 0)


def error_of(batch: Batch, provider: Provider) -> dict[str, float]:
    """The largest error relative to float64 on the same logits."""
    few = slice(0, ROWS_FOR_ERROR)
    inputs = batch.original[few], batch.reference[few], batch.labels[few]
    exact = tdpo_ext.reference.token_stats(inputs[0].double(), inputs[1].double(), inputs[2])
    with torch.no_grad():
        ours = provider(*inputs)
    pairs = zip(("logps", "kl"), ours, (exact.policy_logps, exact.forward_kl), strict=True)
    return {name: ((x - wanted).abs() / wanted.abs()).max().item() for name, x, wanted in pairs}


def measure(vocabulary: int, dtype: torch.dtype, rows: int, rounds: int) -> dict[str, Any]:
    batch, chosen = Batch(rows, vocabulary, dtype), providers()
    nanoseconds = measure_time(batch, chosen, rounds)
    extra = {}
    for name, provider in chosen.items():
        extra[name] = peak_bytes(lambda p=provider, n=name: passes(p, batch, n.endswith("place")))
        batch.restore()
    return {
        "nanoseconds": nanoseconds,
        "extra_bytes": extra,
        "tensor_bytes": batch.policy.numel() * batch.policy.element_size(),
        "error": {name: error_of(batch, provider) for name, provider in chosen.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--note", default="", help="a remark for readers of the numbers")
    options = parser.parse_args()
    measurements = []
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for vocabulary in VOCABULARIES if threads == 1 else VOCABULARIES[2:]:
            for dtype in DTYPES:
                name = str(dtype).removeprefix("torch.")
                print(f"V = {vocabulary}, {name}, {threads} thread(s) ...", flush=True)
                row = {"vocabulary": vocabulary, "dtype": name, "threads": threads}
                row |= measure(vocabulary, dtype, options.rows, options.rounds)
                measurements.append(row)
    report = {
        **machine.described(),
        "note": options.note,
        "rows": options.rows,
        "rounds": options.rounds,
        "skipped": SKIPPED,
        "measurements": measurements,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "logits-cpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
