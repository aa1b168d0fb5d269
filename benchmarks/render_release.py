"""What is known of the files of a release: from reports of .ci/make_wheel.py and
.ci/clean_environments.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return report


def tables() -> dict[str, list[dict[str, Any]]]:
    return {"clean_environments": read("environments.json")["clean_environments"]}


def release_bytes() -> str:
    report, twice = read("release.json"), read("release-twice.json")
    sizes = [
        f"`{name}` {size / 2**20:.1f} MB" if size > 2**20 else f"`{name}` {size / 2**10:.0f} KB"
        for name, size in report["bytes"].items()
    ]
    equal = "the same bytes" if twice["same_bytes_twice"] else "other bytes"
    return (
        f"On {report['date']}, at commit {report['commit']}: {', '.join(sizes)}. Built twice at "
        f"commit {twice['commit']} (CUDA architectures: {twice['architectures']}), in the same "
        f"folder: {equal}. Elsewhere the sdist is the same, and in the wheel the CUDA kernels have "
        "other names: nvcc puts a hash of a source's path into names in anonymous namespaces."
    )


def texts() -> dict[str, str]:
    return {"release_bytes": release_bytes()}
