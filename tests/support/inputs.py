"""Logits, labels and the comparison of results with NumPy's."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pair_of_logits(
    *shape: int, scale: float = 2.0, gap: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Reference logits of a standard deviation, and a policy that differs from them by a gap."""
    reference = torch.randn(*shape, dtype=torch.float64) * scale
    policy = reference + torch.randn(*shape, dtype=torch.float64) * gap
    return policy.to(dtype), reference.to(dtype)


def labels_for(logits: Tensor, ignored: float = 0.0) -> Tensor:
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    return labels.masked_fill(torch.rand(labels.shape) < ignored, -100)


def numpy64(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().to(torch.float64).cpu().numpy()


def relative_error(ours: Tensor, truth: NDArray[np.float64]) -> float:
    """||ours - truth|| / ||truth||, and 0 where both are 0."""
    difference = np.linalg.norm(numpy64(ours) - truth)
    return 0.0 if difference == 0 else float(difference / np.linalg.norm(truth))
