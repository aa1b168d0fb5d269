"""The CPU kernels under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import sanitized_core
from sanitizers import needs_sanitizer, run_sanitized, runtime

FILES = ["kernels/test_properties.py", "loss/test_fuzz.py"]  # whose inputs go everywhere
NOT = ["fallback", "noticed"]


@needs_sanitizer
def test_the_kernels_touch_nothing_that_is_not_theirs():
    chosen = "not (" + " or ".join(NOT) + ")"
    status, output = run_sanitized(
        FILES, chosen, TDPO_EXT_TEST_CORE="sanitized", TDPO_EXT_TEST_PROFILE="short"
    )
    assert status == 0, output[-5000:]
    assert "AddressSanitizer" not in output


PLANTED = {
    "a load past the end": (
        "cpu/simd.h",
        "std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));",
        "std::memcpy(padded, from, sizeof(padded));",
    ),
    "a store past the end": (
        "cpu/simd.h",
        "std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(To));",
        "std::memcpy(to, padded, sizeof(padded));",
    ),
}


def with_fault(fault: str, folder: Path) -> Path:
    file, right, wrong = PLANTED[fault]
    csrc = folder / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert text.count(right) == 1
    (csrc / file).write_text(text.replace(right, wrong))
    return csrc


@needs_sanitizer
def test_a_load_past_the_end_is_seen(tmp_path):
    csrc = with_fault("a load past the end", tmp_path)
    status, output = run_sanitized(
        ["kernels/test_token_stats.py"],
        "test_values_and_gradients and 17",
        TDPO_EXT_TEST_CORE="sanitized",
        TDPO_EXT_TEST_BASELINE="1",
        TDPO_EXT_TEST_CSRC=str(csrc),
    )
    assert status != 0
    assert "AddressSanitizer" in output


def run_threads(
    folder: Path, csrc: Path = emulated.CSRC, baseline: bool = False
) -> subprocess.CompletedProcess[str]:
    program = folder / "threads"
    flags = ["-O1", "-fsanitize=thread", "-pthread"]
    main = sanitized_core.HARNESS / "threads.cpp"
    sanitized_core.build(main, program, flags, csrc, baseline)
    # Newer kernels place memory where GCC's runtime does not look: without that, if it can be had.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )


needs_thread_sanitizer = pytest.mark.skipif(
    runtime("libtsan.so") is None, reason="the C++ compiler has no thread sanitizer"
)


@needs_thread_sanitizer
def test_threads_on_neighbouring_rows_do_not_race(tmp_path):
    done = run_threads(tmp_path)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == "done\n"


@needs_thread_sanitizer
def test_a_store_into_a_neighbours_row_is_seen(tmp_path):
    done = run_threads(tmp_path, with_fault("a store past the end", tmp_path), baseline=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run on this kernel")
    assert done.returncode != 0
    assert "ThreadSanitizer" in done.stderr
