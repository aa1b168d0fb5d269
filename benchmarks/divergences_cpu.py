"""Time of token_divergences on the CPU beside token_stats and PyTorch, eager and compiled.

One thread, V = 151936. All providers take turns in one process. ``token_divergences`` and the two
of PyTorch give both divergences and the policy's entropy; ``token_stats`` gives log-probabilities
and the forward divergence, with fewer sums.

    python benchmarks/divergences_cpu.py benchmarks/results [--rows 32] [--rounds 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

import tdpo_ext

VOCABULARY = 151_936
GAPS = (0.05, 1.0)  # standard deviation of the gap of two logits: close policies, and far ones
WANTED = ("forward_kl", "reverse_kl", "policy_entropy")

Provider = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def eager(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = (x.float().log_softmax(-1) for x in (policy, reference))
    p, q = log_p.exp(), log_q.exp()
    forward_kl, reverse_kl = (q * (log_q - log_p)).sum(-1), (p * (log_p - log_q)).sum(-1)
    return forward_kl, reverse_kl, -(p * log_p).sum(-1)


def divergences(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    found = tdpo_ext.token_divergences(policy, reference, outputs=WANTED)
    return tuple(x for x in found if x is not None)


def stats(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    found = tdpo_ext.token_stats(policy, reference, labels)
    return found.policy_logps, found.forward_kl


def providers() -> dict[str, Provider]:
    return {
        "token_divergences": divergences,
        "token_stats": stats,
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }


def times(provider: Provider, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    begin = time.perf_counter()
    outputs = provider(*tensors)
    loss = sum((0.3 + i) * output.sum() for i, output in enumerate(outputs))
    middle = time.perf_counter()
    assert isinstance(loss, Tensor)
    torch.autograd.grad(loss, tensors[0])
    return middle - begin, time.perf_counter() - middle


def measure(dtype: torch.dtype, gap: float, rows: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(rows, VOCABULARY, generator=generator)
    policy = reference + gap * torch.randn(rows, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    tensors = policy.to(dtype).requires_grad_(), reference.to(dtype), labels
    chosen = providers()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    names = list(chosen)
    for number in range(rounds + 1):
        # In turn each comes first, since memory that another has freed costs no page faults.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = times(chosen[name], tensors)
            if number:  # the first round compiles and warms up
                taken[name].append(seconds)
    pairs = rows * VOCABULARY
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "gap": gap,
        "nanoseconds": {name: medians(seconds, pairs) for name, seconds in taken.items()},
    }


def medians(seconds: list[tuple[float, float]], pairs: int) -> dict[str, float]:
    """Nanoseconds for each pair of logits."""
    forward, backward = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {"forward": forward / pairs * 1e9, "backward": backward / pairs * 1e9}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for gap in GAPS:
            rows.append(measure(dtype, gap, arguments.rows, arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
    report = {
        **machine.described(),
        "vocabulary": VOCABULARY,
        "rows": arguments.rows,
        "rounds": arguments.rounds,
        "measurements": rows,
    }
    path = arguments.out / "divergences-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
