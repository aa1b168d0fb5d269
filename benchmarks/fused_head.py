"""Time and memory of the fused head, against the bare matrix products and against peers.

A GEMM unit is 2 N V H operations, of N kept tokens. The limit is the products alone, in the shapes
and types of ours, operands cast beforehand, timed in the same rounds: of logits, of dh and of dW.
Memory is what a process of its own (on a GPU: the allocator) takes at its highest during a step,
beyond the batch. Writes fused-head-DEVICE.json into a folder.

    python benchmarks/fused_head.py benchmarks/results [--device cpu] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from fused_providers import PROVIDERS, Batch, make_batch, ours, step
from gpu_against_copy import Clock

import tdpo_ext
from tdpo_ext import gemm
from tdpo_ext.tiles import MOST_COLUMNS_ON_CPU

# Sequences, tokens, H, V.
CPU_SHAPES = ((4, 128, 768, 50257),)
CUDA_SHAPES = ((8, 1024, 4096, 128256), (8, 1024, 4096, 151936), (8, 1024, 2304, 256000))
MEMORY_VOCABULARIES = (32000, 64000, 128256, 256000)  # at 4 x 128 tokens, H = 768
# On the CPU, milliseconds from which a step runs once, and from which not again for its memory or
# with half of the tokens ignored: PyTorch's own bfloat16 products take minutes where the processor
# has none. On a GPU only compiling takes as long.
ONCE_FROM, LEFT_OUT_FROM = 5_000, 30_000
# Units of logits, dh, dW, by way; eager and the peers are compared with the fewest, four.
WAYS = {
    "tdpo_ext: forward": (2, 0, 0),
    "tdpo_ext": (2, 1, 1),
    "tdpo_ext, recomputed": (3.5, 1, 1),
    "tdpo_ext, TDPO1, recomputed": (3, 1, 1),
    "tdpo_ext, frozen head": (2, 1, 0),
}


def bare_products(batch: Batch) -> dict[str, Callable[[], object]]:
    """One unit of each product, in tiles as ours, with operands as ours are."""
    kept = batch.labels != -100
    hidden = batch.policy_hidden.detach()[kept]
    dtype = gemm.operand_dtype(hidden)
    hidden = hidden.to(dtype)
    weight = batch.policy_weight.detach().to(dtype)
    like = {"device": hidden.device, "dtype": torch.float32}
    columns = MOST_COLUMNS_ON_CPU if not hidden.is_cuda else 8192
    tile = torch.zeros(hidden.shape[0], columns, **like)
    half = tile.to(dtype)
    of_hidden = torch.zeros(hidden.shape, **like)
    of_weight = torch.zeros(columns, hidden.shape[1], **like)
    blocks = weight.split(columns)

    def logits() -> None:
        for block in blocks:
            gemm.multiply(hidden, block.T, out=tile[:, : block.shape[0]])

    def by_hidden() -> None:
        for block in blocks:
            gemm.multiply_add(half[:, : block.shape[0]], block, out=of_hidden)

    def by_weight() -> None:
        for block in blocks:
            gemm.multiply(half[:, : block.shape[0]].T, hidden, out=of_weight[: block.shape[0]])

    return {"logits": logits, "dh": by_hidden, "dW": by_weight}


def measure_times(batch: Batch, clock: Clock, rounds: int, names: list[str]) -> dict[str, float]:
    """Median milliseconds; all take turns, round by round. The first round warms up, but counts for
    what takes so long that it runs only once."""

    def forward() -> None:
        with torch.no_grad():
            ours(batch)

    runs = {f"unit of {name}": run for name, run in bare_products(batch).items()}
    runs["tdpo_ext: forward"] = forward
    for name in names:
        runs[name] = lambda provider=PROVIDERS[name]: step(provider, batch)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in list(runs.items()):
            try:
                elapsed = clock.milliseconds(run)
            except torch.OutOfMemoryError:
                del runs[name], times[name]
                torch.cuda.empty_cache()
                continue
            if elapsed > ONCE_FROM and not clock.on_card:
                del runs[name]
            if number or name not in runs:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def memory_of_process(line: str) -> int:
    """Bytes of /proc/self/status. Not getrusage, whose peak starts with the parent's."""
    return int(Path("/proc/self/status").read_text().split(line)[1].split()[0]) * 1024


def peak_here(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """In a process of its own, whose allocator keeps nothing of other steps."""
    batch = make_batch(*shape, dtype, "cpu")
    small = make_batch(2, 2, 8, 64, dtype, "cpu")
    step(PROVIDERS[name], small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_of_process("VmRSS:")
    step(PROVIDERS[name], batch)
    return memory_of_process("VmHWM:") - before


def measure_memory(
    shape: tuple[int, ...], dtype: torch.dtype, clock: Clock, names: list[str]
) -> dict[str, int]:
    """Bytes beyond the batch, gradients included."""
    if clock.on_card:
        batch = make_batch(*shape, dtype, "cuda")
        return {
            name: clock.extra_bytes(lambda name=name: step(PROVIDERS[name], batch))
            for name in names
        }
    peaks = {}
    for name in names:
        arguments = [str(number) for number in shape]
        asked = ["--peak-of", name, str(dtype).removeprefix("torch."), *arguments]
        done = subprocess.run(
            [sys.executable, __file__, *asked], capture_output=True, text=True, check=True
        )
        peaks[name] = int(done.stdout.split()[-1])
    return peaks


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    clock, rows = Clock(options.device), []
    for shape in CUDA_SHAPES if clock.on_card else CPU_SHAPES:
        for dtype in (torch.bfloat16,) if clock.on_card else (torch.float32, torch.bfloat16):
            names = list(PROVIDERS)
            for ignored in (0.0, 0.5):
                print(f"{shape}, {dtype}, {ignored:.0%} ignored ...", flush=True)
                batch = make_batch(*shape, dtype, options.device, ignored)
                times = measure_times(batch, clock, options.rounds, names)
                del batch
                names = [name for name in names if times.get(name, 0) < LEFT_OUT_FROM]
                memory = measure_memory(shape, dtype, clock, names) if not ignored else {}
                rows.append(
                    {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "ignored": ignored,
                        "milliseconds": times,
                        "extra_bytes": memory,
                    }
                )
    return rows


def memory_by_vocabulary(options: argparse.Namespace) -> list[dict[str, object]]:
    """For the picture: float32 on the CPU."""
    names = [name for name in PROVIDERS if "recomputed" not in name]
    rows = []
    for vocabulary in MEMORY_VOCABULARIES if options.device == "cpu" else ():
        print(f"memory at V = {vocabulary} ...", flush=True)
        shape = (4, 128, 768, vocabulary)
        peaks = measure_memory(shape, torch.float32, Clock("cpu"), names)
        rows.append({"vocabulary": vocabulary, "extra_bytes": peaks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        name, dtype, *shape = options.peak_of
        print(peak_here(name, tuple(map(int, shape)), getattr(torch, dtype)))
        return
    on_card = options.device == "cuda"
    report = {
        "device": torch.cuda.get_device_name() if on_card else "CPU",
        **machine.described(),
        "threads": torch.get_num_threads(),
        "backend": tdpo_ext.backends()[options.device],
        "rounds": options.rounds,
        "ways": WAYS,
        "measurements": measure(options),
        "memory_by_vocabulary": memory_by_vocabulary(options),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"fused-head-{options.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
