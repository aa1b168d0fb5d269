"""The file of results: a line of JSON for each run, written when the run ends."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from study_plan import RunKey, Setting

Line = dict[str, Any]


def read(path: Path) -> dict[RunKey, Line]:
    """All whole lines, without one that a killed process left half-written."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    return {key_of(line): line for line in lines}


def key_of(line: Line) -> RunKey:
    setting = Setting(line["method"], line["alpha"], line["beta"])
    return RunKey(setting, line["learning_rate"], line["seed"])


def line_of(key: RunKey, seconds: float, curve: dict[str, list[float]]) -> Line:
    return {
        **key.setting._asdict(),
        "learning_rate": key.learning_rate,
        "seed": key.seed,
        "seconds": round(seconds, 1),
        "curve": {name: [rounded(value) for value in values] for name, values in curve.items()},
    }


def rounded(value: float) -> float | None:
    """Four digits; None for numbers that are not finite, since JSON has none of these."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def cut_half_line(path: Path) -> None:
    """Remove what follows the last line end, so that the next line begins on its own."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def append(path: Path, line: Line) -> None:
    """Add a line in one write, which is on the disk when this returns."""
    with open(path, "ab") as file:
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def as_text(value: Any) -> str:
    """JSON, with a list of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r'\[[^][{}"]*\]', lambda found: " ".join(found[0].split()), text) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a killed process leaves the old one or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
