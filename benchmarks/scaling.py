"""The cost of a step of the fused head on 1 to 1024 GPUs, computed from products measured on one.

It is the cost of head and loss alone, for one micro-batch, without the layers below. docs/fill.py
puts the tables into docs/scaling.md, which says what they assume. One more table there compares
what is computed for one GPU with what benchmarks/fused_head.py has measured on it (results/).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import render_gpu

from tdpo_ext.fused_head.problem import MOST_CHUNK_BYTES_ON_CUDA
from tdpo_ext.fused_head.tiles import MOST_COLUMNS_ON_CUDA

VOCABULARY = 128256
TOKENS = 8192  # tokens that are not ignored, in each tensor-parallel group
RECORD = 36  # bytes of a token's record, float32
CHUNK_BYTES = MOST_CHUNK_BYTES_ON_CUDA  # the default from 64 GiB of memory on

WITHIN_NODE = 400e9  # bytes a second that one GPU receives from the 7 others of its node
BETWEEN_NODES = 45e9  # and from other nodes, each GPU through a network card of its own


class Path(NamedTuple):
    """A path to the gradients of TDPO2 (docs/fused-head.md)."""

    name: str  # in the reports of benchmarks/fused_head.py
    units: float


WHOLE_PAIRS = Path("tdpo_ext", 4)  # if chunk_bytes holds the logits of a pair, as CHUNK_BYTES does
RECOMPUTED = Path("tdpo_ext, recomputed", 5.5)  # if it does not, or the vocabulary is sharded
FROZEN = Path("tdpo_ext, frozen head", 3)
NAMES = {WHOLE_PAIRS: "whole pairs", RECOMPUTED: "recomputed", FROZEN: "frozen head"}


class Layout(NamedTuple):
    gpus: int
    tensor: int  # processes that share the vocabulary, all within one node
    data: int  # groups with tokens of their own; FSDP shards each process's weights over them

    @property
    def path(self) -> Path:
        return RECOMPUTED if self.tensor > 1 else WHOLE_PAIRS


LAYOUTS = [
    Layout(1, 1, 1),
    Layout(8, 1, 8),
    Layout(8, 8, 1),
    Layout(64, 1, 64),
    Layout(64, 8, 8),
    Layout(1024, 1, 1024),
    Layout(1024, 8, 128),
]


def measured_row(shape: list[int]) -> render_gpu.Report:
    """What benchmarks/fused_head.py has measured at a shape, no token ignored."""
    rows = render_gpu.load(render_gpu.FUSED)["measurements"]
    [row] = [row for row in rows if row["shape"] == shape and row["ignored"] == 0]
    return row


def products_per_second() -> float:
    """Floating-point operations per second of the bare products of whole pairs, H = 4096."""
    shape = [8, 1024, 4096, VOCABULARY]
    units = render_gpu.load(render_gpu.FUSED)["ways"][WHOLE_PAIRS.name]
    taken = render_gpu.bare_products(measured_row(shape), units) / 1e3
    return sum(units) * 2 * TOKENS * 4096 * VOCABULARY / taken


def memory_of(weight: float, width: int, scratch: float, frozen: bool = False) -> float:
    """Bytes of the gathered heads, of the policy's gradient in float32 and in bfloat16, of hidden
    states and their gradients, and of scratch memory."""
    gradient = 0 if frozen else (2 + 1) * weight
    return 2 * weight + gradient + TOKENS * width * (2 + 2 + 4 + 2) + scratch


def scratch_of(path: Path, rows: int) -> int:
    """Bytes of scratch memory, at most, with so many rows of the weight on each GPU."""
    if path is RECOMPUTED:  # two float32 tiles, and the gradient of one in bfloat16
        return min(CHUNK_BYTES, TOKENS * min(MOST_COLUMNS_ON_CUDA, rows) * (4 + 4 + 2))
    return CHUNK_BYTES


def step(layout: Layout, width: int) -> dict[str, Any]:
    """One micro-batch of a head ``[VOCABULARY, width]`` in bfloat16, on each GPU."""
    rows = VOCABULARY // layout.tensor
    weight = rows * width * 2  # bytes of the policy's, and as many of the reference's
    kept_by_fsdp = weight / layout.data
    sharded = layout.data > 1
    flops = layout.path.units * 2 * TOKENS * rows * width
    # FSDP gathers the policy's weight for forward and again for backward, and the reference's once,
    # and it scatters the gradient.
    fsdp_bytes = (3 + 1) * weight * (layout.data - 1) / layout.data
    records = TOKENS * RECORD * (layout.tensor - 1)
    hidden = 2 * TOKENS * width * 4 * (layout.tensor - 1) / layout.tensor
    # Bytes that all GPUs of a node need are sent to the node once, over all of its network cards.
    shared = min(8, layout.gpus) // layout.tensor
    between = min(WITHIN_NODE, BETWEEN_NODES * shared)
    bandwidth = WITHIN_NODE if layout.gpus <= 8 else between
    memory = memory_of(weight, width, scratch_of(layout.path, rows))
    if sharded:
        memory += 2 * kept_by_fsdp
    return {
        "GPUs": layout.gpus,
        "tensor x data": f"{layout.tensor} x {layout.data}",
        "units": f"{layout.path.units:g}",
        "products, TFLOP": f"{flops / 1e12:.1f}",
        "products, ms": f"{flops / products_per_second() * 1e3:.1f}",
        "all_gather of records, MB": f"{records / 1e6:.1f}",
        "all_reduce of dh, MB": f"{hidden / 1e6:.0f}",
        "tensor parallel, ms": f"{(records + hidden) / WITHIN_NODE * 1e3:.1f}",
        "FSDP of both heads, MB": f"{fsdp_bytes / 1e6:.0f}",
        "FSDP, ms": f"{fsdp_bytes / bandwidth * 1e3:.1f}",
        "memory, GiB": f"{memory / 2**30:.1f}",
        "six logits in fp32, GiB": f"{6 * TOKENS * rows * 4 / 2**30:.1f}",
    }


def against_measured() -> list[dict[str, Any]]:
    """Each shape that was measured on one GPU, no token ignored, by each path."""
    report = render_gpu.load(render_gpu.FUSED)
    shapes = [row["shape"] for row in report["measurements"] if row["ignored"] == 0]
    return [
        line(shape, path, report["ways"][path.name])
        for shape in shapes
        for path in (WHOLE_PAIRS, RECOMPUTED, FROZEN)
    ]


def line(shape: list[int], path: Path, units: list[float]) -> dict[str, Any]:
    row = measured_row(shape)
    sequences, tokens, width, vocabulary = shape
    weight, hidden = 2 * vocabulary * width, 2 * sequences * tokens * width
    flops = sum(units) * 2 * sequences * tokens * width * vocabulary
    batch = 2 * weight + 2 * hidden + 8 * sequences * tokens  # labels are 64-bit
    products, taken = render_gpu.bare_products(row, units), row["milliseconds"][path.name]
    scratch = scratch_of(path, vocabulary)
    computed = memory_of(weight, width, scratch, frozen=path is FROZEN)
    return {
        "H, V": f"{width}, {vocabulary}",
        "path": f"{NAMES[path]}, {sum(units):g} units",
        "products computed, ms": f"{flops / products_per_second() * 1e3:.1f}",
        "products measured, ms": f"{products:.1f}",
        "step measured, ms": f"{taken:.1f}",
        "step / products": f"{taken / products:.2f}",
        "memory computed, GiB": f"{computed / 2**30:.1f}",
        "memory measured, GiB": f"{(batch + row['extra_bytes'][path.name]) / 2**30:.1f}",
    }


def tables() -> dict[str, list[dict[str, Any]]]:
    return {
        **{
            name: [step(layout, width) for layout in LAYOUTS]
            for name, width in (("head_of_8B", 4096), ("head_of_70B", 8192))
        },
        "head_on_one_gpu": against_measured(),
    }


def assumed() -> str:
    report = render_gpu.load(render_gpu.FUSED)
    return (
        f"By [benchmarks/scaling.py](../benchmarks/scaling.py), for each GPU. Measured: products "
        f"at {products_per_second() / 1e12:.0f} TFLOP/s, the rate of those of H = 4096 alone on "
        f"one GPU ({render_gpu.made_on(report)}), which is taken for H = 8192 as well. Assumed: "
        f"{WITHIN_NODE / 1e9:.0f} GB/s into one GPU within a node of 8; "
        f"{BETWEEN_NODES / 1e9:.0f} GB/s between nodes for each GPU, where a byte that several "
        "GPUs of a node need is sent once; no overlap, though FSDP's traffic overlaps with the "
        "layers. Units are [matrix products of the head's size](fused-head.md#forward): "
        f"{WHOLE_PAIRS.units:g} where `chunk_bytes` holds whole pairs, as its "
        f"default of {CHUNK_BYTES // 2**30} GiB (from 64 GiB of memory on) does here; "
        f"{RECOMPUTED.units:g} where the vocabulary is sharded, since backward then makes logits "
        "once more. A step takes longer than its products: by how much is measured below. Memory: "
        "the gathered heads, the float32 gradient of the policy's, hidden states and their "
        f"gradients, scratch memory of at most {CHUNK_BYTES // 2**30} GiB, FSDP's own parts. The "
        "last column is what the paper's script allocates instead of the scratch memory."
    )


def read_across() -> str:
    rows = {row["tensor x data"]: row for row in tables()["head_of_8B"]}

    def ratio(layout: str, above: str, below: str) -> float:
        return float(rows[layout][above]) / float(rows[layout][below])

    exchange = ratio("8 x 1", "tensor parallel, ms", "products, ms")
    records = ratio("8 x 1", "all_gather of records, MB", "all_reduce of dh, MB")
    alone = ratio("1 x 64", "FSDP, ms", "products, ms")
    shared = ratio("8 x 8", "FSDP, ms", "products, ms")
    return (
        "Read across, at H = 4096: within a tensor-parallel group the exchange takes "
        f"{exchange:.0%} of the products' time, and the records {records:.0%} of the exchange. "
        f"Across nodes FSDP moves two heads in {alone:.0%} of the time that a step multiplies if "
        f"it alone shards them; with the vocabulary shared within a node the same traffic takes "
        f"{shared:.1f} times as long as the products, so there it has to overlap. A frozen head "
        f"(LoRA) takes {FROZEN.units:g} units instead of {WHOLE_PAIRS.units:g} "
        f"({RECOMPUTED.units - 1:g} instead of {RECOMPUTED.units:g} where the vocabulary is "
        "sharded), and its weight has no gradient to store or reduce. From 64 to 1024 GPUs nothing "
        "changes per GPU but the share of the weights that FSDP leaves on it."
    )


def texts() -> dict[str, str]:
    return {"scaling_assumed": assumed(), "scaling_read_across": read_across()}
