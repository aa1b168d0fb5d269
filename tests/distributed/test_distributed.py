"""Several gloo processes on this machine: ``*_scenarios.py``, run by ``distributed_worker.py``."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from recording import record

HERE = Path(__file__).parent
PROCESSES = (2, pytest.param(4, marks=pytest.mark.slow))
SECONDS = 300


def scenarios_of(module: str) -> list[str]:
    return re.findall(r"@scenario\ndef (\w+)", (HERE / f"{module}.py").read_text())


@functools.cache
def results_of(module: str, processes: int) -> dict[str, dict[str, float]] | str:
    """The errors of all scenarios of a module, or a text that says what failed.

    All run in one launch, since processes take long to start.
    """
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder) / f"{rank}.txt" for rank in range(processes)]
        codes = run_all(folder, module, errors)
        said = "\n".join(path.read_text()[-4000:] for path in errors)
        if codes != [0] * processes:
            return f"exit codes {codes}\n{said}"
        return json.loads((Path(folder) / "results.json").read_text())


def run_all(folder: str, module: str, errors: list[Path]) -> list[int | None]:
    """Exit codes. Where one process fails the others would wait for ever: all are ended."""
    processes = str(len(errors))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": processes,
        "LOCAL_SIZE": processes,  # DeepSpeed asks for it
        "DS_ACCELERATOR": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_worker.py"), folder, module],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=path.open("w"),
        )
        for rank, path in enumerate(errors)
    ]
    deadline = time.monotonic() + SECONDS
    codes: list[int | None] = [None] * len(started)
    while None in codes and not any(codes) and time.monotonic() < deadline:
        time.sleep(0.1)
        codes = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    return codes


def bound_of(scenario: str, quantity: str) -> float:
    if quantity == "bits":
        return 0.0
    if "float16" in scenario and "gradient" in quantity:
        return 2.0**-8
    if "float64" in scenario:
        return 1e-12
    return 1e-4 if quantity == "kl of close rows" else 2e-6


def errors_of(module: str, scenario: str, processes: int) -> dict[str, float]:
    results = results_of(module, processes)
    assert isinstance(results, dict), results
    print(f"{processes} processes, {scenario}: {results[scenario]}")
    return results[scenario]


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("scenario", scenarios_of("vocabulary_scenarios"))
def test_a_sharded_vocabulary(scenario: str, processes: int) -> None:
    errors = errors_of("vocabulary_scenarios", scenario, processes)
    gradients = [error for quantity, error in errors.items() if "gradient" in quantity]
    if gradients:
        what = "vocabulary sharded: " + scenario.replace("_", " ")
        values = [error for quantity, error in errors.items() if "gradient" not in quantity]
        row = {"loss": max(values), "gradient": max(gradients)}
        record("vocabulary", {"what": what, "processes": processes, **row})
    for quantity, error in errors.items():
        assert error <= bound_of(scenario, quantity), quantity


def check_steps(module: str, scenario: str, processes: int) -> None:
    errors = errors_of(module, scenario, processes)
    what = scenario.replace("_", " ")
    record("processes", {"what": what, "processes": processes, **errors})
    assert errors["loss"] <= 2e-6
    assert errors["gradient"] <= 5e-5


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("scenario", scenarios_of("model_scenarios"))
def test_steps_of_models(scenario: str, processes: int) -> None:
    check_steps("model_scenarios", scenario, processes)


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
@pytest.mark.parametrize("scenario", scenarios_of("deepspeed_scenarios"))
def test_steps_with_zero3(scenario: str) -> None:
    check_steps("deepspeed_scenarios", scenario, processes=2)


@pytest.mark.parametrize("scenario", scenarios_of("trainer_scenarios"))
def test_steps_of_trainers(scenario: str) -> None:
    check_steps("trainer_scenarios", scenario, processes=2)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("scenario", scenarios_of("evaluation_scenarios"))
def test_evaluation(scenario: str, processes: int) -> None:
    errors = errors_of("evaluation_scenarios", scenario, processes)
    what = scenario.replace("_", " ")
    record("processes", {"what": what, "processes": processes, **errors, "gradient": 0.0})
    assert errors["loss"] <= 2e-6
