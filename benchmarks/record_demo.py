"""What README's picture shows of a run of the demo: from all its numbers to results/demo.json.

make demo
python benchmarks/record_demo.py build/demo/results.json [COMMIT]    (else the one that is here)
python benchmarks/render.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import machine

OUT = Path(__file__).parent / "results" / "demo.json"
SHOWN = ("examples", "reward", "reward_standard_error", "on_policy_kl")


def shown(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(metrics[name], 4) for name in SHOWN}


def recorded(results: dict[str, Any], commit: str) -> dict[str, Any]:
    return {
        "from": "build/demo/results.json of `make demo`, by benchmarks/record_demo.py",
        "commit": commit,
        "device": results["device"],
        "versions": results["versions"],
        "seed": results["config"]["seed"],
        "start": shown(results["start"]),
        "runs": [
            {
                "method": run["method"],
                "learning_rate": run["learning_rate"],
                "evaluation": [shown(metrics) for metrics in run["evaluation"]],
            }
            for run in results["runs"]
        ],
    }


if __name__ == "__main__":
    path, *given = sys.argv[1:]
    commit = given[0] if given else machine.commit()
    report = recorded(json.loads(Path(path).read_text()), commit)
    OUT.write_text(json.dumps(report, indent=1) + "\n")
