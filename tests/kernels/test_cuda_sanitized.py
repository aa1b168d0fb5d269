"""The CUDA kernels on the CPU under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

TESTS = Path(__file__).parents[1]
FILES = ["token_stats", "shapes_strides_masks", "not_finite", "cuda_kernels", "gradient_dtypes"]
FILES = [*(f"kernels/test_{name}.py" for name in FILES), "fused_head/test_fused_head.py"]
# Long in this build, or of memory that the sanitizer will not reserve.
NOT = [
    "fma",  # the other rounding: the same reads and writes
    "128256",
    "many_blocks",
    "150001",
    "40001",
    "two_to_the_31",
    "every_half_width",
    "round_to_nearest",
]


def runtime(name: str) -> str | None:
    """The path of a sanitizer's runtime, if the compiler has it."""
    tool = emulated.compiler()
    if tool is None:
        return None
    printed = subprocess.run([tool, f"-print-file-name={name}"], capture_output=True, text=True)
    path = printed.stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


needs_sanitizer = pytest.mark.skipif(
    runtime("libasan.so") is None, reason="the C++ compiler has no shared address sanitizer"
)


def run_sanitized(files: list[str], chosen: str, **environment: str) -> tuple[int, str]:
    # Without pytest's capture: a sanitizer's report would be lost with the process.
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in files)],
        capture_output=True,
        text=True,
        timeout=900,
        env={
            **os.environ,
            # libstdc++ as well: the sanitizer takes hold of `throw` when the program starts.
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TDPO_EXT_TEST_SANITIZE": "1",
            **environment,
        },
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@needs_sanitizer
def test_the_kernels_touch_nothing_that_is_not_theirs():
    chosen = "cuda-on-cpu and not (" + " or ".join(NOT) + ")"
    status, output = run_sanitized(FILES, chosen)
    assert status == 0, output[-5000:]
    assert "AddressSanitizer" not in output
