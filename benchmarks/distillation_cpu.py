"""Time and error of a distillation loss from hidden states, beside TRL's and eager PyTorch, CPU.

The loss is the mean of KL(student || teacher), for a teacher of another hidden size, forward and
backward. The limit is the matrix products alone, in tiles like ours: two logits, made twice, dh and
dW. All take turns, round by round. The error is that of the KL's smallest values, where student and
teacher are close. Writes distillation-cpu.json into a folder.

    python benchmarks/distillation_cpu.py benchmarks/results [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from fused_head import bare_products
from fused_providers import Batch
from gpu_against_copy import Clock
from torch import Tensor

import tdpo_ext

TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY = 512, 768, 1024, 50257
SMALL = (64, 128, 128, 5000)  # for the error


class Heads(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H_teacher]
    teacher_weight: Tensor


def heads_of(tokens: int, width: int, teacher_width: int, vocabulary: int) -> Heads:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(tokens, width), 2 * normal(vocabulary, width) / width**0.5
    teacher_hidden = normal(tokens, teacher_width)
    teacher_weight = 2 * normal(vocabulary, teacher_width) / teacher_width**0.5
    return Heads(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight)


def close_heads() -> Heads:
    """A student close to its teacher: divergences of some 1e-6 to 1e-3 nats."""
    heads = heads_of(*SMALL)
    hidden, weight = heads.hidden.detach(), heads.weight.detach()
    moved = hidden * (1 + torch.linspace(1e-3, 3e-2, len(hidden)).unsqueeze(1))
    return Heads(moved, weight, hidden, weight)


def ours(heads: Heads) -> Tensor:
    found = tdpo_ext.linear_token_divergences(*heads, outputs=("reverse_kl",))
    assert found.reverse_kl is not None
    return found.reverse_kl


def ours_and_entropy(heads: Heads) -> Tensor:
    """The same call with an entropy bonus, whose gradient TRL's function does not have."""
    found = tdpo_ext.linear_token_divergences(*heads, outputs=("reverse_kl", "policy_entropy"))
    assert found.reverse_kl is not None
    assert found.policy_entropy is not None
    return found.reverse_kl - 0.01 * found.policy_entropy


def eager(heads: Heads) -> Tensor:
    log_p = (heads.hidden @ heads.weight.T).log_softmax(-1)
    with torch.no_grad():
        log_q = (heads.teacher_hidden @ heads.teacher_weight.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def trl(heads: Heads) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, weight, teacher_hidden, teacher_weight = heads
    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, teacher_hidden, teacher_weight, None, 1.0
    )
    return kl


PROVIDERS: dict[str, Callable[[Heads], Tensor]] = {
    "tdpo_ext": ours,
    "tdpo_ext, with entropy": ours_and_entropy,
    "eager": eager,
}
if importlib.util.find_spec("trl"):
    PROVIDERS["TRL"] = trl


def step(provider: Callable[[Heads], Tensor], heads: Heads) -> None:
    torch.autograd.grad(provider(heads).mean(), (heads.hidden, heads.weight))


def limit(heads: Heads) -> Callable[[], None]:
    labels = torch.zeros(len(heads.hidden), dtype=torch.int64)
    of_student = bare_products(Batch(*heads, labels))
    teacher = heads.teacher_hidden, heads.teacher_weight
    of_teacher = bare_products(Batch(*teacher, *teacher, labels))

    def products() -> None:
        for _ in range(2):
            of_student["logits"]()
            of_teacher["logits"]()
        of_student["dh"]()
        of_student["dW"]()

    return products


def measure_times(rounds: int) -> dict[str, float]:
    """Median milliseconds; the first round warms up."""
    heads, clock = heads_of(TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY), Clock("cpu")
    runs: dict[str, Callable[[], object]] = {"products": limit(heads)}
    for name, provider in PROVIDERS.items():
        runs[name] = lambda provider=provider: step(provider, heads)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = clock.milliseconds(run)
            if number:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_errors() -> tuple[list[float], dict[str, float]]:
    """The range of the KL, and the largest relative error of each against float64."""
    heads = close_heads()
    truth = tdpo_ext.reference.linear_token_divergences(
        *(x.double() for x in heads), outputs=("reverse_kl",)
    ).reverse_kl
    assert truth is not None
    errors = {
        name: ((provider(heads).double() - truth).abs() / truth).max().item()
        for name, provider in PROVIDERS.items()
        if provider is not ours_and_entropy
    }
    return [truth.min().item(), truth.max().item()], errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    kl, errors = measure_errors()
    report: dict[str, Any] = {
        **machine.described(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "shape": [TOKENS, WIDTH, TEACHER_WIDTH, VOCABULARY],
        "milliseconds": measure_times(options.rounds),
        "kl": kl,
        "error": errors,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "distillation-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
