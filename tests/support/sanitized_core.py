"""The CPU kernels compiled with a sanitizer, in place of the compiled core.

The environment variable TDPO_EXT_TEST_CORE=sanitized puts ``SanitizedCore`` in its place for a
whole test run (conftest.py); the sanitizers' runtimes must be preloaded then. TDPO_EXT_TEST_CSRC
names another folder of sources, and TDPO_EXT_TEST_BASELINE leaves the wider instruction sets out.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_char_p, c_int64
from pathlib import Path
from typing import Any

import emulated
import objects

HARNESS = Path(__file__).parent / "sanitized"
X86 = platform.machine() in ("x86_64", "AMD64")
BASELINE = "TDPO_EXT_TEST_BASELINE" in os.environ
FLAGS_OF = {
    "kernels_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512": [*("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"), "-mfma", "-mf16c"],
}
FLAGS = ["-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wno-psabi"]


def chosen() -> bool:
    return os.environ.get("TDPO_EXT_TEST_CORE") == "sanitized"


def build(
    main: Path,
    target: Path,
    flags: list[str],
    csrc: Path = emulated.CSRC,
    baseline: bool = BASELINE,
) -> None:
    """The CPU's sources and ``main``, linked to ``target``."""
    tool = emulated.compiler()
    assert tool is not None
    names = ["token_stats", "threads", "instruction_sets", "kernels_baseline"]
    flags = [*flags, f"-I{csrc}"]
    if X86 and not baseline:
        names += FLAGS_OF
        flags.append("-DTDPO_X86")
    sources = [csrc / "cpu" / f"{name}.cpp" for name in names]

    def compiled(source: Path) -> Path:
        of_source = FLAGS_OF.get(source.stem, [])
        return objects.compiled(tool, [*FLAGS, *flags, *of_source], source)

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(compiled, [*sources, main]))
    objects.linked(tool, flags, made, target)


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="sanitized") as folder:
        target = Path(folder) / "core.so"
        flags = ["-O0", *emulated.SANITIZERS, "-shared"]  # quick to compile
        build(HARNESS / "harness.cpp", target, flags)
        loaded = ctypes.CDLL(str(target))
    texts = ("forward", "tile", "finish", "backward", "loss_forward", "loss_finish")
    for name in (*texts, "instruction_sets", "description"):
        getattr(loaded, f"sanitized_{name}").restype = c_char_p
    return loaded


class SanitizedCore(emulated.StandIn):
    """The functions of tdpo_ext._core that serve the CPU."""

    def description(self) -> str:
        return library().sanitized_description().decode()

    def build_info(self) -> dict[str, Any]:
        because = "it is the build for the sanitizers"
        return {"compiler": "", "openmp": "torch's", "cuda": False, "no_cuda_because": because}

    def instruction_sets(self) -> list[str]:
        return library().sanitized_instruction_sets().decode().split()

    def token_stats_forward(self, instruction_set: str, threads: int, work: Any) -> int:
        wrong = c_int64()
        _run("forward", instruction_set, threads, work, byref(wrong))
        return wrong.value

    def tdpo_loss_forward(self, instruction_set: str, threads: int, work: Any) -> int:
        wrong = c_int64()
        _run("loss_forward", instruction_set, threads, work, byref(wrong))
        return wrong.value

    def tdpo_loss_finish(self, instruction_set: str, threads: int, work: Any) -> int:
        wrong = c_int64()
        _run("loss_finish", instruction_set, threads, work, byref(wrong))
        return wrong.value

    def token_stats_tile(self, instruction_set: str, threads: int, work: Any) -> None:
        _run("tile", instruction_set, threads, work)

    def token_stats_finish(self, instruction_set: str, threads: int, work: Any) -> None:
        _run("finish", instruction_set, threads, work)

    def token_stats_backward(self, instruction_set: str, threads: int, work: Any) -> None:
        _run("backward", instruction_set, threads, work)


def _run(name: str, instruction_set: str, threads: int, work: Any, *more: Any) -> None:
    function = getattr(library(), f"sanitized_{name}")
    message = function(instruction_set.encode(), threads, byref(work), *more).decode()
    if message:
        raise ValueError(message)
