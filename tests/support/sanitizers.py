"""Test runs whose kernels are compiled with a sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

TESTS = Path(__file__).parents[1]


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
