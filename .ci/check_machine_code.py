"""Check the machine code of the CUDA kernels in the built extension, for every architecture.

    python .ci/check_machine_code.py [FILE]    (another object file or cubin than the extension)

It needs no card: NVIDIA's disassembler is on PyPI. For each kernel it checks:

- Registers: few enough for as many blocks on a multiprocessor as the sources promise.
- Access: 16-byte loads (and stores) of global memory where the kernel streams.
- Hot loop, the shortest loop around such loads: no registers spilled to memory in it (a few spills
  outside cost nothing), and no more instructions for each entry of a row than the sources promise.
  While a card loads a pair of bfloat16 logits it has time for 31.
- Backward has such a loop for each kind of gradient; each loads several vectors before it uses one.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tdpo_ext.token_statistics import native

REGISTERS_OF_A_PARTITION = 16384  # a multiprocessor has four, each with a quarter of the warps
MOST_STACK = 64  # bytes of registers spilled outside hot loops
SIXTEENS = {"BFloat16": 8, "Float16": 8, "If": 4, "Id": 2}  # entries in 16 bytes


class Expected(NamedTuple):
    blocks: int  # on one multiprocessor, as __launch_bounds__ says
    loads: bool  # 16 bytes at a time
    stores: bool
    per_entry: float | None = None  # instructions in the hot loop, at most


# The most instructions for each entry in the loops of backward: PolicyOnly, ReferenceOnly, Direct,
# Mixed; with divergences PolicyTerms, ReverseTerms, MixedTerms. Keys: half-width or float32 logits,
# and whether rows are shifted.
BACKWARD = {
    ("half", False): (7, 7, 13, 30),
    ("half", True): (10, 10, 18, 35),
    ("float", False): (14, 14, 28, 45),
    ("float", True): (19, 19, 39, 57),
}
BACKWARD_WITH_DIVERGENCES = {
    ("half", False): (11, 15, 31),
    ("half", True): (14, 21, 38),
    ("float", False): (18, 22, 47),
    ("float", True): (24, 33, 58),
}
LOADS_AHEAD = 4


class Instruction(NamedTuple):
    address: int
    name: str
    text: str


class Loop(NamedTuple):
    instructions: int
    spills: int
    loads: int  # of 16 bytes
    stores: int
    ahead: int  # loads before the first exponential


class Flags(NamedTuple):
    shifted: bool
    divergences: bool


def flags(kernel: str) -> Flags:
    """The last template parameters of a kernel that streams, kShifted and kDivergences."""
    return Flags(*(x == "1" for x in re.findall(r"Lb([01])E", kernel)))


def expected(kernel: str) -> Expected:
    """What the sources promise of a kernel, by its mangled name."""
    double = "kernelId" in kernel
    if "row_records_kernel" in kernel:
        shifted, divergences = flags(kernel)
        several = shifted + divergences
        blocks = 1 if double else 2 if "Li1E" in kernel or several == 2 else 3 if several else 5
        float32 = "If" in kernel
        room = 2 if float32 else 0  # float32 moves twice the bytes
        if divergences:
            room += 8 if float32 else 7
        per_entry = None if double else (27 if shifted else 24.5) + room
        return Expected(blocks, loads=True, stores=False, per_entry=per_entry)
    if "token_stats_backward_kernel" in kernel:
        narrow = "kernelIfN" in kernel  # float32 logits, half-width gradient: 8 bytes at a time
        blocks = 2 if double else 3 if flags(kernel).divergences else 4
        return Expected(blocks, loads=True, stores=not narrow)
    # Kernels over few numbers of each row or pair, and the one that tests whether a build runs.
    small = ("finish_", "merge_tile_kernel", "sequence_sums_kernel", "pairs_kernel", "probe_kernel")
    if any(name in kernel for name in small):
        return Expected(1, loads=False, stores=False)
    raise SystemExit(f"{kernel}: unknown to expected(); add there what it promises")


def disassembler() -> Path | None:
    """The folder of cuobjdump and nvdisasm from PyPI; None if they are not installed."""
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


def instructions(extension: Path) -> dict[tuple[str, str], list[Instruction]]:
    """(architecture, kernel) -> its instructions."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    architecture, code = "", list[Instruction]()
    line_of_code = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
    for line in dump("--dump-sass", extension).splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", line.strip()):
            code = found.setdefault((architecture, match[1]), [])
        elif match := line_of_code.match(line.strip()):
            code.append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def is_spill(one: Instruction) -> bool:
    return one.name.startswith(("STL", "LDL"))


def wide(code: list[Instruction], what: str) -> int:
    return sum(one.name.startswith(what) and ".128" in one.name for one in code)


def loops(code: list[Instruction]) -> list[Loop]:
    """The loops around 16-byte loads, the shortest first. A loop ends in a branch to its start."""
    found = []
    for place, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.text) if one.name == "BRA" else None
        if target and int(target[1], 16) < one.address:
            body = [x for x in code[: place + 1] if x.address >= int(target[1], 16)]
            if loads := wide(body, "LDG"):
                first = next((i for i, x in enumerate(body) if x.name == "MUFU.EX2"), 0)
                ahead = wide(body[:first], "LDG")
                spills = sum(map(is_spill, body))
                found.append(Loop(len(body), spills, loads, wide(body, "STG"), ahead))
    return sorted(found)


