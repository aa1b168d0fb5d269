"""Time and memory of the fused head, against the bare matrix products and against peers.

A unit is one matrix product of 2 N V H operations, for N tokens that are not ignored. The limit is
the products alone (logits, dh, dW), in the shapes and types of ours, with operands cast beforehand,
timed in the same rounds. Memory is the peak during a step beyond the batch: that of the allocator
on a GPU, that of a separate process on the CPU. Writes fused-head-DEVICE.json into a folder.

    python benchmarks/fused_head.py benchmarks/results [--device cpu] [--rounds 3]

With --choices it measures instead, at one shape, the constants that only timing can decide:
chunk_bytes, the columns of a tile, and the rows whose whole logits exist at a time. Each takes a
list. It writes fused-head-choices-DEVICE.json.

    python benchmarks/fused_head.py OUT --device cuda --choices [--shape 8 1024 4096 128256]
        [--chunk-mebibytes 256 512 1024 2048 4096] [--tile-columns 2048 4096 8192 16384]
        [--group-rows 256 512 1024 2048]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import machine
import torch
from fused_providers import (
    PROVIDERS,
    Batch,
    make_batch,
    ours,
    ours_frozen_head,
    ours_recomputed,
    step,
)
from gpu_against_copy import Clock
from torch import Tensor

import tdpo_ext
from tdpo_ext.fused_head import problem, products, tiles
from tdpo_ext.fused_head.tiles import MOST_COLUMNS_ON_CPU, MOST_COLUMNS_ON_CUDA

# Sequences, tokens, H, V.
CPU_SHAPES = ((4, 128, 768, 50257),)
CUDA_SHAPES = ((8, 1024, 4096, 128256), (8, 1024, 4096, 151936), (8, 1024, 2304, 256000))
MEMORY_VOCABULARIES = (32000, 64000, 128256, 256000)  # at 4 x 128 tokens, H = 768
# Milliseconds. On the CPU a step that takes ONCE_FROM runs once; one of LEFT_OUT_FROM not again
# for its memory, nor with half of the tokens ignored: without bfloat16 instructions
# PyTorch's own products take minutes. On a GPU only compilation takes so long.
ONCE_FROM, LEFT_OUT_FROM = 5_000, 30_000
# The units of logits, dh and dW on each path. Eager and the peers are compared with the fewest, 4.
PATHS = {
    "tdpo_ext: forward": (2, 0, 0),
    "tdpo_ext": (2, 1, 1),
    "tdpo_ext, recomputed": (3.5, 1, 1),
    "tdpo_ext, TDPO1, recomputed": (3, 1, 1),
    "tdpo_ext, frozen head": (2, 1, 0),
}


def bare_products(batch: Batch) -> dict[str, Callable[[], object]]:
    """One unit of each product, in tiles and with operands like ours."""
    kept = batch.labels != -100
    hidden = batch.policy_hidden.detach()[kept]
    dtype = products.operand_dtype(hidden)
    hidden = hidden.to(dtype)
    weight = batch.policy_weight.detach().to(dtype)
    like = {"device": hidden.device, "dtype": torch.float32}
    columns = MOST_COLUMNS_ON_CUDA if hidden.is_cuda else MOST_COLUMNS_ON_CPU
    tile = torch.zeros(hidden.shape[0], columns, **like)
    half = tile.to(dtype)
    hidden_gradient = torch.zeros(hidden.shape, **like)
    weight_gradient = torch.zeros(columns, hidden.shape[1], **like)
    blocks = weight.split(columns)

    def logits() -> None:
        for block in blocks:
            products.multiply(hidden, block.T, out=tile[:, : block.shape[0]])

    def by_hidden() -> None:
        for block in blocks:
            products.multiply_add(half[:, : block.shape[0]], block, out=hidden_gradient)

    def by_weight() -> None:
        for block in blocks:
            columns = block.shape[0]
            products.multiply(half[:, :columns].T, hidden, out=weight_gradient[:columns])

    return {"logits": logits, "dh": by_hidden, "dW": by_weight}


def measure_times(batch: Batch, clock: Clock, rounds: int, names: list[str]) -> dict[str, float]:
    """Median milliseconds; all take turns, round by round.

    The first round warms up, and counts only for a step so slow that it runs once.
    """

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
    """Bytes in a line of /proc/self/status. The peak of getrusage starts with the parent's."""
    return int(Path("/proc/self/status").read_text().split(line)[1].split()[0]) * 1024


