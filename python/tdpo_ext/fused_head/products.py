"""Matrix products whose results have the accumulation type, whatever type the operands have.

Every product of the fused head goes through here. On CUDA half-width operands stay as they are: the
tensor cores accumulate in float32, and ``out_dtype`` keeps that. Elsewhere PyTorch would round such
results to the operands' type, so the operands are cast first, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_WIDTH = (torch.bfloat16, torch.float16)


def takes_half_width(device: torch.device) -> bool:
    """Whether products of half-width operands can have float32 results."""
    # Since PyTorch 2.8.
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """The type in which a tensor enters a product."""
    return x.dtype if takes_half_width(x.device) else accumulation_dtype(x.dtype)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, with operands of one ``operand_dtype``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
