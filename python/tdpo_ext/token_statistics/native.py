"""The compiled core, if it was built and loads, and a description of the build."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

# torch must be loaded when the core looks for threads: it uses torch's OpenMP runtime.
import torch


def _load() -> tuple[Any, str]:
    try:
        return importlib.import_module("tdpo_ext._core"), ""
    except ModuleNotFoundError:
        return None, "the extension tdpo_ext._core is not built; pip install builds it"
    except ImportError as error:
        return None, f"the extension tdpo_ext._core does not load: {error}"


core, core_absent_because = _load()

INSTRUCTION_SET_VARIABLE = "TDPO_EXT_INSTRUCTION_SET"


@functools.cache
def _instruction_sets(core: Any) -> list[str]:
    return list(core.instruction_sets())


def instruction_set(core: Any) -> str:
    """The instruction set of the CPU kernels: that of the environment variable, else the best."""
    present = _instruction_sets(core)
    asked = os.environ.get(INSTRUCTION_SET_VARIABLE)
    if asked is None:
        return present[-1]
    if asked not in present:
        raise ValueError(
            f"{INSTRUCTION_SET_VARIABLE} must be one of {present} on this processor, got {asked!r}"
        )
    return asked


def _version(number: int) -> str:
    """A CUDA version as text, from CUDA's number: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


OLDEST_DRIVER = {"11": "450.80", "12": "525.60", "13": "580"}
"""The oldest NVIDIA driver for Linux that runs machine code built with a major version of CUDA."""


def with_oldest_driver(cuda_version: str) -> str:
    """ "13.0 (driver 580 or newer)" for "13.0"; the version alone if its driver is not known."""
    driver = OLDEST_DRIVER.get(cuda_version.split(".")[0])
    return f"{cuda_version} (driver {driver} or newer)" if driver else cuda_version


@functools.cache
def _no_cuda_because() -> str:
    """The reason why no CUDA device can be served, for users; empty if one can."""
    if core is None:
        return core_absent_because
    build = core.build_info()
    if not build["cuda"]:
        return f"tdpo_ext has no CUDA kernels: {build['no_cuda_because']}"
    runtime = core.cuda_runtime()
    if runtime["driver_version"] == 0:
        return "no NVIDIA driver is installed on this machine"
    if runtime["driver_version"] < runtime["runtime_version"] and runtime["error"]:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(runtime['driver_version'])}"
            ", and tdpo_ext was built with CUDA "
            f"{with_oldest_driver(_version(runtime['runtime_version']))}; update the driver, or "
            "build tdpo_ext with an older CUDA"
        )
    if runtime["devices"] == 0:
        return f"the NVIDIA driver finds no GPU ({runtime['error']})"
    if torch.version.cuda is None:
        return "this torch was built without CUDA (torch.version.cuda is None)"
    return ""


def _architectures() -> list[str]:
    return str(core.cuda_runtime()["architectures"]).split()


@functools.cache
def cuda_absent_because(device: torch.device) -> str:
    """The reason why the CUDA kernels do not serve a device, for users; empty if they do."""
    if _no_cuda_because():
        return _no_cuda_because()
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = core.cuda_cannot_run_because(index)
    if reason:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and "
            f"tdpo_ext was built for {_architectures()} ({reason}); build it with "
            f"CUDAARCHS={major}{minor}"
        )
    return ""


def _cpu_backend() -> dict[str, Any]:
    if core is None:
        return {"compiled": False, "reason": core_absent_because}
    build: dict[str, Any] = core.build_info()
    return {
        "compiled": True,
        "compiler": build["compiler"],
        "openmp": bool(build["openmp"]),
        "instruction_sets": core.instruction_sets(),
        "instruction_set": instruction_set(core),
        "threads": torch.get_num_threads() if build["openmp"] else 1,
    }


def _cuda_backend() -> dict[str, Any]:
    if core is None or not core.build_info()["cuda"]:
        return {"compiled": False, "reason": _no_cuda_because()}
    runtime = core.cuda_runtime()
    built = {
        "architectures": _architectures(),
        "runtime": _version(runtime["runtime_version"]),
        "driver": _version(runtime["driver_version"]) if runtime["driver_version"] else None,
    }
    reason = _no_cuda_because()
    if reason:
        return {"compiled": False, "reason": reason, **built}
    devices = {}
    for index in range(torch.cuda.device_count()):
        absent = cuda_absent_because(torch.device("cuda", index))
        devices[f"cuda:{index} {torch.cuda.get_device_name(index)}"] = absent or "served"
    return {"compiled": True, **built, "devices": devices}


def backends() -> dict[str, dict[str, Any]]:
    """Describe what was built, and what serves tensors of each device type here.

    Returns:
        ``{"cpu": {...}, "cuda": {...}}``. Each entry has ``"compiled"``, a bool: compiled kernels
        serve the device. If they do not, the plain-PyTorch fallback does, and ``"reason"`` says
        why. The CPU's entry also has ``"compiler"``, ``"openmp"``, ``"instruction_sets"`` (those of
        this processor that have kernels), ``"instruction_set"`` (the one in use) and ``"threads"``.
        The entry of CUDA, if its kernels were built, also has ``"architectures"``, ``"runtime"``
        (the CUDA version they were built with), ``"driver"`` (the newest CUDA that the driver
        supports) and ``"devices"``.

    Raises:
        ValueError: The environment variable TDPO_EXT_INSTRUCTION_SET names an instruction set that
            this processor does not have.
    """
    return {"cpu": _cpu_backend(), "cuda": _cuda_backend()}
