"""Check that the sdist and the wheels in a folder hold all that is needed, and nothing else.

    python .ci/check_distribution.py [--release] FOLDER

--release: the wheels may go on an index, so their tags say what Linux they run on.
"""

from __future__ import annotations

import io
import re
import sys
import tarfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile

LARGEST_WHEEL = 5 * 1024**2
NEWEST_GLIBC = (2, 34)
# What every Linux with Python has. No torch, no OpenMP, no CUDA: those are found at run time.
LIBRARIES = re.compile(r"(libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|ld-linux.*)\.so")


def check_extension(name: str, content: bytes) -> None:
    """What an extension for Linux shows of itself, and what it needs to be loaded."""
    if not content.startswith(b"\x7fELF"):
        return  # macOS
    elf = ELFFile(io.BytesIO(content))
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    seen = [x.name for x in symbols if x["st_shndx"] != "SHN_UNDEF" and x.name]
    assert seen == ["PyInit__core"], f"{name} exports {seen}"
    dynamic = elf.get_section_by_name(".dynamic").iter_tags()
    needed = [tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"]
    foreign = [library for library in needed if not LIBRARIES.match(library)]
    assert not foreign, f"{name} needs {foreign} to be loaded"


def check_tag(path: Path) -> None:
    """manylinux_2_28_x86_64 and the like, of a glibc that is not too new; macOS names its own."""
    platform = path.stem.split("-")[-1]
    if platform.startswith("macosx"):
        return
    versions = [tuple(map(int, x)) for x in re.findall(r"manylinux_(\d+)_(\d+)_", platform)]
    assert versions, f"{path.name} is for this machine only: its tag is {platform}"
    assert min(versions) <= NEWEST_GLIBC, f"{path.name} needs glibc {min(versions)}"


def check_wheel(path: Path, release: bool) -> None:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        extensions = [name for name in names if name.endswith(".so")]
        for name in extensions:
            check_extension(name, archive.read(name))
    package = [name for name in names if ".dist-info/" not in name]
    assert len(extensions) == 1, names
    assert extensions[0].startswith("tdpo_ext/_core."), names
    assert "tdpo_ext/py.typed" in package, names
    assert "tdpo_ext/_core.pyi" in package, names
    for name in package:
        assert name.startswith("tdpo_ext/"), f"{name} does not belong in the wheel"
        assert name.endswith((".py", ".pyi", ".so", "py.typed")), f"{name} is no part of a package"
    for licence in ("LICENSE", "NOTICES"):
        assert any(name.endswith(f"/licenses/{licence}") for name in names), names
    size = path.stat().st_size
    assert size <= LARGEST_WHEEL, f"{path.name} has {size} bytes, {LARGEST_WHEEL} are allowed"
    if release:
        check_tag(path)


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for needed in (
        "CMakeLists.txt",
        "pyproject.toml",
        "LICENSE",
        "NOTICES",
        "csrc/vocab_stats.h",
        "csrc/cuda/token_stats_forward.cu",
        "cmake/cuda.cmake",
        "cmake/exports.map",
    ):
        assert needed in names, f"{needed} is missing from the sdist"
    for name in names:
        assert not name.endswith((".so", ".o", ".pyc")), f"{name} was built, not written"
        assert not name.startswith((".venv", "build/", "dist/")), f"{name} is not source"


def main(folder: Path, release: bool) -> None:
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    assert wheels or sdists, f"{folder} holds neither a wheel nor an sdist"
    for wheel in wheels:
        check_wheel(wheel, release)
    for sdist in sdists:
        check_sdist(sdist)
    for path in (*wheels, *sdists):
        print(f"{path.name}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[-1]), release="--release" in sys.argv)