def peak_here(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The peak memory of a step, in a process whose allocator holds no memory of other steps."""
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
    """Peak bytes beyond the batch, gradients included."""
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


@contextlib.contextmanager
def columns_and_rows(columns: int | None, rows: int | None) -> Iterator[None]:
    """Set the columns of a tile and the rows of a group; None: the library's own."""
    with contextlib.ExitStack() as stack:
        if columns is not None:
            for name in ("MOST_COLUMNS_ON_CPU", "MOST_COLUMNS_ON_CUDA"):
                stack.enter_context(mock.patch.object(problem, name, columns))
        if rows is not None:
            stack.enter_context(mock.patch.object(tiles, "GROUP_ROWS", (rows,)))
        yield


def measure_choices(options: argparse.Namespace) -> list[dict[str, object]]:
    """Milliseconds and extra bytes of each path.

    The columns of a tile matter to forward and recompute, the rows of a group to whole pairs and a
    frozen head.
    """
    clock = Clock(options.device)
    batch = make_batch(*options.shape, torch.bfloat16, options.device)
    products = bare_products(batch)
    unit = {name: _median(clock, run, options.rounds) for name, run in products.items()}

    def forward(batch: Batch, chunk_bytes: int | None = None) -> Tensor:
        with torch.no_grad():
            return ours(batch, chunk_bytes)

    by_columns = {"forward": (forward, 2, 0, 0), "recomputed": (ours_recomputed, 3.5, 1, 1)}
    by_rows = {"whole pairs": (ours, 2, 1, 1), "frozen head": (ours_frozen_head, 2, 1, 0)}
    runs = [(*x, c, None) for x in by_columns.items() for c in options.tile_columns]
    runs += [(*x, None, r) for x in by_rows.items() for r in options.group_rows]
    found: list[dict[str, object]] = []
    for (name, (provider, *units), columns, rows), mebibytes in itertools.product(
        runs, options.chunk_mebibytes
    ):
        given = {"chunk_bytes": mebibytes * 2**20}

        def run(provider: Callable[..., Tensor] = provider, given: dict = given) -> None:
            if provider is forward:
                provider(batch, **given)
            else:
                step(provider, batch, **given)

        with columns_and_rows(columns, rows):
            taken = _median(clock, run, options.rounds)
            extra = clock.extra_bytes(run) if clock.on_card else None
        bare = sum(n * unit[x] for n, x in zip(units, ("logits", "dh", "dW"), strict=True))
        found.append(
            {
                "path": name,
                "tile_columns": columns,
                "group_rows": rows,
                "chunk_mebibytes": mebibytes,
                "milliseconds": taken,
                "of_bare_products": taken / bare,
                "extra_bytes": extra,
            }
        )
        choice = f"{columns} columns" if columns else f"{rows} rows"
        measured = f"{taken:8.1f} ms {taken / bare:6.2f}"
        print(f"{name:12} {choice:14} {mebibytes:5} MiB {measured}", flush=True)
    return found


def _median(clock: Clock, run: Callable[[], object], rounds: int) -> float:
    run()
    return statistics.median(clock.milliseconds(run) for _ in range(rounds))


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
    """Peak memory by vocabulary for the picture, in float32 on the CPU."""
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
    parser.add_argument("--choices", action="store_true", help="chunk_bytes, columns and rows")
    parser.add_argument("--shape", type=int, nargs=4)
    parser.add_argument("--chunk-mebibytes", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--tile-columns", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--group-rows", type=int, nargs="+", default=[256, 512, 1024])
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
    }
    if options.choices:
        options.shape = options.shape or (CUDA_SHAPES if on_card else CPU_SHAPES)[0]
        report |= {"shape": options.shape, "choices": measure_choices(options)}
    else:
        report |= {
            "ways": PATHS,
            "measurements": measure(options),
            "memory_by_vocabulary": memory_by_vocabulary(options),
        }
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "-choices" if options.choices else ""
    path = options.out / f"fused-head{kind}-{options.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
