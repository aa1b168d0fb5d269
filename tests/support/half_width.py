"""Products as on CUDA: half-width operands, float32 results; with numpy, so that no tensor is made.

The rest of the fused head then goes the way that it goes on a card, on any backend.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdpo_ext.fused_head import products


def _numbers(x: Tensor) -> NDArray[np.generic]:
    """As float32 or float64."""
    if x.dtype == torch.bfloat16:
        bits = x.detach().view(torch.uint16).numpy().astype(np.uint32) << 16
        return bits.view(np.float32)
    numbers = x.detach().numpy()
    return numbers.astype(np.float32) if x.dtype == torch.float16 else numbers


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    assert a.dtype == b.dtype
    assert out.dtype == products.accumulation_dtype(a.dtype)
    out.numpy()[:] = _numbers(a) @ _numbers(b)


def _multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    assert a.dtype == b.dtype
    assert out.dtype == products.accumulation_dtype(a.dtype)
    out.numpy()[:] += _numbers(a) @ _numbers(b)


def take_half_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "takes_half_width", lambda device: True)
    monkeypatch.setattr(products, "multiply", _multiply)
    monkeypatch.setattr(products, "multiply_add", _multiply_add)
