"""Time and memory of a whole training step, forward and backward of two language models.

A Llama-shaped policy and its reference are made from a config: 1.2e9 parameters and 8 x 1024 tokens
on a GPU, a tiny model on the CPU. The limit is the two backbones alone, without head and loss. The
paths to the loss take turns round by round, and must agree on loss and gradient. Peak memory on a
GPU is all that the allocator has given out, models included; on the CPU it is the growth of a
separate process during a step. Writes training-step-DEVICE.json into a folder.

    python benchmarks/training_step.py benchmarks/results [--device cpu] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import machine
import torch
from fused_head import memory_of_process
from fused_providers import formula_loss
from gpu_against_copy import Clock
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tdpo_ext import LinearTDPOLoss, TDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo

GIB = 2**30
AGREEMENT = 0.02  # relative, of losses and gradient norms; models and logits are bfloat16


class Size(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int
    sequences: int
    tokens: int


SIZES = {
    "cuda": Size(128256, 2048, layers=16, heads=32, sequences=8, tokens=1024),
    "cpu": Size(8192, 128, layers=2, heads=4, sequences=4, tokens=128),
    "quick": Size(512, 64, layers=1, heads=4, sequences=2, tokens=32),
}


class Step(NamedTuple):
    policy: nn.Module
    reference: nn.Module
    tokens: Tensor  # [2B, T]
    labels: Tensor  # the same, -100 on the first third: the prompt

    def reference_output(self, **arguments: Any) -> Any:
        with torch.no_grad():
            return self.reference(self.tokens, **arguments)


def make_step(size: Size, device: str, dtype: torch.dtype = torch.bfloat16) -> Step:
    """The reference's weights are the policy's, each with a relative noise of a tenth."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 4,
        max_position_embeddings=size.tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with torch.device(device):
        policy = LlamaForCausalLM(config).to(dtype)
        tokens = torch.randint(0, size.vocabulary, (size.sequences, size.tokens))
    reference = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    # Newer transformers warn at the older name.
    newer = getattr(policy, "activation_checkpointing_enable", None)
    (newer or policy.gradient_checkpointing_enable)({"use_reentrant": False})
    policy.train()
    attach_tdpo(policy, LinearTDPOLoss())  # calls without tdpo= are not changed by it
    attach_tdpo(reference)
    labels = tokens.clone()
    labels[:, : size.tokens // 3] = -100
    return Step(policy, reference, tokens, labels)


def backbone_alone(step: Step) -> Tensor:
    with torch.no_grad():
        step.reference.model(step.tokens)
    return step.policy.model(step.tokens).last_hidden_state.sum()


def eager_formula(step: Step) -> Tensor:
    aligned = nn.functional.pad(step.labels[:, 1:], (0, 1), value=-100)
    reference = step.reference_output().logits
    return formula_loss(step.policy(step.tokens).logits, reference, aligned)


def from_logits(step: Step, inplace_backward: bool = False) -> Tensor:
    loss = TDPOLoss(inplace_backward=inplace_backward)
    reference = step.reference_output().logits
    return loss(step.policy(step.tokens).logits, reference, step.labels).loss


def attached(step: Step) -> Tensor:
    targets = TDPOTargets(step.reference_output(tdpo=HEAD_INPUTS), step.labels)
    return step.policy(step.tokens, tdpo=targets).loss


PATHS: dict[str, Callable[[Step], Tensor]] = {
    "backbone alone": backbone_alone,
    "eager formula": eager_formula,
    "TDPOLoss": from_logits,
    "TDPOLoss in place": lambda step: from_logits(step, inplace_backward=True),
    "attach_tdpo": attached,
}


def run(path: str, step: Step) -> Tensor:
    loss = PATHS[path](step)
    loss.backward()
    return loss.detach()


def loss_and_norm(path: str, step: Step) -> tuple[float, float]:
    """The loss, and the Euclidean norm of all gradients."""
    step.policy.zero_grad()
    loss = run(path, step)
    gradients = [x.grad for x in step.policy.parameters() if x.grad is not None]
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in gradients]
    return float(loss), float(torch.linalg.vector_norm(torch.stack(norms)))


def measure_times(step: Step, clock: Clock, rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    for number in range(rounds + 1):
        for path, taken in times.items():
            step.policy.zero_grad()
            elapsed = clock.milliseconds(lambda path=path: run(path, step))
            if number:  # the first round warms up
                taken.append(elapsed)
    return {
        path: {"milliseconds": statistics.median(taken), "least": min(taken), "most": max(taken)}
        for path, taken in times.items()
    }


def peak_on_card(path: str, step: Step) -> int:
    step.policy.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run(path, step)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def growth_here(path: str, size: Size) -> int:
    """The peak growth of this process during a step, beyond both models."""
    run(path, make_step(SIZES["quick"], "cpu"))  # takes what only the first step sets up
    step = make_step(size, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_of_process("VmRSS:")
    run(path, step)
    return memory_of_process("VmHWM:") - before


def peak_in_a_process(path: str, size_name: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", path, size_name],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def check_agreement(results: dict[str, tuple[float, float]]) -> None:
    """Exit if a path computes another loss or gradient: its time would mean nothing."""
    wanted = results["eager formula"]
    for path, found in results.items():
        for name, ours, theirs in zip(("loss", "gradient norm"), found, wanted, strict=True):
            if path != "backbone alone" and not abs(ours - theirs) <= AGREEMENT * abs(theirs):
                raise SystemExit(f"{path}: {name} {ours:.6g}, eager formula {theirs:.6g}")


def measure(size_name: str, device: str, rounds: int) -> dict[str, Any]:
    size = SIZES[size_name]
    step, clock = make_step(size, device), Clock(device)
    results = {path: loss_and_norm(path, step) for path in PATHS}
    check_agreement(results)
    paths: dict[str, dict[str, float]] = measure_times(step, clock, rounds)
    for path, row in paths.items():
        peak = peak_on_card(path, step) if clock.on_card else peak_in_a_process(path, size_name)
        row["peak_gib"] = peak / GIB
        if path != "backbone alone":
            row["loss"], row["gradient_norm"] = results[path]
    return {
        "model": {
            "parameters": sum(x.numel() for x in step.policy.parameters()),
            "hidden_size": size.width,
            "layers": size.layers,
            "vocabulary": size.vocabulary,
        },
        "dtype": "bfloat16",
        "sequences": size.sequences,
        "tokens": size.tokens,
        "ignored": size.tokens // 3 / size.tokens,
        "rounds": rounds,
        "ways": paths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smaller model: to see that it runs")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        path, size_name = options.peak_of
        print(growth_here(path, SIZES[size_name]))
        return
    if options.out is None:
        parser.error("which folder to write into?")
    on_card = options.device == "cuda"
    report = {
        "device": torch.cuda.get_device_name() if on_card else "CPU",
        **machine.described(),
        "threads": torch.get_num_threads(),
        **measure("quick" if options.quick else options.device, options.device, options.rounds),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"training-step-{options.device}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    for path, row in report["ways"].items():
        print(f"{path:<18} {row['milliseconds']:>9.1f} ms, {row['peak_gib']:.3f} GiB")
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
