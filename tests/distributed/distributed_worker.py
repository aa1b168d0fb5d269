"""What one of several processes does in ``test_distributed.py``, over gloo on the CPU.

    cd tests/distributed
    RANK=0 WORLD_SIZE=2 python distributed_worker.py FOLDER MODULE ...      (and RANK=1 ...)

Each scenario of the modules returns errors against a float64 truth that this process computes by
itself, from the inputs of all. The largest over all processes go to FOLDER/results.json.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Scenario = Callable[[], dict[str, float]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def relative(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest value."""
    difference = (ours.double() - truth.double()).abs().max() if ours.numel() else torch.zeros(())
    return (difference / truth.double().abs().max().clamp(min=1e-12)).item()


def same_bits(tensor: Tensor) -> float:
    """0 if all processes have the same."""
    tensor = tensor.detach().contiguous()
    everywhere = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, tensor)
    return 0.0 if all(torch.equal(each, tensor) for each in everywhere) else 1.0


def whole(value: Any) -> Tensor:
    """The whole tensor, where a DTensor holds this process's part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def unwrapped_name(name: str) -> str:
    """A parameter's, without what DDP and torch.compile put before it."""
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def largest_of_all(result: dict[str, float]) -> dict[str, float]:
    everywhere: list[dict[str, float] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, result)
    return {key: max(each[key] for each in everywhere) for key in result}  # type: ignore[index]


def main() -> None:
    folder, *modules = sys.argv[1:]
    torch.set_num_threads(1)
    # Accelerate wants to see these, though nothing connects to them.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    # Run as a script this file is __main__; the scenarios import it by its name.
    worker = importlib.import_module("distributed_worker")
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    for module in modules:
        importlib.import_module(module)
    results = {}
    for name, run in worker.SCENARIOS.items():
        if run.__module__ not in modules:  # imported by one of them
            continue
        torch.manual_seed(20240418)
        try:
            results[name] = largest_of_all(run())
        except Exception:
            # The others may wait for this one for ever: who started them ends them.
            traceback.print_exc()
            print(f"in scenario {name}", file=sys.stderr, flush=True)
            os._exit(1)
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    # Results are written. Ending the interpreter would destroy the threads that gloo and the data
    # loaders may still have, and a destroyed thread that still runs aborts the process.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
