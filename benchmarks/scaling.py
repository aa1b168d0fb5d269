"""What a step of the fused head costs on 1 to 1024 GPUs: computed, not measured.

The head and its loss alone, of one micro-batch: the layers below are whatever they are. The rows go
into docs/scaling.md (docs/fill.py), which says what they assume.
"""

from __future__ import annotations

from typing import Any, NamedTuple

VOCABULARY = 128256
TOKENS = 8192  # kept ones, of policy and of reference, in each tensor-parallel group
UNITS = 5.5  # TDPO2, recomputed: docs/fused-head.md
RECORD = 36  # bytes of a token's record, float32
CHUNK_BYTES = 256 * 2**20

FLOPS = 650e12  # a second, bfloat16
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
    # Gathered heads, the policy's gradient in float32 and in bfloat16, hidden states and their
    # gradients, tiles.
    memory = 2 * weight + (2 + 1) * weight + TOKENS * width * (2 + 2 + 4 + 2) + CHUNK_BYTES
    if sharded:
        memory += 2 * kept_by_fsdp
    return {
        "GPUs": layout.gpus,
        "tensor x data": f"{layout.tensor} x {layout.data}",
        "products, TFLOP": f"{flops / 1e12:.1f}",
        "products, ms": f"{flops / FLOPS * 1e3:.1f}",
        "all_gather of records, MB": f"{records / 1e6:.1f}",
        "all_reduce of dh, MB": f"{hidden / 1e6:.0f}",
        "tensor parallel, ms": f"{(records + hidden) / WITHIN_NODE * 1e3:.1f}",
        "FSDP of both heads, MB": f"{fsdp_bytes / 1e6:.0f}",
        "FSDP, ms": f"{fsdp_bytes / bandwidth * 1e3:.1f}",
        "memory, GiB": f"{memory / 2**30:.1f}",
        "six logits in fp32, GiB": f"{6 * TOKENS * rows * 4 / 2**30:.1f}",
    }


def tables() -> dict[str, list[dict[str, Any]]]:
    return {
        name: [step(layout, width) for layout in LAYOUTS]
        for name, width in (("head_of_8B", 4096), ("head_of_70B", 8192))
    }
