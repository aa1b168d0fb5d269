"""Where the gradient of logits is stored: in a half-width type, or over logits."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import DTYPES, labels_for, pair_of_logits
from torch import Tensor

from tdpo_ext.token_statistics import kernels

HALF = [torch.bfloat16, torch.float16]
# Upstream gradients of log p(y) and of the KL, row by row: each kind of gradient, and gradients
# that float16 rounds to infinity and to 0.
UPSTREAM = torch.tensor(
    [[1.0, 1.0, 1.0, 0.0, 0.0, 0.3, 1e6, 1e-7], [0.5, 0.0, 1.0, 0.0, 1.0, 20.0, 1.0, 1e-7]]
)


def gradient_in(dtype: torch.dtype, entries: int, given: tuple[Tensor, ...]) -> Tensor:
    """Each row starts this many entries after a multiple of 16 bytes."""
    policy, reference, labels, normalizers = given
    rows, vocabulary = policy.shape
    stride = -(-(vocabulary + entries) // 16) * 16
    memory = torch.full((rows * stride + 16,), math.nan, dtype=dtype)
    gradient = memory.as_strided((rows, vocabulary), (stride, 1), entries)
    upstream = UPSTREAM[:, :rows].to(policy.device)
    kernels.write_gradient(gradient, policy, reference, labels, normalizers, *upstream, -100)
    outside = memory.clone()
    outside.as_strided((rows, vocabulary), (stride, 1), entries).fill_(math.nan)
    assert outside.isnan().all(), "written beside the gradient"
    return gradient


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 101, 5000, 20011])
def test_the_gradient_is_rounded_once_and_to_nearest(backend, dtype, vocabulary):
    """Every entry stands by itself: the same as a float32 gradient, rounded by PyTorch."""
    policy, reference = pair_of_logits(8, vocabulary)
    labels = labels_for(policy)
    labels[4] = -100
    policy[5] = reference[5] + 1e-3  # close
    given = policy, reference, labels, kernels.token_stats(policy, reference, labels, -100)[3]
    wanted = gradient_in(torch.float32, 0, given).to(dtype)
    assert not wanted[4].any()
    for entries in range(8):
        assert torch.equal(gradient_in(dtype, entries, given), wanted), entries


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_not_finite_stays_so(backend, dtype):
    policy, reference = pair_of_logits(2, 300)
    labels = labels_for(policy)
    normalizers = kernels.token_stats(policy, reference, labels, -100)[3]
    normalizers[1] = math.nan  # a label outside the vocabulary
    gradient = gradient_in(dtype, 0, (policy, reference, labels, normalizers))
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()


@pytest.mark.parametrize("side", ["policy", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 101, 20011])
def test_the_gradient_may_lie_over_the_logits_of_either_side(backend, dtype, vocabulary, side):
    """With any upstream gradients, bit for bit, wherever the rows of the other side begin."""
    policy, reference = pair_of_logits(8, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    labels[4] = -100
    policy[5] = reference[5]
    normalizers = kernels.token_stats(policy, reference, labels, -100)[3]
    upstream = UPSTREAM.to(normalizers)
    wanted = torch.empty_like(policy)
    kernels.write_gradient(wanted, policy, reference, labels, normalizers, *upstream, -100)
    for entries in range(4):
        memory = torch.zeros(8, vocabulary + entries, dtype=dtype)[:, entries:]
        moved = memory.copy_(reference if side == "policy" else policy)
        given = (policy.clone(), moved) if side == "policy" else (moved, reference.clone())
        over = given[0 if side == "policy" else 1]
        kernels.write_gradient(over, *given, labels, normalizers, *upstream, -100)
        assert torch.equal(over, wanted), entries
