"""Check the machine code of the CUDA kernels in the built extension, for every architecture.

Each kernel: no registers spilled to memory, no more registers than let a multiprocessor hold the
blocks that the kernel counts on, and 16-byte loads (and stores) of global memory where it streams.
Needs no card: NVIDIA's disassembler is on PyPI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tdpo_ext import native

REGISTERS_OF_A_PARTITION = 16384  # a multiprocessor has four, each with a quarter of the warps
WARPS_OF_A_BLOCK = 7  # kBlockWarps in csrc/cuda/team.cuh


class Expected(NamedTuple):
    blocks: int  # on one multiprocessor, as __launch_bounds__ says
    loads: bool  # 16 bytes at a time
    stores: bool


def expected(kernel: str) -> Expected:
    """What the sources promise, by the kernel's mangled name."""
    double = "kernelId" in kernel
    if "row_records_kernel" in kernel:
        alone, shifted = "Li1E" in kernel, "Lb1E" in kernel
        blocks = 1 if double else 2 if alone else 3 if shifted else 4
        return Expected(blocks, loads=True, stores=False)
    if "token_stats_backward_kernel" in kernel:
        narrow = "kernelIfN" in kernel  # float32 logits, half-width gradient: 8 bytes at a time
        return Expected(2 if double else 4, loads=True, stores=not narrow)
    # A thread per row, a few numbers each; and what only asks whether this build fits a card.
    if any(name in kernel for name in ("finish_", "merge_tile_kernel", "probe_kernel")):
        return Expected(1, loads=False, stores=False)
    raise SystemExit(f"{kernel}: not known here; say what it promises")


def disassembler() -> Path | None:
    """The folder of PyPI's cuobjdump and nvdisasm."""
    try:
        package = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return None
    folders = package.submodule_search_locations or [] if package else []
    tools = [Path(folder) / "bin" for folder in folders]
    return next((folder for folder in tools if (folder / "cuobjdump").exists()), None)


def dump(option: str, extension: Path) -> str:
    tools = disassembler()
    assert tools is not None
    # cuobjdump looks for nvdisasm on the path.
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), option, str(extension)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def registers_and_stack(extension: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, kernel) -> registers, bytes of stack."""
    found, architecture, kernel = {}, "", ""
    for line in dump("--dump-resource-usage", extension).splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            kernel = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            found[architecture, kernel] = int(match[1]), int(match[2])
    return found


def instructions(extension: Path) -> dict[tuple[str, str], Counter[str]]:
    """(architecture, kernel) -> how often each instruction occurs."""
    found: dict[tuple[str, str], Counter[str]] = {}
    architecture, counts = "", Counter[str]()
    for line in dump("--dump-sass", extension).splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", line.strip()):
            counts = found.setdefault((architecture, match[1]), Counter())
        elif match := re.match(r"/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)", line.strip()):
            counts[match[1]] += 1
    return found


def faults(kernel: str, registers: int, stack: int, counts: Counter[str]) -> list[str]:
    promised = expected(kernel)
    warps = -(-promised.blocks * WARPS_OF_A_BLOCK // 4)
    limit = min(255, REGISTERS_OF_A_PARTITION // (warps * 32) // 8 * 8)
    spills = sum(n for name, n in counts.items() if name.startswith(("STL", "LDL")))
    wide = {
        what: sum(n for name, n in counts.items() if name.startswith(what) and ".128" in name)
        for what in ("LDG", "STG")
    }
    found = []
    if stack or spills:
        found.append(f"{stack} bytes of stack, {spills} loads and stores of local memory")
    if registers > limit:
        found.append(f"{registers} registers, {promised.blocks} blocks allow {limit}")
    if promised.loads and not wide["LDG"]:
        found.append("no 16-byte load")
    if promised.stores and not wide["STG"]:
        found.append("no 16-byte store")
    return found


def short(kernel: str) -> str:
    """_ZN..26row_records_kernelINS0_8BFloat16ELi7ELb0EEEv... -> row_records_kernel BFloat16 7 0"""
    match = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EEv)?", kernel)
    assert match is not None, kernel
    parts = re.sub(r"NS\d_\d+|L[ib]", " ", (match[2] or "").replace("E", " ")).split()
    # Two types alike are one letter twice, or a reference to the first.
    names = {"f": "float", "d": "double", "ff": "float", "dd": "double"}
    return " ".join((match[1], *(names.get(x, x) for x in parts if not x.startswith("S"))))


def main() -> int:
    if native.core is None or not native.core.build_info()["cuda"]:
        print("the build has no CUDA kernels: nothing to check")
        return 0
    if disassembler() is None:
        print("nvidia-cuda-cuobjdump has no wheel for this platform: nothing checked")
        return 0
    extension = Path(native.core.__file__)
    usage, code = registers_and_stack(extension), instructions(extension)
    architectures = {architecture for architecture, _ in code}
    assert len(architectures) >= 1, "no machine code found"
    wrong = 0
    for (architecture, kernel), counts in sorted(code.items()):
        registers, stack = usage[architecture, kernel]
        found = faults(kernel, registers, stack, counts)
        wrong += bool(found)
        print(f"{architecture:7} {short(kernel):45} {registers:3} registers  {'; '.join(found)}")
    print(f"{len(code)} kernels for {', '.join(sorted(architectures))}; {wrong} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
