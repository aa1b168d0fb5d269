"""The demo's whole path, shrunk (--quick); its result is for people to look at, not for a test."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from sentiment import MISSING, ROOT


@pytest.mark.skipif(bool(MISSING), reason=f"the demo needs {MISSING}: make .venv/demo")
def test_the_demo_runs(tmp_path):
    command = [sys.executable, "examples/sentiment", "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["DPO", "TDPO2"]
    for run in results["runs"]:
        assert math.isfinite(run["evaluation"][-1]["reward"])
        assert run["training"][-1]["kl/rejected"] > 0
    # The same start, the same first batch: before the first update the methods agree.
    first = [run["training"][0] for run in results["runs"]]
    assert first[0]["logps/chosen"] == pytest.approx(first[1]["logps/chosen"], rel=1e-5)
    assert (tmp_path / "reward_and_kl.png").stat().st_size > 10_000
