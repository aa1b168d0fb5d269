"""Time and memory of token_stats on a GPU, against the bandwidth of a copy and against peers.

The limit is a device-to-device copy of one logits tensor, timed in the same rounds. Bytes are those
that the algebra needs: forward reads both tensors where a token is not ignored; backward writes one
tensor, and reads what docs/algebra.md says for the kind of row. All take turns round by round.
Writes gpu-against-copy.json into a folder.

    python benchmarks/gpu_against_copy.py OUT [--rounds 15] [--rows 8192]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import machine
import torch
from formula import formula
from torch import Tensor

import tdpo_ext

VOCABULARIES = (32000, 50257, 128256, 151936, 256000)
IGNORED = (0.0, 0.5)
OPS = torch.ops.tdpo_ext
Statistics = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Runs = dict[str, Callable[[], object]]


class Batch(NamedTuple):
    policy: Tensor
    reference: Tensor
    labels: Tensor
    grad_logps: Tensor
    grad_kl: Tensor  # arbitrary, so that no row is of a special kind
    overwritten: Tensor  # the policy's logits, for calls that work in place

    @property
    def tensor_bytes(self) -> int:
        return self.policy.numel() * self.policy.element_size()

    def restore(self) -> None:
        """Put the logits back before a call in place; the last one has left a gradient there."""
        self.overwritten.detach().copy_(self.policy)


def make_batch(
    rows: int, vocabulary: int, dtype: torch.dtype, ignored: float, device: str
) -> Batch:
    torch.manual_seed(0)
    reference = torch.randn(rows, vocabulary, device=device).to(dtype)
    policy = torch.randn(rows, vocabulary, device=device).mul_(0.3).add_(reference).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    labels[torch.randperm(rows, device=device)[: round(ignored * rows)]] = -100
    weights = torch.randn(2, rows, device=device)
    return Batch(policy, reference, labels, *weights, policy.clone())


def upstream_of(batch: Batch, kind: str) -> tuple[Tensor, Tensor]:
    """The upstream gradients of a method."""
    half = batch.labels.numel() // 2
    chosen = torch.arange(2 * half, device=batch.labels.device) < half
    grad_kl = {
        "any": batch.grad_kl,
        "tdpo1": batch.grad_logps,
        # The KL of chosen rows is a constant.
        "tdpo2": torch.where(chosen, torch.zeros_like(batch.grad_kl), -0.5 * batch.grad_logps),
        "dpo": torch.zeros_like(batch.grad_kl),
    }[kind]
    return batch.grad_logps, grad_kl


# Tensors of logits' size that backward reads, on average over the kept rows.
READS = {"any": 2.0, "tdpo1": 1.0, "tdpo2": 1.5, "dpo": 1.0}


def needed_bytes(batch: Batch, kept: float) -> dict[str, float]:
    """The bytes that each pass has to move."""
    size = batch.tensor_bytes
    needed = {"copy": 2.0 * size, "forward": 2 * kept * size}
    for kind, reads in READS.items():
        needed[f"backward, {kind}"] = (1 + kept * reads) * size
        needed[f"backward in place, {kind}"] = (1 + kept * reads) * size
    return needed


def passes(batch: Batch) -> Runs:
    """The passes alone: the ops that the autograd.Function calls."""
    policy, reference, labels = batch[:3]
    _, _, _, normalizers = OPS.token_stats(policy, reference, labels, -100)
    target = torch.empty_like(policy)
    runs: Runs = {
        "copy": lambda: target.copy_(policy),
        "forward": lambda: OPS.token_stats(policy, reference, labels, -100),
    }
    for kind in READS:
        saved = (reference, labels, normalizers, *upstream_of(batch, kind), -100)
        runs[f"backward, {kind}"] = lambda saved=saved: OPS.token_stats_backward(policy, *saved)
        runs[f"backward in place, {kind}"] = lambda saved=saved: OPS.token_stats_backward_(
            batch.overwritten.detach(), *saved
        )
    return runs


def ours(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels)
    return stats.policy_logps, stats.forward_kl


def ours_in_place(policy: Tensor, reference: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=True)
    return stats.policy_logps, stats.forward_kl


def providers() -> dict[str, Statistics]:
    found: dict[str, Statistics] = {
        "tdpo_ext": ours,
        "tdpo_ext in place": ours_in_place,
        "eager": formula,
        "torch.compile": torch.compile(formula),
    }
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_ce_tvd import LigerFusedCETVDFunction

        # The nearest kernel of a peer: it takes the same tensors, to total variation instead of KL.
        found["Liger CE + TVD"] = LigerFusedCETVDFunction.apply
    return found


def whole_steps(batch: Batch) -> Runs:
    """Forward without gradients, and forward + backward, of every provider."""
    runs: Runs = {}

    def forward(provider: Statistics) -> None:
        with torch.no_grad():
            provider(batch.policy, batch.reference, batch.labels)

    def full(provider: Statistics, policy: Tensor) -> Tensor:
        logps, kl = provider(policy, batch.reference, batch.labels)
        total = (logps * batch.grad_logps + kl * batch.grad_kl).sum()
        return torch.autograd.grad(total, policy)[0]

    leaf = batch.policy.detach().requires_grad_()
    for name, provider in providers().items():
        if name != "tdpo_ext in place":
            runs[f"{name}: forward"] = lambda provider=provider: forward(provider)
        policy = batch.overwritten.requires_grad_() if name == "tdpo_ext in place" else leaf
        runs[f"{name}: forward + backward"] = lambda provider=provider, policy=policy: full(
            provider, policy
        )
    return runs


class Clock:
    """Milliseconds on the device, by events around a call; launches do not wait for Python."""

    def __init__(self, device: str) -> None:
        self.on_card = device == "cuda"

    def milliseconds(self, run: Callable[[], object]) -> float:
        if not self.on_card:
            started = time.perf_counter()
            run()
            return (time.perf_counter() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # cycles, a millisecond: by then all launches are queued
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def extra_bytes(self, run: Callable[[], object]) -> int:
        """The peak of the bytes that a call allocates."""
        if not self.on_card:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def measure(runs: Runs, batch: Batch, clock: Clock, rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed: set[str] = set()
    for number in range(rounds + 2):
        for name, run in runs.items():
            if name in failed:
                continue
            if "in place" in name:
                batch.restore()
            try:
                elapsed = clock.milliseconds(run)
            except torch.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
                continue
            if number >= 2:  # compiles and warms up before
                times[name].append(elapsed)
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in times.items()
        if name not in failed
    }


def largest_error(batch: Batch, provider: Statistics) -> dict[str, float]:
    """The largest error of 32 rows against float64, relative to the largest value."""
    rows = (batch.labels != -100).nonzero().flatten()[:32]
    inputs = [x[rows] for x in (batch.policy, batch.reference, batch.labels)]
    truth = tdpo_ext.reference.token_stats(inputs[0].double(), inputs[1].double(), inputs[2])
    with torch.no_grad():
        logps, kl = provider(*inputs)
    pairs = {"log p": (logps, truth.policy_logps), "KL": (kl, truth.forward_kl)}
    return {
        name: float((a.double() - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()
    }


def measurements(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    clock = Clock(options.device)
    for vocabulary in options.vocabularies:
        for ignored in IGNORED:
            print(f"V = {vocabulary}, {ignored:.0%} ignored ...", flush=True)
            torch.compiler.reset()  # after too many recompilations it would run eager code
            batch = make_batch(options.rows, vocabulary, torch.bfloat16, ignored, options.device)
            alone = measure(passes(batch), batch, clock, options.rounds)
            runs = whole_steps(batch)
            steps = measure(runs, batch, clock, options.rounds)
            yield {
                "vocabulary": vocabulary,
                "ignored": ignored,
                "tensor_bytes": batch.tensor_bytes,
                "needed_bytes": needed_bytes(batch, 1 - ignored),
                "passes_ms": alone,
                "steps_ms": steps,
                "steps_extra_bytes": {name: clock.extra_bytes(runs[name]) for name in steps},
                "errors": {
                    "tdpo_ext": largest_error(batch, ours),
                    "eager": largest_error(batch, formula),
                },
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to see that this runs"
    )
    options = parser.parse_args()
    served = tdpo_ext.backends()[options.device]
    if not served["compiled"]:
        raise SystemExit(f"no kernels to time: {served['reason']}")
    on_card = options.device == "cuda"
    report = {
        "device": torch.cuda.get_device_name() if on_card else "a dry run on the CPU",
        **machine.described(),
        "backend": served,
        "rows": options.rows,
        "dtype": "bfloat16",
        "rounds": options.rounds,
        "measurements": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for row in measurements(options):
        report["measurements"].append(row)
        # Written after each measurement, so that these stay if the time runs out.
        (options.out / "gpu-against-copy.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
