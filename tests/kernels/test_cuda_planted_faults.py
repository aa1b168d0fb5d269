"""Faults planted in copies of the CUDA kernels: the tests must see each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from sanitizers import needs_sanitizer, run_sanitized

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


FORWARD, STATS = "token_stats_forward.cu", "running_stats.cuh"
BACKWARD = "token_stats_backward.cu"
IN_THE_LOOP = {
    "the last vectors of a row left out": (
        *(FORWARD, "(end - start + size - 1) / size", "(end - start) / size"),
        *("test_token_stats.py", "many_blocks"),
    ),
    "one vector taken twice": (
        *(FORWARD, "= load_whole(round + 1)", "= load_whole(round)"),
        *("test_token_stats.py", "many_blocks"),
    ),
    "the label's vector in a turn": (
        *(FORWARD, "min(whole_rounds, label_round) : whole_rounds", "whole_rounds : whole_rounds"),
        *("test_token_stats.py", "many_blocks"),
    ),
    "a turn that does not fit lost": (
        *(FORWARD, "if (!taken) break;", ""),
        *("test_cuda_kernels.py", "base_follows"),
    ),
    "the record not moved to the new base": (
        *(STATS, "stats = rebase(stats, base);", "stats.base = base;"),
        *("test_cuda_kernels.py", "base_follows"),
    ),
    "the exponents' base not moved": (
        *(STATS, "    shift = {top * kLog2E, centre * kLog2E};", "    if (!(k > 0)) shift = {};"),
        *("test_cuda_kernels.py", "base_follows"),
    ),
    "the rounding of the base not put back": (
        *(STATS, "scale.reference = 1 - of_reference", "scale.reference = 1"),
        *("test_precision.py", "log_sums_are"),
    ),
    "the polynomial used too far": (
        *(STATS, "kClose = 0.5f", "kClose = 5.0f"),
        *("test_cuda_kernels.py", "gaps_of_all_sizes or whatever_the_gap"),
    ),
    "masses that underflow trusted": (
        *(STATS, "near_enough && sums.gap", "sums.gap"),
        *("test_precision.py", "far_below_the_maximum"),
    ),
    "a direction with the wrong sign": (
        *(BACKWARD, "reference_weight(-g_k *", "reference_weight(g_k *"),
        *("test_rows_that_change_path.py", "any_weight"),
    ),
    "vectors of a gradient not written": (
        *(BACKWARD, "for (int i = 0; i < kAtOnce; ++i) write", "for (int i = 0; i < 1; ++i) write"),
        *("test_token_stats.py", "many_blocks"),
    ),
    "the last vectors of a gradient not written": (
        *(BACKWARD, "kAtOnce > 1 && index < end;", "kAtOnce > 4 && index < end;"),
        *("test_token_stats.py", "many_blocks"),
    ),
    "the label's gradient by a thread beside": (
        *(BACKWARD, "!= Scope::rank() : vector", "!= (Scope::rank() ^ 1) : vector"),
        *("test_cuda_kernels.py", "labels_at_every_place"),
    ),
    "gaps in nats": (
        *(STATS, "(gap * kPerGapUnit)", "gap"),
        *("test_not_finite.py", "words_of_the_reference"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_THE_LOOP)
def test_a_fault_in_a_hot_loop(tmp_path, fault):
    file, right, wrong, tests, chosen = IN_THE_LOOP[fault]
    sources = with_fault(tmp_path, file, right, wrong)
    status, output = run_plain(tests, f"cuda-on-cpu and not fma and ({chosen})", sources)
    assert status == 1, output[-3000:]


PAIR_LOSS, SEQUENCES, LOSS = "../pair_loss.h", "../sequences.h", "tdpo_loss.cu"
IN_THE_LOSS = {
    "labels not shifted": (
        *(SEQUENCES, "problem.ignore_index : problem.labels[row + 1]"),
        "problem.ignore_index : problem.labels[row]",
    ),
    "the last token scored against the next sequence's first": (
        *(SEQUENCES, "sequences.bounds[before] == static_cast<int64_t>(next)"),
        "sequences.bounds[before] < 0",
    ),
    "a row at a boundary counted twice": (LOSS, "row < end;", "row <= end;"),
    "a warp left out": (
        LOSS,
        "int warp = 0; warp < kBlockWarps",
        "int warp = 1; warp < kBlockWarps",
    ),
    "ignored tokens in the mean": (
        PAIR_LOSS,
        "ignore_index ? 0 : 1",
        "ignore_index ? 1 : 1",
    ),
    "slopes not divided by the tokens of the mean": (
        *(PAIR_LOSS, "Real(-slope / divisor_of(rejected_sums, options))", "Real(-slope)"),
    ),
    "the upstream gradient of another pair": (
        *(
            PAIR_LOSS,
            "chosen ? sequence : sequence - pairs",
            "chosen ? sequence : 2 * pairs - 1 - sequence",
        ),
    ),
    "the slope of another sequence": (
        PAIR_LOSS,
        "upstream.slopes)[sequence]",
        "upstream.slopes)[pair]",
    ),
    "smoothing only forward": (
        *(PAIR_LOSS, "(e * sigmoid(logit) - (1 - e) * sigmoid(-logit))", "-sigmoid(-logit)"),
    ),
    "the KL of the wrong response": (
        *(PAIR_LOSS, "chosen ? upstream.chosen_kl_ratio", "!chosen ? upstream.chosen_kl_ratio"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", IN_THE_LOSS)
def test_a_fault_in_the_loss(tmp_path, fault):
    sources = with_fault(tmp_path, *IN_THE_LOSS[fault])
    chosen = "cuda-on-cpu and not fma and packed_sequences_against"
    status, output = run_plain("../loss/test_loss_op.py", chosen, sources)
    assert status == 1, output[-3000:]


@pytest.mark.slow  # compiled with a sanitizer, which takes a minute
@needs_sanitizer
def test_a_load_past_the_end(tmp_path):
    """What is read there is not even used: only the sanitizer sees it."""
    right, wrong = "all_sides_aligned ? 0 : 1;", "all_sides_aligned ? 0 : 0;"
    sources = with_fault(tmp_path, "row_vectors.cuh", right, wrong)
    status, output = run_sanitized(
        ["kernels/test_cuda_kernels.py"], "any_two_alignments", TDPO_EXT_TEST_CSRC=str(sources)
    )
    assert status != 0
    assert "heap-buffer-overflow" in output, output[-3000:]
