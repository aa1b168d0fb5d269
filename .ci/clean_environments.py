"""Install the wheel as users do, in clean environments, and see that it works: a table.

    python .ci/clean_environments.py [--torch 2.6.0 2.15.0] [--wheels DIST] [--record FILE]

For each torch an environment of its own, in a folder with spaces in its path; there torch from the
index that pip knows, and tdpo_ext by its name from the wheels' folder. What runs in it sees no
compiler and no package of another environment, and its home cannot be written to. A wheel that
WHEELS lacks for a Python is built first, without CUDA. Downloads some GB. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NEWEST_AND_OLDEST = ("2.6.0", "2.15.0")
# The Python for each torch; others are tried with the Python that runs this.
PYTHON_OF = {"2.6.0": "3.10", "2.15.0": "3.13"}
NOT_WRITABLE = "/proc"  # even for root
DRIVER = "libcuda.so.1"


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """The command's output; if it fails, the output is shown."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def interpreter(version: str) -> str:
    """A Python of this version, else the one that runs this."""
    name = f"python{version}"
    candidates = [
        shutil.which(name),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}")),
    ]
    for found in filter(None, candidates):
        done = subprocess.run([found, "-c", "import venv"], capture_output=True, check=False)
        if done.returncode == 0:
            return found
    return sys.executable


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def driver_here() -> bool:
    libraries = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)
    return DRIVER in libraries.stdout


class Environment:
    def __init__(self, folder: Path, base: str) -> None:
        self.folder = folder
        run(base, "-m", "venv", folder / "clean environment")
        self.bin = folder / "clean environment" / "bin"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(self.python("-c", ask).strip())

    def python(self, *arguments: str | Path) -> str:
        """As a user does: no compiler on the path, a home that cannot be written to."""
        clean = {"PATH": str(self.bin), "HOME": NOT_WRITABLE, "PYTHONDONTWRITEBYTECODE": "1"}
        return run(self.bin / "python", *arguments, cwd=self.folder, **clean)

    def pip(self, *arguments: str | Path) -> str:
        return run(self.bin / "python", "-m", "pip", *arguments)


def has_wheel(environment: Environment, wheels: Path) -> bool:
    tag = environment.python("-c", "import sys; print('cp%d%d' % sys.version_info[:2])").strip()
    return any(wheels.glob(f"tdpo_ext-*-{tag}-*.whl"))


def tried(torch: str, wheels: Path, folder: Path) -> dict[str, Any]:
    environment = Environment(folder, interpreter(PYTHON_OF.get(torch, "")))
    if not has_wheel(environment, wheels):
        print(f"building a wheel for torch {torch}'s Python", flush=True)
        off = "--config-settings=cmake.define.TDPO_CUDA=OFF"
        environment.pip("wheel", "--no-deps", "--wheel-dir", wheels, off, ROOT)
    print(f"installing torch {torch}", flush=True)
    environment.pip("install", f"torch=={torch}")
    before = files_below(environment.packages)
    environment.pip("install", "--no-index", "--find-links", wheels, "tdpo_ext")
    said = json.loads(environment.python(ROOT / ".ci" / "check_installed.py").splitlines()[-1])
    report = environment.python("-m", "tdpo_ext")
    assert "served by                 compiled kernels" in report, report
    environment.python("-m", "tdpo_ext.parity", "--quick")
    environment.pip("uninstall", "--yes", "tdpo_ext")
    left = files_below(environment.packages) ^ before
    assert not left, f"left behind by uninstalling: {left}"
    return {
        "torch": said["torch"],
        "Python": said["python"],
        "glibc, driver": f"{platform.libc_ver()[1]}, {'one' if driver_here() else 'none'}",
        "CUDA in the wheel": said["cuda"],
        "OpenMP runtime": said["openmp"],
        "import beside torch": f"{1000 * said['import_seconds']:.0f} ms",
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=NEWEST_AND_OLDEST)
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install from")
    parser.add_argument("--record", type=Path, help="write the table to this JSON file")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="tdpo ext ") as name:
        wheels = options.wheels or Path(name) / "wheels"
        wheels.mkdir(exist_ok=True)
        for torch in options.torch:
            folder = Path(name) / torch
            folder.mkdir()
            rows.append(tried(torch, wheels.resolve(), folder))
            shutil.rmtree(folder)  # some GB
            print(json.dumps(rows[-1]), flush=True)
    if options.record:
        options.record.write_text(json.dumps({"clean_environments": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
