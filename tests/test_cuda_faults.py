"""Faults planted in copies of the CUDA kernels: the tests must see each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from test_cuda_sanitized import needs_sanitizer, run_sanitized

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on the path")


def with_fault(folder: Path, file: str, right: str, wrong: str) -> Path:
    """A copy of the sources in which one place of one file is wrong."""
    sources = folder / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", sources)
    path = sources / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} must be once in {file}"
    path.write_text(text.replace(right, wrong))
    return sources


def run_plain(file: str, chosen: str, sources: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, str(TESTS / file)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TDPO_EXT_TEST_CSRC": str(sources)},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_removed_barrier(tmp_path):
    """A warp reads what others have not written yet. The results are still right to rounding, since
    any base is; but their bits depend on the order in which warps run."""
    sources = with_fault(tmp_path, "team.cuh", "    __syncthreads();\n", "")
    status, output = run_plain("test_cuda_kernels.py", "order_in_which_warps", sources)
    assert status == 1, output[-3000:]
    assert "torch.equal(forwards, backwards)" in output


def test_a_divergent_shuffle(tmp_path):
    """Half of a warp leaves the other half waiting."""
    right = "    value += __shfl_xor_sync"
    wrong = "    if (lane_index() < kLanes / 2) value += __shfl_xor_sync"
    sources = with_fault(tmp_path, "team.cuh", right, wrong)
    status, output = run_plain("test_token_stats.py", "cuda-on-cpu and many_blocks", sources)
    assert status == 1, output[-3000:]
    assert "threads wait for each other" in output


@needs_sanitizer
def test_a_load_past_the_end(tmp_path):
    """What is read there is not even used: only the sanitizer sees it."""
    right, wrong = "all_sides_aligned ? 0 : 1;", "all_sides_aligned ? 0 : 0;"
    sources = with_fault(tmp_path, "row_vectors.cuh", right, wrong)
    status, output = run_sanitized(
        ["test_cuda_kernels.py"], "any_two_alignments", TDPO_EXT_TEST_CSRC=str(sources)
    )
    assert status != 0
    assert "heap-buffer-overflow" in output, output[-3000:]
