"""The CUDA kernels on the CPU: their own source, compiled by the C++ compiler.

What CUDA gives them is in cuda_on_cpu beside this file. ``EmulatedCore`` stands in for
``tdpo_ext.token_statistics.kernels.core``. There are two builds, which differ in rounding. "plain"
rounds each product and each sum; "fma" rounds a * b + c once wherever the source allows it, as nvcc
does. Environment variables, for tests that start other test runs: TDPO_EXT_TEST_CSRC, another
folder of sources; TDPO_EXT_TEST_SANITIZE, to compile with the address and undefined-behaviour
sanitizers (libasan must be preloaded then).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_char_p, c_double, c_int, c_int64, c_long, c_void_p
from pathlib import Path
from typing import Any

import objects

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(os.environ.get("TDPO_EXT_TEST_CSRC", ROOT / "csrc"))
SANITIZED = "TDPO_EXT_TEST_SANITIZE" in os.environ
SOURCES = [
    CSRC / "cuda" / "token_stats_forward.cu",
    CSRC / "cuda" / "token_stats_backward.cu",
    CSRC / "cuda" / "tdpo_loss.cu",
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
    """The builds that this machine can run."""
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
    texts = ("forward", "tile", "finish", "backward", "loss_forward", "loss_finish")
    for name in (*texts, "path", "rounding", "description"):
        getattr(loaded, f"emulated_{name}").restype = c_char_p
    loaded.emulated_refusal.restype = c_int64
    loaded.emulated_launches.restype = c_long
    loaded.emulated_set_ex2_error.argtypes = [c_double]
    return loaded


class Struct(Structure):
    """Takes all of its fields by name, as the compiled core's structs do."""

    def __init__(self, **values: Any):
        assert list(values) == [field[0] for field in self._fields_], values
        super().__init__(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@functools.cache
def described(text: str) -> dict[str, Any]:
    """What a text of ``csrc/description.h`` describes: a ctypes structure for each struct, the
    constants, and DTYPES."""
    types: dict[str, Any] = {"int": c_int, "int64": c_int64, "int64[4]": c_int64 * 4}
    types["double"] = c_double
    types["pointer"] = c_void_p
    exported: dict[str, Any] = {"DTYPES": {}}
    fields: list[list[str]] = []
    for kind, name, *rest in map(str.split, text.splitlines()):
        if kind == "field":
            fields.append([name, *rest])
        elif kind == "struct":
            members = {"_fields_": [(field, types[of_type]) for field, of_type, _ in fields]}
            made: Any = type(name, (Struct,), members)
            assert ctypes.sizeof(made) == int(rest[0]), name
            assert all(getattr(made, field).offset == int(offset) for field, _, offset in fields)
            exported[name] = types[name] = made
            fields = []
        elif kind == "constant":
            exported[name] = int(rest[0])
        else:
            assert kind == "dtype", kind
            exported["DTYPES"][name] = int(rest[0])
    return exported


class StandIn:
    """The structs and constants of a library that stands in for the compiled core."""

    def description(self) -> str:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        exported = described(self.description())
        if name not in exported:
            raise AttributeError(f"the description of the core has no {name}")
        return exported[name]


def _run(function, work: Structure) -> None:
    message = function(byref(work)).decode()
    if message:
        raise RuntimeError(message)


class EmulatedCore(StandIn):
    """The compiled core's functions for tensors on the CPU, which here call the CUDA kernels."""

    def __init__(self, rounding: str = "plain", *, check_labels: bool = True):
        self.rounding, self.check_labels = rounding, check_labels

    @property
    def library(self) -> ctypes.CDLL:
        return library(self.rounding)

    def description(self) -> str:
        return self.library.emulated_description().decode()

    def instruction_sets(self) -> list[str]:
        return [backend_name(self.rounding)]

    def run_warps_backwards(self, backwards: int) -> None:
        self.library.emulated_run_warps_backwards(backwards)

    @contextlib.contextmanager
    def ex2_off_by(self, relative: float) -> Iterator[None]:
        """With an error of the special-function unit's exponentials, which else are exact."""
        self.library.emulated_set_ex2_error(relative)
        try:
            yield
        finally:
            self.library.emulated_set_ex2_error(0)

    def token_stats_forward(self, _instruction_set, _threads, work) -> int:
        return self._run_checked(self.library.emulated_forward, work, work.unlabelled)

    def tdpo_loss_forward(self, _instruction_set, _threads, work) -> int:
        return self._run_checked(self.library.emulated_loss_forward, work)

    def tdpo_loss_finish(self, _instruction_set, _threads, work) -> int:
        if self.check_labels and not self.library.emulated_bounds_are_usable(byref(work.problem)):
            refusal: int = self.BOUNDS_NOT_USABLE
            return refusal
        _run(self.library.emulated_loss_finish, work)
        valid: int = self.ALL_LABELS_VALID
        return valid

    def _run_checked(self, function, work, unlabelled: bool = False) -> int:
        valid: int = self.ALL_LABELS_VALID
        refusal: int = self.library.emulated_refusal(byref(work.problem))
        if refusal != valid and self.check_labels and not unlabelled:
            return refusal
        _run(function, work)
        return valid

    def token_stats_tile(self, _instruction_set, _threads, work) -> None:
        _run(self.library.emulated_tile, work)

    def token_stats_finish(self, _instruction_set, _threads, work) -> None:
        _run(self.library.emulated_finish, work)

    def token_stats_backward(self, _instruction_set, _threads, work) -> None:
        _run(self.library.emulated_backward, work)
