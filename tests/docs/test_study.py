"""The whole study with small numbers, and that it goes on after it was stopped anywhere."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentiment import MISSING, ROOT

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the study needs {MISSING}: make .venv/demo")

if not MISSING:
    import study
    import study_results
    from study_plan import QUICK
    from study_queue import Clock


def go_on(folder: Path, minutes: float = math.inf, plan: Any = None) -> None:
    study.train_what_is_missing(plan or QUICK, folder, 1, Clock(minutes))


def numbers(folder: Path) -> dict[Any, Any]:
    """What a run measured; its seconds differ from call to call."""
    return {key: line["curve"] for key, line in study_results.read(folder / "runs.jsonl").items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Results that nothing interrupted."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("study")
    go_on(folder)
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "study"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*task: Any) -> None:
        raise AssertionError(f"trained {task}")

    monkeypatch.setattr(study, "prepare", refuse)
    monkeypatch.setattr(study, "train", refuse)


def test_every_run_of_the_plan_is_measured(whole: Path) -> None:
    assert list(numbers(whole)) == list(QUICK.runs())
    for curve in numbers(whole).values():
        assert curve["examples"] == [0, *(8 * step for step in QUICK.evaluate_at())]
        assert curve["on_policy_kl"][0] == 0 < curve["on_policy_kl"][-1]
        assert curve["seq_kl_rejected"][0] == 0 < curve["seq_kl_rejected"][-1]
        assert all(0 < x <= 1 for name in ("reward", "distinct_2") for x in curve[name])
        assert all(0 <= x <= 1 for x in curve["accuracy"])


def test_methods_of_a_seed_share_their_start_and_seeds_do_not(whole: Path) -> None:
    first = [curve["reward"][0] for curve in numbers(whole).values()]
    assert first[0] == first[1] != first[2] == first[3]


def test_summary_and_pictures_are_made(folder: Path) -> None:
    study.analyse(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"] == 4
    assert summary["about"]["made_on"][0]["torch"] == torch.__version__
    assert {claim["verdict"] for claim in summary["claims"]} == {"cannot be told"}  # two seeds
    assert (folder / "frontier.png").exists()


def test_a_second_call_trains_nothing(folder: Path, no_training: None) -> None:
    before = (folder / "runs.jsonl").read_bytes()
    go_on(folder)
    assert (folder / "runs.jsonl").read_bytes() == before


def test_no_time_no_training(folder: Path, no_training: None) -> None:
    (folder / "runs.jsonl").unlink()
    go_on(folder, minutes=0)


def test_a_kill_at_any_byte_of_the_results(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = (whole / "runs.jsonl").read_bytes()
    known = study_results.read(whole / "runs.jsonl")
    trained = []

    def look_up(plan: Any, starts: Path, key: Any) -> Any:
        trained.append(key)
        return known[key]

    monkeypatch.setattr(study, "train", look_up)
    for kept in {*range(0, len(results), 97), len(results) - 1}:
        (folder / "runs.jsonl").write_bytes(results[:kept])
        trained.clear()
        go_on(folder)
        assert (folder / "runs.jsonl").read_bytes() == results
        assert len(trained) == 4 - results[:kept].count(b"\n")


def test_a_run_done_again_gives_the_same_numbers(folder: Path, whole: Path) -> None:
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)
    (folder / "runs.jsonl").write_text(lines[0] + lines[1] + lines[2] + lines[3][:100])
    go_on(folder)
    assert numbers(folder) == numbers(whole)


def test_a_kill_while_a_start_is_made(folder: Path, whole: Path) -> None:
    (folder / "runs.jsonl").unlink()
    start = folder / "starts" / "seed-1.pt"
    start.with_suffix(".part").write_bytes(start.read_bytes()[:1000])
    start.unlink()
    go_on(folder)
    assert numbers(folder) == numbers(whole)


def test_other_conditions_do_not_mix_with_old_results(folder: Path) -> None:
    lines = (folder / "runs.jsonl").read_text().splitlines(keepends=True)
    (folder / "runs.jsonl").write_text(lines[0])
    other = replace(QUICK, config=replace(QUICK.config, steps=7))
    with pytest.raises(SystemExit, match="other conditions"):
        go_on(folder, plan=other)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_study_leaves_no_process_and_goes_on(tmp_path: Path, whole: Path) -> None:
    command = [sys.executable, "examples/sentiment/study.py", "--quick", "--processes", "2"]
    command += ["--output", str(tmp_path)]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until(lambda: (tmp_path / "runs.jsonl").exists(), 300)
    started.kill()
    # Its output ends when the last process that holds it has ended.
    started.communicate(timeout=60)
    assert len(numbers(tmp_path)) < 4
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path) == numbers(whole)


def until(happened: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
