"""What a step of the fused head costs on 1 to 1024 GPUs: computed from products measured on one.

The head and its loss alone, of one micro-batch: the layers below are whatever they are. The rows go
into docs/scaling.md (docs/fill.py), which says what they assume, and so do those that hold what was
computed to what one GPU has measured (results/, benchmarks/fused_head.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import render_gpu

VOCABULARY = 128256
TOKENS = 8192  # kept ones, of policy and of reference, in each tensor-parallel group
WAY, UNITS = "tdpo_ext, recomputed", 5.5  # of TDPO2: docs/fused-head.md
FROZEN = "tdpo_ext, frozen head"
RECORD = 36  # bytes of a token's record, float32
CHUNK_BYTES = 256 * 2**20

WITHIN_NODE = 400e9  # bytes a second that one GPU receives from the 7 others of its node
BETWEEN_NODES = 45e9  # and from other nodes, each GPU through a network card of its own


class Layout(NamedTuple):
    gpus: int
    tensor: int  # processes that share the vocabulary, all of one node
    data: int  # groups with tokens of their own, over which FSDP shards what each process has


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
    """A row of benchmarks/fused_head.py, all tokens kept."""
    rows = render_gpu.load(render_gpu.FUSED)["measurements"]
    [row] = [row for row in rows if row["shape"] == shape and row["ignored"] == 0]
    return row


def products_per_second() -> float:
    """Floating-point operations, bfloat16, of the products alone at H = 4096."""
    shape = [8, 1024, 4096, VOCABULARY]
    ways = render_gpu.load(render_gpu.FUSED)["ways"]
    taken = render_gpu.bare_products(measured_row(shape), ways[WAY]) / 1e3
    return UNITS * 2 * TOKENS * 4096 * VOCABULARY / taken


def memory_of(weight: float, width: int, frozen: bool = False) -> float:
    """Bytes: gathered heads, the policy's gradient in float32 and in bfloat16, hidden states and
    their gradients, tiles."""
    gradient = 0 if frozen else (2 + 1) * weight
    return 2 * weight + gradient + TOKENS * width * (2 + 2 + 4 + 2) + CHUNK_BYTES


def step(layout: Layout, width: int) -> dict[str, Any]:
    """One micro-batch of a head ``[VOCABULARY, width]`` in bfloat16, on each GPU."""
    rows = VOCABULARY // layout.tensor
    weight = rows * width * 2  # of policy, and the same of reference
    kept_by_fsdp = weight / layout.data
    sharded = layout.data > 1
    flops = UNITS * 2 * TOKENS * rows * width
    # The policy's gathered for forward and again for backward, the reference's once; the gradient.
    fsdp_bytes = (3 + 1) * weight * (layout.data - 1) / layout.data
    records = TOKENS * RECORD * (layout.tensor - 1)
    hidden = 2 * TOKENS * width * 4 * (layout.tensor - 1) / layout.tensor
    # What the GPUs of a node have in common comes into it once, through all of their cards.
    shared = min(8, layout.gpus) // layout.tensor
    between = min(WITHIN_NODE, BETWEEN_NODES * shared)
    bandwidth = WITHIN_NODE if layout.gpus <= 8 else between
    memory = memory_of(weight, width)
    if sharded:
        memory += 2 * kept_by_fsdp
    return {
        "GPUs": layout.gpus,
        "tensor x data": f"{layout.tensor} x {layout.data}",
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
    """One GPU: each shape that was measured, all tokens kept, full and with a frozen head."""
    report = render_gpu.load(render_gpu.FUSED)
    shapes = [row["shape"] for row in report["measurements"] if row["ignored"] == 0]
    return [line(shape, way, report["ways"][way]) for shape in shapes for way in (WAY, FROZEN)]


def line(shape: list[int], way: str, units: list[float]) -> dict[str, Any]:
    row = measured_row(shape)
    sequences, tokens, width, vocabulary = shape
    weight, hidden = 2 * vocabulary * width, 2 * sequences * tokens * width
    flops = sum(units) * 2 * sequences * tokens * width * vocabulary
    batch = 2 * weight + 2 * hidden + 8 * sequences * tokens  # labels are 64-bit
    products, taken = render_gpu.bare_products(row, units), row["milliseconds"][way]
    computed = memory_of(weight, width, frozen=way == FROZEN)
    return {
        "H, V": f"{width}, {vocabulary}",
        "path": f"{'frozen head' if way == FROZEN else 'full'}, {sum(units):g} units",
        "products computed, ms": f"{flops / products_per_second() * 1e3:.1f}",
        "products measured, ms": f"{products:.1f}",
        "step measured, ms": f"{taken:.1f}",
        "step / products": f"{taken / products:.2f}",
        "memory computed, GiB": f"{computed / 2**30:.1f}",
        "memory measured, GiB": f"{(batch + row['extra_bytes'][way]) / 2**30:.1f}",
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
        f"{BETWEEN_NODES / 1e9:.0f} GB/s between nodes for each GPU, of which each byte that a "
        "node's GPUs have in common is sent once; nothing overlapped, though FSDP's traffic "
        "overlaps with the layers and the records are there before the next product would start. "
        "A step takes longer than its products: by how much is measured below. Memory: the "
        "gathered heads, the float32 gradient of the policy's, hidden states and their gradients, "
        f"{CHUNK_BYTES // 2**20} MiB of tiles, FSDP's own parts. The last column is what the "
        "paper's script has alive instead of the tiles."
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
        "(LoRA) takes 3 units instead of 5.5 (4.5 where the vocabulary is sharded, which "
        "recomputes), no float32 gradient, and no reduction of it. From 64 to 1024 GPUs nothing "
        "per GPU changes but FSDP's share that stays."
    )


def texts() -> dict[str, str]:
    return {"scaling_assumed": assumed(), "scaling_read_across": read_across()}
