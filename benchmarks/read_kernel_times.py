"""A report from the lines that benchmarks/kernel_times.cu prints of several builds. It needs no
torch. Beside them it writes the choices of csrc/cuda/choices.cuh that hold where nothing is said.

python benchmarks/read_kernel_times.py LOG REPORT.json
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import machine

GAPS = ("0.05", "0.3", "0.5", "1", "3")
KINDS = ("any", "tdpo1", "tdpo2", "dpo", "rejected")
DIVERGENCES = ("forward, 0.3", "forward, 3", "entropy", "reverse", "both KLs")
COLUMNS = {"forward": GAPS, "backward": KINDS, "divergences": DIVERGENCES}
CHOICES = machine.ROOT / "csrc" / "cuda" / "choices.cuh"


def measurement(line: str) -> dict[str, Any]:
    """One build, dtype and shape."""
    build, rest = line[:24].strip(), line[24:].split()
    dtype, rows, _, vocabulary, copy, *shares, mean_kl, mean_logp = rest
    columns = [(part, name) for part, names in COLUMNS.items() for name in names]
    share_of: dict[str, dict[str, float]] = {part: {} for part in COLUMNS}
    for (part, name), share in zip(columns, shares, strict=True):
        share_of[part][name] = float(share)
    return {
        "build": build,
        "dtype": dtype,
        "rows": int(rows),
        "vocabulary": int(vocabulary),
        "copy_gigabytes_per_second": float(copy),
        **share_of,
        "mean_kl": float(mean_kl),
        "mean_logp": float(mean_logp),
    }


def report(text: str) -> dict[str, Any]:
    headline, _, *lines = text.splitlines()
    return {
        "device": headline.split(",")[0],
        "commit": machine.commit(),
        "choices": dict(re.findall(r"#define TDPO_(\w+) (\w+)", CHOICES.read_text())),
        "measurements": [measurement(line) for line in lines],
    }


def main() -> None:
    log, path = map(Path, sys.argv[1:])
    path.write_text(json.dumps(report(log.read_text()), indent=1) + "\n")


if __name__ == "__main__":
    main()
