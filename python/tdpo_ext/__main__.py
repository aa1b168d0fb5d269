"""python -m tdpo_ext: versions, the build, and what serves each device; for bug reports."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

import tdpo_ext
from tdpo_ext.token_statistics import native

NAME_WIDTH = 26
ENVIRONMENT = (native.INSTRUCTION_SET_VARIABLE, "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def _versions() -> dict[str, Any]:
    return {
        "tdpo_ext": tdpo_ext.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": _processor(),
        "installed in": os.path.dirname(tdpo_ext.__file__),
    }


def _processor() -> str:
    """The processor's name on Linux, else its architecture."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return f"{names[0]}, {os.cpu_count()} logical" if names else platform.machine()


def _build() -> dict[str, Any]:
    if native.core is None:
        return {"extension": f"absent: {native.core_absent_because}"}
    info = native.core.build_info()
    return {
        "extension": native.core.__file__,
        "compiler": info["compiler"],
        "OpenMP runtime": info["openmp"] or "torch has none: the CPU kernels use one thread",
        "CUDA kernels": "yes" if info["cuda"] else f"no: {info['no_cuda_because']}",
    }


def _cpu(backend: dict[str, Any]) -> dict[str, Any]:
    if not backend["compiled"]:
        return {"served by": f"plain PyTorch: {backend['reason']}"}
    return {
        "served by": f"compiled kernels, {backend['instruction_set']}",
        "instruction sets here": ", ".join(backend["instruction_sets"]),
        "threads": backend["threads"],
    }


def _cuda(backend: dict[str, Any]) -> dict[str, Any]:
    lines: dict[str, Any] = {"torch's CUDA": torch.version.cuda or "none"}
    if "architectures" in backend:
        lines["kernels built for"] = ", ".join(backend["architectures"])
        lines["CUDA they link to"] = native.with_oldest_driver(backend["runtime"])
        lines["driver supports CUDA"] = backend["driver"] or "no driver"
    if not backend["compiled"]:
        return {"kernels serve": f"no device: {backend['reason']}", **lines}
    for device, state in backend["devices"].items():
        lines[device] = "compiled kernels" if state == "served" else f"plain PyTorch: {state}"
    return lines


def report() -> dict[str, dict[str, Any]]:
    """The sections of the report; each maps a name to a value."""
    backends = tdpo_ext.backends()
    return {
        "Versions": _versions(),
        "Build": _build(),
        "cpu": _cpu(backends["cpu"]),
        "cuda": _cuda(backends["cuda"]),
        "Other devices": {"served by": "plain PyTorch"},
        "Environment": {name: os.environ.get(name, "not set") for name in ENVIRONMENT},
    }


def main() -> int:
    try:
        sections = report()
    except ValueError as error:  # the environment names an instruction set that is not here
        print(error, file=sys.stderr)
        return 1
    for section, lines in sections.items():
        print(section)
        for name, value in lines.items():
            print(f"  {name.ljust(NAME_WIDTH)}{value}")
    print("\nCheck the numbers on this machine: python -m tdpo_ext.parity --quick")
    return 0


if __name__ == "__main__":
    sys.exit(main())
