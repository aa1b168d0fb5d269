"""DPO, TDPO1 and TDPO2 over seeds, learning rates and DPO's beta: reward against KL.

    python examples/sentiment/study.py [--output FOLDER] [--budget MINUTES] [--processes N]

It takes two to three hours on two cores (study_plan.py) and can be interrupted: the next call goes
on with the runs that are missing. With --budget 0 it trains nothing and analyses what there is.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # read when torch and transformers are imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import study_pictures
import study_results
from report import console
from study_page import claim_lines
from study_plan import FULL, QUICK, Plan
from study_queue import Clock, executor_of, work
from study_run import device, prepare, train
from study_summary import summary_of
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from machine import described


def main() -> None:
    arguments = parse_arguments()
    plan = QUICK if arguments.quick else FULL
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_what_is_missing(plan, arguments.output, arguments.processes, Clock(arguments.budget))
    analyse(arguments.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Reward against KL, over seeds.")
    parser.add_argument("--output", type=Path, default=Path("build/study"))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="all of it with small numbers: a test")
    return parser.parse_args()


def train_what_is_missing(plan: Plan, output: Path, processes: int, clock: Clock) -> None:
    path, starts = output / "runs.jsonl", output / "starts"
    study_results.cut_half_line(path)
    done = study_results.read(path)
    missing = [key for key in plan.runs() if key not in done]
    if not missing or not clock.has(0):
        console.print(f"{len(missing)} runs are missing; training none.")
        return
    note_setting(plan, output)
    starts.mkdir(exist_ok=True)
    with executor_of(processes) as executor:
        seeds = sorted({key.seed for key in missing})
        begun = work(partial(prepare, plan, starts), seeds, executor, processes, clock)
        ready = {}
        for seed, about in tqdm(begun, "Starts of seeds", total=len(seeds), unit="seed"):
            ready[seed] = about
        note_starts(output, ready)
        keys = [key for key in missing if key.seed in ready]
        lines = work(partial(train, plan, starts), keys, executor, processes, clock)
        runs = len(done) + len(missing)
        for _, line in tqdm(lines, "Runs", total=runs, initial=len(done), unit="run"):
            study_results.append(path, line)


def note_setting(plan: Plan, output: Path) -> None:
    """setting.json: what all runs share, which must be the same at every call, and each machine
    and commit that made some of them."""
    path = output / "setting.json"
    setting: dict[str, Any] = {"conditions": plan.conditions(), "made_on": [], "starts": {}}
    if path.exists():
        setting = json.loads(path.read_text(encoding="utf-8"))
        if setting["conditions"] != plan.conditions():
            raise SystemExit(
                f"{path} belongs to runs under other conditions than those of study_plan.py: "
                "name another --output, or remove that folder"
            )
    made_on = {"device": device(), **described()}
    if made_on not in setting["made_on"]:
        setting["made_on"].append(made_on)
    study_results.replace_file(path, json.dumps(setting, indent=1))


def note_starts(output: Path, starts: dict[int, dict[str, float]]) -> None:
    """Add to setting.json what was measured before the runs: parameters, losses, pairs, seconds."""
    path = output / "setting.json"
    setting = json.loads(path.read_text(encoding="utf-8"))
    for seed, about in starts.items():
        rounded = {name: study_results.rounded(value) for name, value in about.items()}
        setting["starts"][str(seed)] = rounded
    study_results.replace_file(path, json.dumps(setting, indent=1))


def analyse(output: Path) -> None:
    """Write summary.json and the pictures, if there are results."""
    lines = study_results.read(output / "runs.jsonl")
    if not lines:
        return
    about = json.loads((output / "setting.json").read_text(encoding="utf-8"))
    summary = summary_of(lines, about)
    study_results.replace_file(output / "summary.json", study_results.as_text(summary))
    study_pictures.draw(summary, output)
    console.print("\n".join(claim_lines(summary)), soft_wrap=True, markup=False)
    console.print(f"{output}: summary.json, frontier.png, seq_kl.png", soft_wrap=True)


if __name__ == "__main__":
    main()