def hot_loop(code: list[Instruction]) -> Loop | None:
    return next(iter(loops(code)), None)


def per_entry(kernel: str, loop: Loop) -> float:
    """The instructions of a loop for each entry of a row.

    For each vector of entries forward loads one vector of both sides (three in all where rows are
    shifted); backward stores one.
    """
    vectors = loop.stores or loop.loads // (3 if flags(kernel).shifted else 2)
    entries = next(n for name, n in SIXTEENS.items() if name in kernel)
    return loop.instructions / (vectors * entries)


def streams(code: list[Instruction]) -> list[Loop]:
    """The loops of backward that take several vectors at a time."""
    return [loop for loop in loops(code) if loop.stores > 1]


def faults_of_backward(kernel: str, found: list[Loop]) -> list[str]:
    shifted, divergences = flags(kernel)
    table = BACKWARD_WITH_DIVERGENCES if divergences else BACKWARD
    promised = table["float" if "If" in kernel else "half", shifted]
    if len(found) != len(promised):
        return [f"{len(found)} loops, one for each of {len(promised)} kinds of gradient promised"]
    counts = sorted(per_entry(kernel, loop) for loop in found)
    wrong = [f"{x:.1f} > {y}" for x, y in zip(counts, promised, strict=True) if x > y]
    texts = [f"instructions an entry: {', '.join(wrong)}"] if wrong else []
    few = min(loop.ahead for loop in found)
    return texts + ([f"only {few} loads before the first use"] if few < LOADS_AHEAD else [])


def faults(
    kernel: str, registers: int, stack: int, code: list[Instruction], loop: Loop | None
) -> list[str]:
    promised = expected(kernel)
    warps = -(-promised.blocks * native.core.CUDA_BLOCK_WARPS // 4)
    limit = min(255, REGISTERS_OF_A_PARTITION // (warps * 32) // 8 * 8)
    found = []
    if stack > (MOST_STACK if promised.loads else 0):
        found.append(f"{stack} bytes of stack, {sum(map(is_spill, code))} uses of local memory")
    if loop and loop.spills:
        found.append(f"{loop.spills} uses of local memory in the hot loop")
    if registers > limit:
        found.append(f"{registers} registers, {promised.blocks} blocks allow {limit}")
    if promised.loads and not wide(code, "LDG"):
        found.append("no 16-byte load")
    if promised.stores and not wide(code, "STG"):
        found.append("no 16-byte store")
    if promised.stores and "Id" not in kernel:
        found += faults_of_backward(kernel, streams(code))
    if promised.per_entry:
        count = per_entry(kernel, loop) if loop else math.inf
        if not count <= promised.per_entry:
            found.append(f"{count:.1f} instructions an entry, promised {promised.per_entry}")
    return found


def short(kernel: str) -> str:
    """_ZN..26row_records_kernelINS_8BFloat16ELi7ELb0EEEv... -> row_records_kernel BFloat16 7 0"""
    match = re.search(r"\d([a-z_]+_kernel)(?:I(.*?)EEv)?", kernel)
    assert match is not None, kernel
    parts = re.sub(r"NS\d?_\d+|L[ib]", " ", (match[2] or "").replace("E", " ")).split()
    # Two equal types are mangled as one letter twice, or as a reference to the first.
    names = {"f": "float", "d": "double", "ff": "float", "dd": "double"}
    return " ".join((match[1], *(names.get(x, x) for x in parts if not x.startswith("S"))))


def main() -> int:
    if native.core is None or (len(sys.argv) < 2 and not native.core.build_info()["cuda"]):
        print("the extension is not built, or it has no CUDA kernels: nothing to check")
        return 0
    if disassembler() is None:
        print("nvidia-cuda-cuobjdump has no wheel for this platform: nothing checked")
        return 0
    extension = Path(sys.argv[1] if len(sys.argv) > 1 else native.core.__file__)
    usage, code = registers_and_stack(extension), instructions(extension)
    architectures = {architecture for architecture, _ in code}
    assert len(architectures) >= 1, "no machine code found"
    wrong = 0
    for (architecture, kernel), body in sorted(code.items()):
        registers, stack = usage[architecture, kernel]
        promised = expected(kernel)
        loop = hot_loop(body) if promised.loads else None
        found = faults(kernel, registers, stack, body, loop)
        wrong += bool(found)
        counted = ""
        if loop and promised.per_entry:
            counted = f"{per_entry(kernel, loop):.1f} instructions an entry"
        elif promised.stores:
            kinds = sorted(per_entry(kernel, x) for x in streams(body))
            ahead = min((x.ahead for x in streams(body)), default=0)
            counted = f"{', '.join(f'{x:.1f}' for x in kinds)}; {ahead} loads ahead"
        print(
            f"{architecture:7} {short(kernel):45} {registers:3} registers {stack:3} of stack  "
            f"{counted:40} {'; '.join(found)}"
        )
    print(f"{len(code)} kernels for {', '.join(sorted(architectures))}; {wrong} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
