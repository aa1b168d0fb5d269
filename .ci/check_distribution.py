"""Check that the sdist and the wheel in a folder hold all that is needed, and nothing else."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    package = [name for name in names if ".dist-info/" not in name]
    extension = [name for name in package if name.startswith("tdpo_ext/_core.")]
    assert any(name.endswith(".so") for name in extension), names
    assert "tdpo_ext/py.typed" in package, names
    assert "tdpo_ext/_core.pyi" in package, names
    for name in package:
        assert name.startswith("tdpo_ext/"), f"{name} does not belong in the wheel"
        assert name.endswith((".py", ".pyi", ".so", "py.typed")), f"{name} is no part of a package"
    assert any(name.endswith("/licenses/LICENSE") for name in names), names


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for needed in (
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "csrc/vocab_stats.h",
        "csrc/cuda/token_stats_forward.cu",
        "cmake/cuda.cmake",
    ):
        assert needed in names, f"{needed} is missing from the sdist"
    for name in names:
        assert not name.endswith((".so", ".o", ".pyc")), f"{name} was built, not written"
        assert not name.startswith((".venv", "build/", "dist/")), f"{name} is not source"


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name}: {wheel.stat().st_size // 1024} KiB")
    print(f"{sdist.name}: {sdist.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
