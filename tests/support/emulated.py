"""The CUDA kernels on the CPU: their own source, compiled by the C++ compiler.

What CUDA gives them is in cuda_on_cpu beside this file. ``EmulatedCore`` stands in for
``tdpo_ext.token_statistics.kernels.core``. There are two builds, which differ in rounding. "plain"
rounds each product and each sum; "fma" rounds a * b + c once wherever the source allows it, as nvcc
does. Environment variables, for tests that start other test runs: TDPO_EXT_TEST_CSRC, another
folder of sources; TDPO_EXT_TEST_SANITIZE, to compile with the address and undefined-behaviour
sanitizers (libasan must be preloaded then).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_long, c_void_p
from pathlib import Path

import objects

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(os.environ.get("TDPO_EXT_TEST_CSRC", ROOT / "csrc"))
SANITIZED = "TDPO_EXT_TEST_SANITIZE" in os.environ
SOURCES = [
    CSRC / "cuda" / "token_stats_forward.cu",
    CSRC / "cuda" / "token_stats_backward.cu",
    EMULATION / "harness.cpp",
]
FLAGS = ["-x", "c++", "-std=c++17", "-O1" if SANITIZED else "-O2", "-fPIC", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATION}", f"-I{CSRC}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
ON_X86 = platform.machine() in ("x86_64", "AMD64")
ROUNDINGS = {
    "plain": ["-ffp-contract=off"],
    "fma": ["-ffp-contract=fast", *(["-mfma"] if ON_X86 else [])],
}


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@functools.cache
def roundings() -> list[str]:
    """Those that this machine can run."""
    if compiler() is None:
        return []
    listed = Path("/proc/cpuinfo")
    fused = not ON_X86 or (listed.exists() and " fma " in listed.read_text())
    return list(ROUNDINGS) if fused else ["plain"]


def backend_name(rounding: str) -> str:
    return "cuda-on-cpu" if rounding == "plain" else f"cuda-on-cpu-{rounding}"


def _compile(folder: Path, rounding: str) -> Path:
    tool, extra = compiler(), ROUNDINGS[rounding] + (SANITIZERS if SANITIZED else [])
    assert tool is not None

    with ThreadPoolExecutor() as pool:
        made = [*pool.map(lambda source: objects.compiled(tool, [*FLAGS, *extra], source), SOURCES)]
    library = folder / "cuda_on_cpu.so"
    objects.linked(tool, [*extra, "-shared"], made, library)
    return library


@functools.cache
def library(rounding: str = "plain") -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="cuda_on_cpu") as folder:
        loaded = ctypes.CDLL(str(_compile(Path(folder), rounding)))
    for name in ("forward", "tile", "finish", "backward", "path", "rounding"):
        getattr(loaded, f"emulated_{name}").restype = c_char_p
    loaded.emulated_launches.restype = c_long
    return loaded


class RowLayout(Structure):
    _fields_ = (("dims", c_int), ("sizes", c_int64 * 4), ("strides", c_int64 * 4))

    @classmethod
    def of(cls, sizes: list[int], strides: list[int]) -> RowLayout:
        return cls(len(sizes), (c_int64 * 4)(*sizes), (c_int64 * 4)(*strides))


class Logits(Structure):
    _fields_ = (("data", c_void_p), ("rows", RowLayout))


class Problem(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("ignore_index", c_int64),
        ("policy", Logits),
        ("reference", Logits),
        ("labels", c_void_p),
    )

    @classmethod
    def of(cls, dtype, rows, vocabulary, ignore_index, *rest) -> Problem:
        policy, reference = (
            Logits(rest[i], RowLayout.of(rest[i + 1], rest[i + 2])) for i in (0, 3)
        )
        return cls(dtype, rows, vocabulary, ignore_index, policy, reference, rest[6])


PROBLEM_ARGUMENTS = 11


class Outputs(Structure):
    _fields_ = (
        ("policy_logps", c_void_p),
        ("reference_logps", c_void_p),
        ("forward_kl", c_void_p),
        ("normalizers", c_void_p),
    )


class Forward(Structure):
    _fields_ = (("problem", Problem), ("outputs", Outputs))


class Tile(Structure):
    _fields_ = (("problem", Problem), ("records", c_void_p))


class Finish(Structure):
    _fields_ = (
        ("dtype", c_int),
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("ignore_index", c_int64),
        ("labels", c_void_p),
        ("sets", c_int64),
        ("records", c_void_p),
        ("outputs", Outputs),
    )


class Backward(Structure):
    _fields_ = (
        ("problem", Problem),
        ("normalizers", c_void_p),
        ("grad_policy_logps", c_void_p),
        ("grad_forward_kl", c_void_p),
        ("gradient_dtype", c_int),
        ("gradient", c_void_p),
        ("gradient_rows", RowLayout),
    )


def _run(function, work: Structure) -> None:
    message = function(byref(work)).decode()
    if message:
        raise RuntimeError(message)


class EmulatedCore:
    """The compiled core's functions for the CPU, done by the CUDA kernels."""

    def __init__(self, rounding: str = "plain", *, check_labels: bool = True):
        self.rounding, self.check_labels = rounding, check_labels

    @property
    def library(self) -> ctypes.CDLL:
        return library(self.rounding)

    def instruction_sets(self) -> list[str]:
        return [backend_name(self.rounding)]

    def run_warps_backwards(self, backwards: int) -> None:
        self.library.emulated_run_warps_backwards(backwards)

    def token_stats_forward(self, _instruction_set, _threads, *arguments) -> int:
        problem = Problem.of(*arguments[:PROBLEM_ARGUMENTS])
        wrong = _first_wrong_label(problem) if self.check_labels else -1
        if wrong < 0:
            outputs = Outputs(*arguments[PROBLEM_ARGUMENTS:])
            _run(self.library.emulated_forward, Forward(problem, outputs))
        return wrong

    def token_stats_tile(self, _instruction_set, _threads, *arguments) -> None:
        problem = Problem.of(*arguments[:PROBLEM_ARGUMENTS])
        _run(self.library.emulated_tile, Tile(problem, *arguments[PROBLEM_ARGUMENTS:]))

    def token_stats_finish(self, _instruction_set, _threads, *arguments) -> None:
        *shape_and_records, a, b, c, d = arguments
        _run(self.library.emulated_finish, Finish(*shape_and_records, Outputs(a, b, c, d)))

    def token_stats_backward(self, _instruction_set, _threads, *arguments) -> None:
        problem = Problem.of(*arguments[:PROBLEM_ARGUMENTS])
        *addresses, sizes, strides = arguments[PROBLEM_ARGUMENTS:]
        work = Backward(problem, *addresses, RowLayout.of(sizes, strides))
        _run(self.library.emulated_backward, work)


def _first_wrong_label(problem: Problem) -> int:
    """What the op on the CPU promises, and the kernels on a card do not look for."""
    labels = ctypes.cast(problem.labels, POINTER(c_int64))
    for row in range(problem.rows):
        label = labels[row]
        if label != problem.ignore_index and not 0 <= label < problem.vocabulary:
            return row
    return -1
