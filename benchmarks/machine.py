"""The description of the machine and the software in a report."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in names if line.startswith("model name")]
    return f"{models[0]} ({len(models)} cores)" if models else platform.processor()


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def described() -> dict[str, Any]:
    import torch

    import tdpo_ext

    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tdpo_ext": tdpo_ext.__version__,
        "commit": commit(),
        "instruction_set": tdpo_ext.backends()["cpu"]["instruction_set"],
    }
