"""python -m tdpo_ext.parity: its truth, its verdicts, its exit status."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import oracle
import pytest
import torch
from backends import COMPILED
from inputs import numpy64

import tdpo_ext
from tdpo_ext import parity
from tdpo_ext.outputs import TokenStats
from tdpo_ext.parity import __main__ as command
from tdpo_ext.parity import backends, cases, formulas, measure, table, truth, wanted
from tdpo_ext.token_statistics import kernels, native

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small_grid(monkeypatch):
    monkeypatch.setattr(cases, "QUICK_VOCABULARIES", (33,))
    monkeypatch.setattr(cases, "KINDS", {"apart": cases.KINDS["apart"]})


@pytest.fixture
def run(monkeypatch, small_grid):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["parity", *arguments])
        return command.main()

    return run


# --- the truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("vocabulary", [1, 2, 17, 300])
def test_the_truth_is_the_oracle(kind, vocabulary):
    """Two texts of the same equations: here in PyTorch, there in NumPy, row by row."""
    case = cases.Case(torch.float64, vocabulary, kind, "any", "contiguous", 0.4, seed=3)
    inputs = case.logits()
    z, r = (x.reshape(-1, vocabulary) for x in inputs[:2])
    labels, *upstream = (x.flatten() for x in inputs[2:])
    ours = truth.token_stats(z, r, labels, *upstream)
    arrays = numpy64(z), numpy64(r), labels.numpy()
    stats = oracle.token_stats(*arrays)
    for value, right in zip(ours, stats, strict=False):
        np.testing.assert_allclose(numpy64(value), right, rtol=1e-9, atol=1e-14)
    gradient = oracle.token_stats_gradient(*arrays, *(numpy64(x) for x in upstream))
    np.testing.assert_allclose(numpy64(ours.gradient), gradient, rtol=1e-7, atol=1e-13)


def test_the_truth_keeps_digits_where_the_label_is_certain():
    """log p(y) = -log(1 + 2 e^-40) and d log p(y) / dz = 1 - p(y) at the label."""
    z = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    label, one, zero = torch.tensor([0]), torch.ones(1), torch.zeros(1)
    found = truth.token_stats(z, z, label, one, zero)
    odds = 2 * np.exp(-40.0)
    assert found.policy_logps.item() == pytest.approx(-odds, rel=1e-12)
    assert found.gradient[0, 0].item() == pytest.approx(odds, rel=1e-12)


# --- the grid -------------------------------------------------------------------------------------


def test_every_value_of_every_option_is_in_the_grid():
    for quick in (True, False):
        grid = list(cases.logit_cases(quick))
        assert {c.kind for c in grid} == set(cases.KINDS)
        assert {(c.layout, c.upstream) for c in grid} == {
            (layout, upstream) for layout in cases.LAYOUTS for upstream in cases.UPSTREAM
        }
        assert {(c.ignored, c.kind) for c in grid} == {
            (share, kind) for share in cases.IGNORED for kind in cases.KINDS
        }
        assert {c.upstream for c in cases.head_cases(quick)} == set(cases.UPSTREAM)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_layout_keeps_the_numbers(layout):
    x = torch.randn(4, 3, 7)
    moved = cases.LAYOUTS[layout](x)
    assert torch.equal(moved, x)
    assert moved.is_contiguous() == (layout == "contiguous")


# --- the verdict ----------------------------------------------------------------------------------


def test_every_backend_keeps_its_bounds(monkeypatch):
    monkeypatch.setattr(cases, "QUICK_VOCABULARIES", (2, 33))
    report = parity.check(["cpu"], quick=True)
    assert report.passed, report.misses
    names = {row.backend for row in report.rows}
    expected = [str(b) for b in backends.backends_of(torch.device("cpu"))]
    assert names == {*expected, *(f"{name}, fused head" for name in expected)}
    assert {row.quantity for row in report.rows} == {
        *("policy_logps", "reference_logps", "forward_kl", "gradient"),
        *("reverse_kl", "policy_entropy", "reference_entropy", "gradient of divergences"),
        *("gradient of hidden", "gradient of weight"),
    }
    assert all(0 <= row.median <= row.largest for row in report.rows)


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in COMPILED, reason="no card")
def test_every_backend_keeps_its_bounds_on_a_card():
    assert parity.check(["cuda"], quick=True).misses == []


@pytest.mark.parametrize("output", range(3))
def test_statistics_that_are_a_little_off_are_a_miss(small_grid, monkeypatch, output):
    right = tdpo_ext.token_stats

    def wrong(*arguments):
        stats = list(right(*arguments))
        stats[output] = stats[output] * (1 + (2e-3 if output == 2 else 5e-6))
        return TokenStats(*stats)

    monkeypatch.setattr(tdpo_ext, "token_stats", wrong)
    missed = {row.quantity for row in parity.check(["cpu"], quick=True).misses}
    assert missed >= {TokenStats._fields[output]}
    assert missed <= {TokenStats._fields[output], "gradient"}


@pytest.mark.parametrize(
    ("quantity", "factor"),
    [
        ("reverse_kl", 1 + 2e-3),
        ("policy_entropy", 1 + 5e-5),
        ("reference_entropy", 1 + 5e-5),
        ("gradient of divergences", 1.02),
    ],
)
def test_divergences_that_are_a_little_off_are_a_miss(small_grid, monkeypatch, quantity, factor):
    right = formulas.divergences_from_logits

    def wrong(inputs, *, eager):
        found = right(inputs, eager=eager)
        return found if eager else {**found, quantity: found[quantity] * factor}

    monkeypatch.setattr(formulas, "divergences_from_logits", wrong)
    missed = {row.quantity for row in parity.check(["cpu"], quick=True).misses}
    assert missed == {quantity}


def test_a_gradient_that_is_a_little_off_is_a_miss(small_grid, monkeypatch):
    right = formulas.from_logits

    def wrong(inputs, *, eager):
        found = right(inputs, eager=eager)
        return found if eager else {**found, "gradient": found["gradient"] * 1.01}

    monkeypatch.setattr(formulas, "from_logits", wrong)
    missed = parity.check(["cpu"], quick=True).misses
    assert {(row.quantity, row.dtype) for row in missed} == {
        ("gradient", x) for x in ("float32", "float64", "bfloat16", "float16")
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [33, 1000])
def test_a_heads_gradient_that_is_rounded_twice_keeps_its_bound(dtype, vocabulary):
    """As on CUDA: dz before the products, the products where they are stored. Entries
    of dz that are off by three units, in the direction that hurts, do not."""
    case = cases.Case(dtype, vocabulary, "apart", "any", "contiguous", 0.0, seed=5)
    inputs = case.heads()
    true = wanted.from_heads(inputs)
    weight = inputs.policy_weight.double()
    logits = inputs.policy_hidden.double() @ weight.T, inputs.reference_hidden.double() @ weight.T
    dz = wanted.from_logits(cases.Inputs(*logits, *inputs[4:])).values["gradient"]
    name = "gradient of hidden"
    bound = measure.bound_of(name, dtype, head=True)

    def largest(dz: torch.Tensor) -> float:
        ours = (dz.to(dtype).double() @ weight).to(dtype)
        return float(measure.errors(ours, true.values[name], true.sizes[name], 1e-30).max())

    assert largest(dz) <= bound
    off = 3 * torch.finfo(dtype).eps * dz.abs() * weight[:, 0].sign()
    assert largest(dz + off) > bound


def test_errors_are_relative_and_infinite_where_only_one_is_finite():
    inf, nan = torch.inf, torch.nan
    ours = torch.tensor([2.0, 0.0, nan, 1.0, inf, inf])
    wanted = torch.tensor([1.0, 0.0, 1.0, inf, 1.0, inf], dtype=torch.float64)
    found = measure.errors(ours, wanted, wanted.abs(), least=1e-30)
    assert found.tolist()[:3] == [1.0, 0.0, inf]
    assert not found[3:5].isfinite().any()
    assert found[5] == 0


def test_worse_than_eager_starts_beyond_one_ulp():
    def worse(ours: float) -> bool:
        cell = measure.CellErrors(torch.tensor([0.0, ours]), torch.tensor([1.0, 0.0]), "", ulp=0.5)
        return cell.worse_than_eager

    assert not worse(1.5)
    assert worse(1.6)


@pytest.mark.parametrize("asked", [None, "baseline"])
def test_a_backend_serves_and_leaves_everything_as_it_was(monkeypatch, asked):
    core = kernels.core
    if asked:
        monkeypatch.setenv(native.INSTRUCTION_SET_VARIABLE, asked)

    def serve(backend: backends.Backend) -> None:
        with backend.serving():
            assert (kernels.core is None) == backend.is_fallback
            assert backend.is_fallback or native.instruction_set(kernels.core) == backend.name
            raise ZeroDivisionError

    for backend in backends.backends_of(torch.device("cpu")):
        with pytest.raises(ZeroDivisionError):
            serve(backend)
        assert kernels.core is core
        assert os.environ.get(native.INSTRUCTION_SET_VARIABLE) == asked


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rich", [True, False])
def test_the_command_prints_a_table_and_writes_json(run, tmp_path, capsys, monkeypatch, rich):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    path = tmp_path / "parity.json"
    assert run("--quick", "--devices", "cpu", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "bounds kept." in printed
    assert "cpu fallback, fused head" in printed
    written = json.loads(path.read_text())
    assert written["passed"]
    assert written["rows"][0].keys() == {*measure.Row._fields, "kept"}
    assert {row["kept"] for row in written["rows"]} == {True}


def test_a_miss_is_named_and_exits_with_1(run, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_OTHERS", 1e-12)
    assert run("--quick", "--devices", "cpu") == 1
    assert "MISSED: cpu fallback, float32 policy_logps" in capsys.readouterr().out


def test_a_device_that_is_not_here_exits_with_2(run, capsys):
    assert run("--quick", "--devices", "abacus") == 2
    assert "devices must be present here (cpu" in capsys.readouterr().err


def test_a_table_without_rich_has_every_number(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    row = measure.Row("cpu x", "float32", "gradient", 9, 3e-7, 1e-8, 2e-7, 4.0, 5e-8, 2, "here")
    table.show(parity.Report([row]))
    printed = capsys.readouterr().out
    for part in ("cpu x", "3.0e-07", "MISSED", "> 1", "2 of 9", "(here)", "0 of 1 bounds kept"):
        assert part in printed
