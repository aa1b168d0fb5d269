"""Matrix products whose results have the accumulation type: float32, or float64 for float64.

Every product of the fused head is made here. On CUDA half-width operands are not cast: the tensor
cores sum in float32, and ``out_dtype`` returns that sum. Elsewhere PyTorch would round the results
to the operands' type, so the operands are cast first, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_WIDTH = (torch.bfloat16, torch.float16)


def takes_half_width(device: torch.device) -> bool:
    """Whether products of half-width operands can have float32 results: on CUDA, from torch 2.8."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """The type in which a tensor enters a product."""
    return x.dtype if takes_half_width(x.device) else accumulation_dtype(x.dtype)


def scale_into_range(sizes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of 2 for numbers up to some sizes that are about to be rounded to float16.

    Times it they use the top of float16's range. The gradients of a large vocabulary's logits would
    else lie where float16 has few digits or none, below 6e-5. None: the type has float32's range.
    Sizes that are not finite, of tokens whose gradient has no finite value, do not count.
    """
    if dtype != torch.float16 or sizes.numel() == 0:
        return None
    largest = sizes.nan_to_num(0, posinf=0).amax()
    exponent = torch.frexp(largest).exponent  # the largest size is below 2^exponent
    return torch.ldexp(sizes.new_ones(()), (15 - exponent).clamp(-100, 100))


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b; both operands have one ``operand_dtype``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b; both operands have one ``operand_dtype``."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
