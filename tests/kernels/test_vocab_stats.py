"""The algebra of csrc/vocab_stats.h.

Split the vocabulary anywhere, in any number of parts, merge in any order: the result is the same to
rounding, and the right one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import emulated
import numpy as np
import oracle
import pytest

ROOT = Path(__file__).parents[2]
TOLERANCE = {"float32": 4e-6, "float64": 4e-13}


@pytest.fixture(scope="module", params=emulated.roundings())
def harness(tmp_path_factory, request):
    """Rounded as on the CPU, and as nvcc does."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on the path")
    library = tmp_path_factory.mktemp("harness") / "vocab_stats.so"
    source = ROOT / "tests" / "support" / "vocab_stats_harness.cpp"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += emulated.ROUNDINGS[request.param]
    include = f"-I{ROOT / 'csrc'}"
    subprocess.run([compiler, *flags, include, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Algebra:
    """Records as NumPy arrays."""

    of_record, of_summary = "", 11

    def __init__(self, library: ctypes.CDLL, dtype: str):
        self.library, self.dtype = library, dtype
        self.size = self._call(f"{self.of_record or 'stats_'}size")

    def _call(self, name: str, *arguments):
        pointers = [
            a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments
        ]
        return getattr(self.library, f"{name}_{self.dtype}")(*pointers)

    def record(self, z: np.ndarray, r: np.ndarray) -> np.ndarray:
        stats = np.empty(self.size, self.dtype)
        z, r = np.ascontiguousarray(z), np.ascontiguousarray(r)
        self._call(f"{self.of_record}record", z, r, ctypes.c_long(len(z)), stats)
        return stats

    def merge(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        total = np.empty(self.size, self.dtype)
        self._call(f"{self.of_record}merge", a, b, total)
        return total

    def results(self, stats: np.ndarray) -> np.ndarray:
        """lse(z), lse(r), lse(z) - lse(r), KL(q || p)."""
        values = np.empty(4, self.dtype)
        self._call("summarise", stats, values)
        return values.astype(np.float64)

    def row(self, rest: np.ndarray, z: float, r: float) -> np.ndarray:
        """log p(y), log q(y), KL(q || p), then the normalizers, of a label and the others."""
        values = np.empty(self.of_summary, self.dtype)
        real = ctypes.c_float if self.dtype == "float32" else ctypes.c_double
        self._call(f"{self.of_record}finalise", rest, real(z), real(r), values)
        return values.astype(np.float64)


class AlgebraOfDivergences(Algebra):
    """``row`` gives log p(y), log q(y), both KLs, both entropies, then the normalizers."""

    of_record, of_summary = "divergences_", 18


@pytest.fixture(params=["float32", "float64"])
def algebra(request, harness):
    return Algebra(harness, request.param)


@pytest.fixture(params=["float32", "float64"])
def divergences(request, harness):
    return AlgebraOfDivergences(harness, request.param)


def truth(z: np.ndarray, r: np.ndarray) -> np.ndarray:
    z, r = z.astype(np.longdouble), r.astype(np.longdouble)
    lse_z, lse_r = (x.max() + np.log(np.exp(x - x.max()).sum()) for x in (z, r))
    log_p, log_q = z - lse_z, r - lse_r
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore"):
        terms = p - q + np.where(q == 0, 0, q * (log_q - log_p))
    return np.array([lse_z, lse_r, lse_z - lse_r, terms.sum()], np.float64)


def row_truth(z: np.ndarray, r: np.ndarray, label: int) -> np.ndarray:
    """log p(y), log q(y), KL, lse(z) - lse(r), 1 - p(y), 1 - q(y), p(y) - q(y)."""
    *_, gap, kl = truth(z, r)
    z, r = z.astype(np.longdouble), r.astype(np.longdouble)
    rest = np.arange(len(z)) != label
    odds_p, odds_q = (np.exp(x[rest] - x[label]).sum() for x in (z, r))
    p_rest, q_rest = odds_p / (1 + odds_p), odds_q / (1 + odds_q)
    # The smaller one of 1 - p(y) and p(y) has the digits.
    from_rest = odds_p < 1 and odds_q < 1
    label_gap = q_rest - p_rest if from_rest else 1 / (1 + odds_p) - 1 / (1 + odds_q)
    values = (-np.log1p(odds_p), -np.log1p(odds_q), kl, gap, p_rest, q_rest, label_gap)
    return np.array(values, np.float64)


def merged_at_random(algebra: Algebra, z, r, rng) -> np.ndarray:
    """Random entries to a random number of parts, then random pairs merged until one is left."""
    part = rng.integers(0, rng.integers(1, 12), len(z))
    records = [algebra.record(z[part == k], r[part == k]) for k in range(part.max() + 1)]
    while len(records) > 1:
        a, b = rng.choice(len(records), 2, replace=False)
        merged = algebra.merge(records[a], records[b])
        records = [x for i, x in enumerate(records) if i not in (a, b)] + [merged]
    return records[0]


CASES = {
    "close": lambda rng, v: (lambda r: (r + rng.normal(0, 0.02, v), r))(rng.normal(0, 2, v)),
    "apart": lambda rng, v: (rng.normal(0, 2, v), rng.normal(0, 2, v)),
    "wide": lambda rng, v: (rng.normal(0, 30, v), rng.normal(0, 30, v)),
    "shifted": lambda rng, v: (lambda r: (r + 250 + rng.normal(0, 0.5, v), r))(rng.normal(0, 2, v)),
    "masked reference": lambda rng, v: (
        rng.normal(0, 1, v),
        np.where(np.arange(v) % 3 == 0, -np.inf, rng.normal(0, 1, v)),
    ),
    "masked both": lambda rng, v: tuple(
        np.where(np.arange(v) % 3 == 0, -np.inf, rng.normal(0, 1, v)) for _ in range(2)
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 64, 301])
def test_any_split_in_any_order_gives_the_same_and_the_right_result(algebra, case, vocabulary):
    rng = np.random.default_rng(7)
    # A row whose every reference logit is -inf has no distribution; entry 1 is never masked.
    vocabulary = max(vocabulary, 2) if "masked" in case else vocabulary
    z, r = (x.astype(algebra.dtype) for x in CASES[case](rng, vocabulary))
    want = truth(z, r)
    scale = np.maximum(np.abs(want), 1.0)
    for _ in range(25):
        got = algebra.results(merged_at_random(algebra, z, r, rng))
        assert np.all(np.abs(got - want) <= TOLERANCE[algebra.dtype] * scale), (got, want)
        assert got[3] >= 0


def test_the_kl_keeps_its_digits_in_every_split(algebra):
    rng = np.random.default_rng(11)
    r = rng.normal(0, 2, 500).astype(algebra.dtype)
    z = (r + rng.normal(0, 1e-3, 500)).astype(algebra.dtype)
    want = truth(z, r)[3]
    assert 1e-8 < want < 1e-5
    for _ in range(25):
        got = algebra.results(merged_at_random(algebra, z, r, rng))[3]
        assert got == pytest.approx(want, rel=1e-3 if algebra.dtype == "float32" else 1e-9)


def test_identical_rows_have_no_divergence_in_any_split(algebra):
    rng = np.random.default_rng(13)
    z = rng.normal(0, 3, 200).astype(algebra.dtype)
    z[::7] = -np.inf
    for _ in range(25):
        assert algebra.results(merged_at_random(algebra, z, z, rng))[3] == 0


def test_no_policy_mass_where_the_reference_has_some_is_infinite(algebra):
    rng = np.random.default_rng(17)
    z, r = rng.normal(0, 1, (2, 60)).astype(algebra.dtype)
    # The second one weighs e^-300 of the row: nothing in float32, and still not 0.
    z[5], z[9], r[9] = -np.inf, -np.inf, -300
    for position in (5, 9):
        finite = z.copy()
        finite[14 - position] = 0
        for _ in range(25):
            assert algebra.results(merged_at_random(algebra, finite, r, rng))[3] == np.inf


def test_an_empty_record_changes_nothing(algebra):
    rng = np.random.default_rng(19)
    z, r = rng.normal(0, 1, (2, 40)).astype(algebra.dtype)
    record, empty = algebra.record(z, r), algebra.record(z[:0], r[:0])
    for merged in (algebra.merge(record, empty), algebra.merge(empty, record)):
        np.testing.assert_array_equal(merged, record)


LABELS = {
    "any": lambda z, r: (z, r),
    "certain": lambda z, r: (z + 20, r + 18),
    "certain for the policy": lambda z, r: (z + 40, r),
    "certain for the reference": lambda z, r: (z, r + 60),
    "unlikely": lambda z, r: (z - 30, r - 60),
    "close and certain": lambda z, r: (r + 15.001, r + 15),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("label_case", LABELS)
def test_the_label_beside_the_rest(algebra, case, label_case):
    """Relative to each number's own size: 1 - p(y) of a certain label is not just 0."""
    rng = np.random.default_rng(23)
    for vocabulary in (2, 3, 40, 301):
        z, r = (x.astype(algebra.dtype) for x in CASES[case](rng, vocabulary))
        z[1], r[1] = LABELS[label_case](z[1], r[1])
        rest = np.arange(vocabulary) != 1
        if not np.isfinite(r[rest]).any():
            continue
        got = algebra.row(merged_at_random(algebra, z[rest], r[rest], rng), z[1], r[1])
        want = row_truth(z, r, 1)
        digits = 1e-5 if algebra.dtype == "float32" else 1e-13
        # Shifted by hundreds, float32 logits differ by multiples of 1e-5.
        digits *= 10 if case == "shifted" else 1
        for index, value in zip((0, 1, 2, 7, 8, 9), want[:6], strict=True):
            # The truth's own rounding: its KL has terms of size 1, its gap is a difference; and
            # below 1e-37 float32 is subnormal.
            floor = {2: max(digits * 1e-6, 1e-18), 7: digits}.get(index, 1e-37)
            assert got[index] == pytest.approx(value, rel=digits, abs=floor), index
        largest = max(want[4] * (1 - want[4]), want[5] * (1 - want[5]))
        assert got[10] == pytest.approx(want[6], rel=digits, abs=digits * largest + 1e-37)


def test_close_masses_of_a_label_keep_the_digits_of_their_difference(algebra):
    rng = np.random.default_rng(29)
    digits = 1e-3 if algebra.dtype == "float32" else 1e-10
    for shift in (0, 8, 16):
        r = rng.normal(0, 1, 200).astype(algebra.dtype)
        z = (r + rng.normal(0, 1e-3, 200)).astype(algebra.dtype)
        z[0] += shift
        r[0] += shift
        rest = algebra.record(z[1:], r[1:])
        assert algebra.row(rest, z[0], r[0])[10] == pytest.approx(row_truth(z, r, 0)[6], rel=digits)


@pytest.mark.parametrize(
    ("z", "r", "logps", "kl"),
    [
        (-np.inf, 0.0, (-np.inf, None), np.inf),
        (-np.inf, -1e30, (-np.inf, -1e30), np.inf),
        (0.0, -np.inf, (None, -np.inf), None),
        (3.0e38, 0.0, (0.0, None), None),
        (0.0, 3.0e38, (None, 0.0), None),
        (np.nan, 0.0, (np.nan, None), np.nan),
        (0.0, np.nan, (None, np.nan), np.nan),
    ],
)
def test_labels_at_the_edges(algebra, z, r, logps, kl):
    rng = np.random.default_rng(31)
    rest = algebra.record(*rng.normal(0, 1, (2, 30)).astype(algebra.dtype))
    if r == 3.0e38 and algebra.dtype == "float32":
        kl = None
    row = algebra.row(rest, z, r)
    for got, wanted in zip(row[:3], (*logps, kl), strict=True):
        if wanted is None:
            assert not np.isnan(got)
        else:
            assert got == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    assert row[2] >= 0 or np.isnan(row[2])


def test_a_label_alone_has_all_the_mass(algebra):
    row = algebra.row(algebra.record(np.empty(0), np.empty(0)), -7.0, 3.0)
    np.testing.assert_array_equal(row[:3], 0)
    np.testing.assert_array_equal(row[8:], 0)
    assert row[7] == -10


# --- with divergences -----------------------------------------------------------------------------


def check_divergences(algebra, z, r, rel, label=None):
    """In 25 random splits, with an entry as the label or without a label."""
    rng = np.random.default_rng(37)
    truth = oracle.divergences(z[None].astype(np.float64), r[None].astype(np.float64))
    rest = np.arange(len(z)) != label
    z_label, r_label = (-np.inf if label is None else x[label] for x in (z, r))
    floor = 2e-7 if algebra.dtype == "float32" else 1e-15
    for _ in range(25):
        record = merged_at_random(algebra, z[rest], r[rest], rng)
        row = algebra.row(record, z_label, r_label)
        assert row[3] >= 0
        for index, wanted in enumerate(truth[:4], start=2):
            allowed = rel * abs(wanted[0]) + (floor if index > 3 else floor * 1e-3)
            exact = row[index] == wanted[0]
            assert exact or abs(row[index] - wanted[0]) <= allowed, (index, row[2:6], truth[:4])


@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_divergences_of_every_split(divergences, case, label):
    rng = np.random.default_rng(41)
    for vocabulary in (3, 40, 301):
        z, r = (x.astype(divergences.dtype) for x in CASES[case](rng, vocabulary))
        rel = 2e-5 if divergences.dtype == "float32" else 1e-12
        # Shifted by hundreds, float32 logits differ by multiples of 1e-5.
        rel *= 100 if case in ("shifted", "close") else 1
        check_divergences(divergences, z, r, rel, label)


@pytest.mark.parametrize("mask", [-60.0, -1e4, -1e30, -np.inf])
@pytest.mark.parametrize("label", [None, 1])
def test_a_policy_that_masks_entries_in_every_split(divergences, mask, label):
    rng = np.random.default_rng(43)
    z, r = rng.normal(0, 1, (2, 60)).astype(divergences.dtype)
    z[5:40] = mask
    check_divergences(divergences, z, r, 2e-5 if divergences.dtype == "float32" else 1e-12, label)


def test_both_divergences_keep_their_digits_in_every_split(divergences):
    rng = np.random.default_rng(47)
    r = rng.normal(0, 2, 500).astype(divergences.dtype)
    z = (r + rng.normal(0, 2e-3, 500)).astype(divergences.dtype)
    check_divergences(divergences, z, r, 1e-3 if divergences.dtype == "float32" else 1e-9)


def test_identical_rows_have_no_divergences_in_any_split(divergences):
    rng = np.random.default_rng(53)
    z = rng.normal(0, 3, 200).astype(divergences.dtype)
    z[::7] = -np.inf
    for _ in range(25):
        row = divergences.row(merged_at_random(divergences, z, z, rng), -np.inf, -np.inf)
        assert row[2] == row[3] == 0
        assert row[4] == row[5]


def test_a_reference_that_excludes_an_entry_in_every_split(divergences):
    rng = np.random.default_rng(59)
    z, r = rng.normal(0, 1, (2, 60)).astype(divergences.dtype)
    r[5], z[5] = -np.inf, -300
    for _ in range(25):
        row = divergences.row(merged_at_random(divergences, z, r, rng), z[0], r[0])
        assert row[3] == np.inf
        assert np.isfinite(row[[2, 4, 5]]).all()
