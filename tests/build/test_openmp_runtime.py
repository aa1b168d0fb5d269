"""Where the core finds threads: in the OpenMP runtime that torch has loaded, whatever its name.

``csrc/cpu/threads.cpp`` is compiled by itself. Small libraries stand in for torch and its runtime.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from processes import needs_linux

pytestmark = [
    needs_linux,
    pytest.mark.skipif(not emulated.compiler(), reason="no C++ compiler on the path"),
]

RUNTIME = """
extern "C" int regions = 0;  // parallel regions that this runtime has served
extern "C" void GOMP_parallel(void (*task)(void*), void* data, unsigned threads, unsigned) {
  ++regions;
  for (unsigned i = 0; i < threads; ++i) task(data);
}
"""
CORE = """
#include "cpu/threads.h"
extern "C" const char* runtime() {
  static std::string name;
  name = tdpo::cpu::openmp_runtime();
  return name.c_str();
}
extern "C" long sum_of_indices(long count, int threads) {
  long sum = 0;
  const auto add = [](const void* sum, int64_t index) {
    *static_cast<long*>(const_cast<void*>(sum)) += index;
  };
  tdpo::cpu::run_on_threads(count, threads, add, &sum);
  return sum;
}
"""
SCRIPT = """
import ctypes, json, os, sys
*first, core = sys.argv[1:]
loaded = [ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW) for path in first]
core = ctypes.CDLL(core)
core.runtime.restype = ctypes.c_char_p
print(json.dumps({
    "runtime": os.path.basename(core.runtime().decode()),
    "sum": core.sum_of_indices(ctypes.c_long(101), 3),
    "regions": [ctypes.c_int.in_dll(x, "regions").value for x in loaded if "omp" in x._name],
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("threads")

    def linked(name: str, text: str, *more: str) -> None:
        source = (folder / name).with_suffix(".cpp")
        source.write_text(text)
        flags = ["-std=c++17", "-shared", "-fPIC", f"-I{emulated.CSRC}", f"-L{folder}"]
        command = [str(emulated.compiler()), *flags, str(source), *more, "-o", str(folder / name)]
        subprocess.run([*command, "-Wl,-rpath,$ORIGIN", "-ldl"], check=True, cwd=folder)

    linked("libgomp-a34b3233.so.1", RUNTIME)
    linked("libomp-other.so", RUNTIME)
    linked("libtorch_cpu.so", "", "-Wl,--no-as-needed", "-l:libgomp-a34b3233.so.1")
    linked("core.so", CORE, str(emulated.CSRC / "cpu" / "threads.cpp"))
    return folder


def run(folder: Path, *names: str, **environment: str) -> dict[str, object]:
    paths = [str(folder / name) for name in names]
    command = [sys.executable, "-c", SCRIPT, *paths, str(folder / "core.so")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def test_without_torch_one_thread_does_all(folder):
    assert run(folder) == {"runtime": "", "sum": 5050, "regions": []}


def test_the_runtime_is_the_one_that_torch_links_to(folder):
    """By whatever name, though others are loaded first, and though no symbol of it is global."""
    said = run(folder, "libomp-other.so", "libtorch_cpu.so", "libgomp-a34b3233.so.1")
    assert said == {"runtime": "libgomp-a34b3233.so.1", "sum": 5050, "regions": [0, 1]}


def test_a_preloaded_runtime_serves_the_core_as_it_serves_torch(folder):
    preloaded = str(folder / "libomp-other.so")
    said = run(folder, "libtorch_cpu.so", "libomp-other.so", LD_PRELOAD=preloaded)
    assert said == {"runtime": "libomp-other.so", "sum": 5050, "regions": [1]}
