"""The examples run, learn, are short, and the documentation links to each."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ON_ONE_PROCESS = ("plain_loop", "transformers_trainer", "trl_lora", "cached_reference")
ON_TWO = ("fsdp2", "vocabulary_parallel", "sequence_parallel")
NEEDS = ("transformers", "datasets", "trl", "peft")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]

# Two processes each: what they show is in test_distributed.py too.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ON_TWO]

needs_trainers = pytest.mark.skipif(bool(MISSING), reason=f"the examples need {MISSING}")
losses: dict[str, list[float]] = {}


def run(name: str) -> list[float]:
    if name not in losses:
        printed = printed_by_two(name) if name in ON_TWO else printed_here(name)
        losses[name] = [float(x) for x in re.findall(r"step \d+: loss ([\d.]+)", printed)]
    return losses[name]


def printed_here(name: str) -> str:
    """In this process, which has imported the trainers already."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def printed_by_two(name: str) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_trainers
@pytest.mark.parametrize("name", [*ON_ONE_PROCESS, *SLOW])
def test_an_example_learns(name: str) -> None:
    of_steps = run(name)
    assert of_steps[0] == pytest.approx(0.6931, abs=1e-4)  # policy and reference are the same
    assert of_steps[-1] < 0.6


@needs_trainers
@pytest.mark.parametrize("name", ["cached_reference", *SLOW[1:]])
def test_examples_that_do_the_same_give_the_same(name: str) -> None:
    assert run(name) == pytest.approx(run("plain_loop"), abs=2e-4)


@needs_trainers
def test_a_student_learns_from_its_teacher() -> None:
    of_steps = run("distillation")
    assert len(of_steps) == 40
    assert sum(of_steps[-5:]) / 5 < 0.2 * of_steps[0]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_in_the_documentation(path: Path) -> None:
    text = path.read_text()
    assert path.stem == "tiny" or len(text.splitlines()) <= 60
    assert f"](../examples/{path.name})" in (ROOT / "docs" / "usage.md").read_text()
