"""Object files, compiled once for all test processes and kept in build/test-objects.

What a file is compiled from tells objects apart: its preprocessed text, the flags and the compiler.
So a copy of the sources with one fault compiles only the files that the fault reaches.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path

KEPT = Path(__file__).parents[2] / "build" / "test-objects"
MOST = 100


@functools.cache
def _version(compiler: str) -> bytes:
    return _run([compiler, "--version"])


def _run(command: list[str]) -> bytes:
    # Under a sanitizer's runtime, which test runs preload, a compiler takes three times as long.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE).stdout


def compiled(compiler: str, flags: list[str], source: Path) -> Path:
    """The object file of a source; whichever process needs it first makes it."""
    text = _run([compiler, *flags, "-E", "-P", str(source)])
    not_paths = [flag for flag in flags if not flag.startswith("-I")]
    key = hashlib.sha256(b"\0".join((_version(compiler), repr(not_paths).encode(), text)))
    target = KEPT / f"{source.stem}-{key.hexdigest()[:24]}.o"
    KEPT.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            target.touch()
        else:
            made = target.with_suffix(".part")
            _run([compiler, *flags, "-c", str(source), "-o", str(made)])
            made.replace(target)
            _forget_the_oldest()
    return target


def linked(compiler: str, flags: list[str], objects: list[Path], target: Path) -> None:
    _run([compiler, *flags, *map(str, objects), "-o", str(target)])


def _forget_the_oldest() -> None:
    by_age = sorted(KEPT.glob("*.o"), key=lambda path: path.stat().st_mtime)
    for path in by_age[:-MOST]:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
