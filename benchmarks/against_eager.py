"""Time of token_stats on the CPU against PyTorch, eager and compiled.

One process, one run: providers take turns round by round, so that a machine whose speed drifts does
so for all. The limit is a read of the same bytes, timed in the same rounds. Writes
benchmarks/results/cpu-against-eager.json.

    python benchmarks/against_eager.py [--rounds 5] [--rows 64]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from formula import formula
from torch import Tensor

import tdpo_ext

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-against-eager.json"
VOCABULARIES = (32000, 151936)
DTYPES = (torch.float32, torch.bfloat16)

Statistics = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels)
    return stats.policy_logps, stats.forward_kl


def ours_in_place(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=True)
    return stats.policy_logps, stats.forward_kl


def read_both(policy: Tensor, reference: Tensor) -> None:
    """A pass over the bytes of both that does next to nothing with them."""
    width = torch.int32 if policy.element_size() == 4 else torch.int16
    policy.detach().view(width).amax()
    reference.view(width).amax()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(vocabulary: int, dtype: torch.dtype, rows: int, rounds: int) -> dict[str, float]:
    """Median nanoseconds for each pair of logits."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(rows, vocabulary, generator=generator)
    gap = 0.3 * torch.randn(rows, vocabulary, generator=generator)
    policy = (reference + gap).to(dtype).requires_grad_()
    reference = reference.to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)
    torch.compiler.reset()  # past a limit of recompilations it would run eager
    providers: dict[str, Statistics] = {
        "tdpo_ext": ours,
        "tdpo_ext in place": ours_in_place,
        "eager": formula,
        "torch.compile": torch.compile(formula),
    }

    def forward(statistics_of: Statistics) -> None:
        with torch.no_grad():
            statistics_of(policy, reference, labels)

    def full(statistics_of: Statistics) -> None:
        # In place the logits turn into a gradient: other numbers next round, and the same time.
        logps, kl = statistics_of(policy, reference, labels)
        torch.autograd.grad((weights[0] * logps + weights[1] * kl).sum(), policy)

    runs: dict[str, Callable[[], object]] = {"read": lambda: read_both(policy, reference)}
    for name, provider in providers.items():
        if name != "tdpo_ext in place":
            runs[f"{name}: forward"] = lambda provider=provider: forward(provider)
        runs[f"{name}: forward + backward"] = lambda provider=provider: full(provider)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(run)
            if number:  # the first round warms up
                times[name].append(elapsed)
    pairs = rows * vocabulary
    return {name: statistics.median(values) / pairs * 1e9 for name, values in times.items()}


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    return f"{models[0]} ({len(models)} cores)" if models else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    options = parser.parse_args()
    all_threads = torch.get_num_threads()
    measurements = []
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        for vocabulary in VOCABULARIES:
            for dtype in DTYPES:
                name = str(dtype).removeprefix("torch.")
                print(f"V = {vocabulary}, {name}, {threads} thread(s) ...", flush=True)
                measurements.append(
                    {
                        "vocabulary": vocabulary,
                        "dtype": name,
                        "threads": threads,
                        "nanoseconds": measure(vocabulary, dtype, options.rows, options.rounds),
                    }
                )
    report = {
        "processor": processor(),
        "torch": torch.__version__,
        "tdpo_ext": tdpo_ext.__version__,
        "instruction_set": tdpo_ext.backends()["cpu"]["instruction_set"],
        "rows": options.rows,
        "rounds": options.rounds,
        "measurements": measurements,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
