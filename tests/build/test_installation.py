"""How the package is built: with flags of the user's own, and without a compiler.

Nothing is compiled here: CMake configures, and the compiler is asked what it would do.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

BESIDE = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CMAKE, NINJA = (shutil.which(name, path=BESIDE) for name in ("cmake", "ninja"))
FROM_PYPI = "TDPO_CUDA_FROM_PYPI"
OF_THE_BUILD = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CMAKE_ARGS", "CUDACXX", FROM_PYPI)


def test_denormals_survive_the_import():
    """GCC's crtfastmath.o would flush them, in all of the process."""
    assert float(torch.tensor(1e-40) * torch.tensor(1.0)) > 0


pybind11 = pytest.importorskip("pybind11")
pytest.importorskip("scikit_build_core")
needs_compiler = pytest.mark.skipif(not emulated.compiler(), reason="no C++ compiler on the path")
if CMAKE is None or NINJA is None:
    pytest.skip("no CMake or no Ninja on the path", allow_module_level=True)


def environment(**more: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in OF_THE_BUILD}
    return {**own, "PATH": BESIDE, **more}


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, **both, text=True, check=False, **options)


def configure(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(
        str(CMAKE),
        *("-S", str(emulated.ROOT), "-B", str(folder / "build"), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={NINJA}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
        env=environment(**variables),
    )


# --- flags ----------------------------------------------------------------------------------------

LOOSE = (
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-ffinite-math-only -fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math",
)
SAID_OF_LOOSE_MATH = (
    "__FAST_MATH__ 1",
    "__FINITE_MATH_ONLY__ 1",
    "__ASSOCIATIVE_MATH__ 1",
    "__RECIPROCAL_MATH__ 1",
    "__NO_SIGNED_ZEROS__ 1",
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> tuple[Path, list[str]]:
    """The build's folder and its commands, with the first of these flags wherever they are."""
    folder = tmp_path_factory.mktemp("flags")
    done = configure(folder, "-DTDPO_CUDA=OFF", CXXFLAGS=LOOSE[0], LDFLAGS=LOOSE[0])
    assert done.returncode == 0, done.stdout
    listed = run(str(NINJA), "-t", "commands", "_core", cwd=folder / "build").stdout
    return folder / "build", [line for line in listed.splitlines() if LOOSE[0] in line]


@needs_compiler
@pytest.mark.parametrize("flags", LOOSE)
def test_flags_of_the_user_do_not_loosen_arithmetic(commands, flags):
    """By the compiler's own word: the macros that it defines under all the flags together."""
    build, lines = commands
    compiled = [line.replace(LOOSE[0], flags) for line in lines if " -c " in line]
    assert {"bindings.cpp", "token_stats.cpp", "kernels_baseline.cpp"} <= {
        Path(line.split()[-1]).name for line in compiled
    }
    for line in compiled:
        command = shlex.split(line)
        output = command.index("-o")
        said = run(*command[:output], *command[output + 2 :], "-dM", "-E", cwd=build).stdout
        assert "__FINITE_MATH_ONLY__ 0" in said, said[-2000:]
        assert not [loose for loose in SAID_OF_LOOSE_MATH if loose in said], line


@needs_compiler
@pytest.mark.parametrize("flags", LOOSE)
def test_flags_of_the_user_do_not_flush_denormals(commands, flags):
    """What is linked, as the compiler says: a line of ": && compiler ... && :"."""
    build, lines = commands
    (line,) = (line.replace(LOOSE[0], flags) for line in lines if " -c " not in line)
    said = run(*shlex.split(line.split("&&")[1]), "-###", cwd=build).stdout
    assert "kernels_baseline" in said
    assert "crtfastmath" not in said


@needs_compiler
@pytest.mark.parametrize("flags", ["-march=native", "-march=x86-64-v3", "-march=x86-64-v4"])
def test_flags_of_the_user_may_bring_more_instructions(commands, flags):
    """To all instruction sets' files: vectors stay as wide as each file's own."""
    build, lines = commands
    lines = [line for line in lines if "cpu/kernels_" in line and "TDPO_X86" in line]
    if not lines:
        pytest.skip("no x86-64")
    for line in lines:
        done = run(*shlex.split(line.replace(LOOSE[0], flags)), "-fsyntax-only", cwd=build)
        assert done.returncode == 0, done.stdout


# --- no compiler ----------------------------------------------------------------------------------


def build_wheel(folder: Path, settings: str) -> subprocess.CompletedProcess[str]:
    """As pip does it, where there are CMake and Ninja and nothing else."""
    tools = folder / "tools"
    tools.mkdir()
    for tool in (CMAKE, NINJA):
        (tools / Path(str(tool)).name).symlink_to(Path(str(tool)).resolve())
    call = f"from scikit_build_core.build import build_wheel as f; f({str(folder)!r}, {settings})"
    variables = environment() | {"PATH": str(tools)}
    return run(sys.executable, "-c", call, cwd=emulated.ROOT, env=variables)


def test_without_a_compiler_the_last_lines_say_what_to_do(tmp_path):
    done = build_wheel(tmp_path, "{}")
    assert done.returncode != 0
    last = "\n".join(done.stdout.strip().splitlines()[-12:])
    for help_ in ("apt install g++", "CXX=", "wheel.cmake=false", "docs/installation.md"):
        assert help_ in last, done.stdout


def test_without_a_compiler_plain_pytorch_can_be_installed(tmp_path):
    done = build_wheel(tmp_path, "{'wheel.cmake': 'false'}")
    assert done.returncode == 0, done.stdout
    assert [wheel.name.split("-", 2)[2] for wheel in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]


# --- CUDA compilers -------------------------------------------------------------------------------

OLD = 'echo "Cuda compilation tools, release 11.2, V11.2.152"'


@needs_compiler
@pytest.mark.parametrize(
    ("wanted", "does", "reason"),
    [
        ("AUTO", OLD, "is of CUDA 11.2, and 11.8 is the oldest"),
        ("ON", "exit 1", "could not compile"),
    ],
    ids=["old", "broken"],
)
def test_a_cuda_compiler_that_will_not_do_is_named(tmp_path, wanted, does, reason):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{does}\n")
    nvcc.chmod(0o755)
    done = configure(tmp_path, f"-DTDPO_CUDA={wanted}", CUDACXX=str(nvcc))
    assert (done.returncode == 0) == (wanted == "AUTO"), done.stdout
    begin = "no CUDA kernels, because" if wanted == "AUTO" else "TDPO_CUDA=ON, but"
    assert f"{begin} {nvcc} {reason}" in " ".join(done.stdout.split()), done.stdout


ASK = "from scikit_build_core.build import get_requires_for_build_wheel as f; print(*f(), sep=';')"
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
COMPILER += ("nvidia-cuda-cccl",)


def requirements(**variables: str) -> list[str]:
    own = environment(**variables)
    said = run(sys.executable, "-c", ASK, cwd=emulated.ROOT, env=own).stdout
    return [x for x in said.splitlines()[-1].split(";") if x.startswith("nvidia")]


def test_a_variable_brings_the_cuda_compiler_as_a_build_requirement():
    assert requirements() == []
    assert requirements(TDPO_CUDA_FROM_PYPI="0") == []
    assert requirements(TDPO_CUDA_FROM_PYPI="1") == [f"{name}==13.0.*" for name in COMPILER]


@needs_compiler
def test_a_cuda_compiler_that_pypi_did_not_bring_is_an_error(tmp_path):
    """And no other compiler takes its place."""
    done = configure(tmp_path, "-DTDPO_CUDA_FROM_PYPI=ON", CUDACXX="/usr/local/cuda/bin/nvcc")
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "nvidia-cuda-nvcc is not in the build environment" in said, done.stdout


@needs_compiler
@pytest.mark.slow  # downloads 271 MB
@pytest.mark.skipif(platform.system() != "Linux", reason="NVIDIA's packages are for Linux")
def test_the_cuda_compiler_of_pypi_compiles_and_links(tmp_path):
    """Where no other is on the path, and where the path has a space."""
    packages = tmp_path / "site packages"
    wanted = requirements(TDPO_CUDA_FROM_PYPI="1")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(packages), *wanted]
    subprocess.run(pip, check=True)
    options = ["-DTDPO_CUDA=ON", "-DTDPO_CUDA_FROM_PYPI=ON", "-DCMAKE_CUDA_ARCHITECTURES=90"]
    tools = f"{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = configure(tmp_path, *options, PYTHONPATH=str(packages), PATH=tools)
    assert done.returncode == 0, done.stdout
    assert f"CUDA kernels for 90 with {packages}" in done.stdout
    build = tmp_path / "build"
    made = run(str(NINJA), "CMakeFiles/tdpo_cuda.dir/csrc/cuda/runtime.cu.o", cwd=build)
    assert made.returncode == 0, made.stdout
    listed = run(str(NINJA), "-t", "commands", "_core", cwd=build).stdout
    assert f'-L"{packages}/nvidia/cu13/lib"' in listed
    assert "-rpath" not in listed  # no path of the build's machine in the extension
