"""Time of forward and backward where calls are so small that only their overhead counts.

The loss of one pair of one token each, V = 32, by the library, by the formula in PyTorch, eager and
compiled, and by two bounds: ``token_stats`` alone, and an autograd.Function that only saves its
inputs and sums. All take turns in one process. On CUDA the time is the wall clock's from the call
until the device is done, and the kernels of a step are counted.

    python benchmarks/small_calls.py OUT [--device cuda] [--rounds 60]
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
import torch.nn.functional as F
from formula import formula
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tdpo_ext

SHAPE = (2, 1, 32)
STEPS_OF_A_ROUND = 50

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """TDPO2 as in the paper's code."""
    logps, kl = formula(policy, reference, labels)
    reference_logps, _ = formula(reference, reference, labels)
    margins, seq_kl = (logps - reference_logps).sum(-1), kl.sum(-1)
    chosen, rejected = margins.chunk(2)
    chosen_kl, rejected_kl = seq_kl.chunk(2)
    difference = chosen - rejected - 0.5 * (rejected_kl - chosen_kl.detach())
    return -F.logsigmoid(0.1 * difference).mean()


def ours(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    return tdpo_ext.tdpo_loss(policy, reference, shift_labels=labels).loss


def statistics_alone(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    return tdpo_ext.token_stats(policy, reference, labels).policy_logps.sum()


class SaveAndSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy: Tensor, reference: Tensor) -> Tensor:
        ctx.save_for_backward(policy, reference)
        return policy.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        policy, _ = ctx.saved_tensors
        return gradients[0].expand(policy.shape), None


def save_and_sum(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = SaveAndSum.apply(policy, reference)  # type: ignore[no-untyped-call]
    return loss


def providers() -> dict[str, Loss]:
    return {
        "tdpo_ext": ours,
        "token_stats": statistics_alone,
        "eager": eager,
        "torch.compile": torch.compile(eager),
        "save and sum": save_and_sum,
    }


def stepper(loss: Loss, device: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(SHAPE, generator=generator).to(device) for _ in range(2))
    labels = torch.randint(0, SHAPE[-1], SHAPE[:-1], generator=generator).to(device)

    def step() -> None:
        loss(logits.detach().requires_grad_(), reference, labels).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def microseconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_OF_A_ROUND):
        step()
    return (time.perf_counter() - start) / STEPS_OF_A_ROUND * 1e6


def kernels_of(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
    return sum(event.device_type.name == "CUDA" for event in found.events())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    steps = {name: stepper(loss, device) for name, loss in providers().items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        microseconds(step)  # compiles
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            taken[name].append(microseconds(step))
    rows = {name: {"microseconds": statistics.median(times)} for name, times in taken.items()}
    if device == "cuda":
        for name, step in steps.items():
            rows[name]["kernels"] = kernels_of(step)
    for name, row in rows.items():
        print(f"{name:15}", *(f"{value:8.1f} {unit}" for unit, value in row.items()))
    report = {**machine.described(), "shape": SHAPE, "rounds": arguments.rounds, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"small-calls-{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
