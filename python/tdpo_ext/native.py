"""The compiled core, if there is one, and what was built."""

from __future__ import annotations

import importlib
from typing import Any

# torch first: the core then shares torch's OpenMP runtime. Two live runtimes in one process fight
# over the processors.
import torch


def _load() -> tuple[Any, str]:
    try:
        return importlib.import_module("tdpo_ext._core"), ""
    except ModuleNotFoundError:
        return None, "the extension tdpo_ext._core is not built; pip install builds it"
    except ImportError as error:
        return None, f"the extension tdpo_ext._core does not load: {error}"


core, core_absent_because = _load()


def backends() -> dict[str, dict[str, Any]]:
    """What was built and what serves tensors here, by device type.

    Returns:
        ``{"cpu": {...}, "cuda": {...}}``. Each has ``"compiled"``: whether a compiled kernel serves
        the device; if not, ``"reason"`` says why in plain words (the plain-PyTorch fallback then
        serves it). For the CPU also the compiler, the instruction sets of this processor that have
        kernels, the one in use, whether OpenMP was built in, and the threads used.
    """
    no_cuda = "this version of tdpo_ext has no CUDA kernels"
    if core is None:
        return {
            "cpu": {"compiled": False, "reason": core_absent_because},
            "cuda": {"compiled": False, "reason": no_cuda},
        }
    from tdpo_ext.ops import instruction_set

    build: dict[str, Any] = core.build_info()
    cpu = {
        "compiled": True,
        "compiler": build["compiler"],
        "openmp": build["openmp"],
        "instruction_sets": core.instruction_sets(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads() if build["openmp"] else 1,
    }
    return {"cpu": cpu, "cuda": {"compiled": False, "reason": no_cuda}}
