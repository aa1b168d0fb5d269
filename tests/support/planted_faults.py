"""Faults planted in the Python layers, one at a time: does a test notice?

    python tests/support/planted_faults.py                      # all: an hour or two
    python tests/support/planted_faults.py --only checks.py     # of a file, or with these words

Not run in CI. Each fault is applied to a copy of the package, on which the tests named in
``planted_faults.txt`` run. Exit status 1 if a fault survives that the table does not explain.

The table: ``= FILE: TESTS`` (pytest's arguments), then faults, separated by blank lines: the lines
to replace after ``-`` (found wherever their text, without indentation, stands; once in the file),
the lines put there after ``+``, and after ``?`` why no test can see it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# The layers in Python see one device in all of these.
FEWER = "not cuda-on-cpu and not baseline and not inductor"
# An editable install's finder would come before PYTHONPATH.
SITE = (
    'import sys\nsys.meta_path = [x for x in sys.meta_path if "Scikit" not in type(x).__name__]\n'
)


class Fault(NamedTuple):
    file: str
    tests: str
    old: list[str]
    new: list[str]
    explained: str

    def __str__(self) -> str:
        lines = [f"- {line}" for line in self.old] + [f"+ {line}" for line in self.new]
        return "\n    ".join([self.file, *lines])

    def applied_to(self, text: str) -> str:
        lines = text.splitlines()
        stripped, wanted = [line.strip() for line in lines], [line.strip() for line in self.old]
        found = [at for at in range(len(lines)) if stripped[at : at + len(wanted)] == wanted]
        if len(found) != 1:
            raise ValueError(f"{self}\nstands {len(found)} times in the file, not once")
        at = found[0]
        indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
        lines[at : at + len(wanted)] = [indent + line for line in self.new]
        return "\n".join(lines) + "\n"


def faults() -> Iterator[Fault]:
    file = tests = ""
    for block in (Path(__file__).parent / "planted_faults.txt").read_text().split("\n\n"):
        parts: dict[str, list[str]] = {"-": [], "+": [], "?": []}
        for line in block.splitlines():
            if line.startswith("= "):
                file, tests = line[2:].split(": ", 1)
            elif line:
                parts[line[0]].append(line[2:])
        if parts["-"]:
            yield Fault(file, tests, parts["-"], parts["+"], " ".join(parts["?"]))


def copy_to(folder: Path) -> None:
    for path in ROOT.iterdir():
        if path.name in ("python", "tests"):
            shutil.copytree(path, folder / path.name, symlinks=True)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    core = Path(importlib.import_module("tdpo_ext._core").__file__ or "")
    if not (folder / "python" / "tdpo_ext" / core.name).exists():
        (folder / "python" / "tdpo_ext" / core.name).symlink_to(core)
    (folder / "python" / "sitecustomize.py").write_text(SITE)


def run(folder: Path, tests: str) -> str:
    """The first test that fails; nothing if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", FEWER]
    environment = {**os.environ, "PYTHONPATH": str(folder / "python"), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [*command, *shlex.split(tests)],
            cwd=folder / "tests",
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
    except subprocess.TimeoutExpired:
        return "time out"
    failed = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    if done.returncode == 0 or failed:
        return "".join(failed[:1])
    if done.returncode < 0:
        return f"signal {-done.returncode}"
    raise RuntimeError(f"the tests could not be run:\n{done.stdout}\n{done.stderr}")


def verdict(folder: Path, fault: Fault) -> tuple[str, str]:
    path = folder / "python" / "tdpo_ext" / fault.file
    original = path.read_text()
    path.write_text(fault.applied_to(original))
    noticed = run(folder, fault.tests)
    path.write_text(original)
    if noticed:
        return "killed", noticed
    return ("explained", fault.explained) if fault.explained else ("SURVIVED", "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="a folder, a file, or words of its lines")
    only = parser.parse_args().only
    chosen = [x for x in faults() if only in "\n".join((x.file, *x.old, *x.new))]
    counts = {"killed": 0, "explained": 0, "SURVIVED": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_to(folder)
        for tests in dict.fromkeys(fault.tests for fault in chosen):
            if failed := run(folder, tests):
                sys.exit(f"without any fault: {failed}")
        for fault in chosen:
            what, because = verdict(folder, fault)
            counts[what] += 1
            print(f"{what}: {fault}\n    {because}", flush=True)
    print(counts)
    sys.exit(counts["SURVIVED"] > 0)


if __name__ == "__main__":
    main()
