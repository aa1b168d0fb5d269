"""Install with each set of compiler flags that people set, run the most sensitive tests: a table.

Run by hand, in half an hour: .venv/bin/python .ci/install_matrix.py [WORD OF A ROW...]
CUDA is left out, since its compiler gets none of these flags.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS: list[dict[str, str]] = [
    {},
    {"CXXFLAGS": "-O0"},
    {"CXXFLAGS": "-march=native"},
    {"CXXFLAGS": "-ffast-math"},
    {"CXXFLAGS": "-Ofast", "LDFLAGS": "-ffast-math"},
    {"CXXFLAGS": "-Werror"},
    {"CXXFLAGS": "-D_GLIBCXX_ASSERTIONS"},
    {"CXXFLAGS": "-std=c++14"},
    {"CXXFLAGS": "-std=c++20"},
    {"CFLAGS": "-flto", "CXXFLAGS": "-flto"},
    {"LDFLAGS": "-Wl,-z,now"},
    {"CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Debug"},
    {"CXX": "clang++"},
    {"CXX": "clang++", "CXXFLAGS": "-ffast-math"},
]
TESTS = ["test_not_finite.py", "test_precision.py", "test_token_stats.py", "test_autograd.py"]


def tried(row: dict[str, str], python: Path, folder: Path) -> str:
    if "CXX" in row and shutil.which(row["CXX"]) is None:
        return "not here"
    arguments = f"-DTDPO_CUDA=OFF {row.get('CMAKE_ARGS', '')}"
    environment = {**os.environ, **row, "CMAKE_ARGS": arguments, "OMP_NUM_THREADS": "1"}
    pip = [str(python), "-m", "pip", "install", "--no-deps", "--force-reinstall", str(ROOT)]
    built = subprocess.run(pip, env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        print(built.stdout, built.stderr)
        return "not built"
    tests = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
    pytest = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *tests]
    pytest += ["-k", "not cuda and not fallback"]
    done = subprocess.run(
        pytest, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip().splitlines()[-1]


def main(words: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # An environment that sees this one's torch but not its tdpo_ext.
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        python = folder / "venv" / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.check_output([str(python), "-c", ask], text=True).strip()
        Path(packages, "torch.pth").write_text(sysconfig.get_path("purelib"))
        for row in ROWS:
            flags = " ".join(f"{key}={value}" for key, value in row.items()) or "none"
            if all(word in flags for word in words):
                print(f"| `{flags}` | {tried(row, python, folder)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
