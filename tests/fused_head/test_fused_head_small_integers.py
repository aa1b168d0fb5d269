"""Operands for which products and sums are exact: no tile, thread or implementation shows."""

from __future__ import annotations

import pytest
import torch
from small_integers import Heads, check, heads

import tdpo_ext


def assert_exact(case: Heads, backend: str, dtype: torch.dtype, **options) -> None:
    operands = [x.to(dtype) for x in case[:4]]
    leaves = [x.requires_grad_() for x in operands[:2]]
    stats = tdpo_ext.linear_token_stats(*operands, case.whole.labels, **options)
    for quantity, value in stats._asdict().items():
        check(value, getattr(case.whole, quantity), backend, quantity)
    g_m, g_k = case.whole.upstream.to(stats.policy_logps.dtype)
    total = (stats.policy_logps * g_m + stats.forward_kl * g_k).sum()
    of_hidden, of_weight = torch.autograd.grad(total, leaves)
    check(of_hidden, case.hidden_gradient, backend, "gradient of hidden states")
    check(of_weight, case.weight_gradient, backend, "gradient of the weight")


# From a few entries of a few rows to everything at once.
CHUNKS = [1, 2**12, 3 * 2**12, 2**16, 2**28]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tiles_of_any_size_give_the_same_bits(backend, dtype):
    case = heads(rows=21, width=12, vocabulary=150)
    for chunk_bytes in CHUNKS:
        assert_exact(case, backend, dtype, chunk_bytes=chunk_bytes)


def test_any_number_of_threads_gives_the_same_bits(backend):
    case = heads(rows=40, width=12, vocabulary=300)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_exact(case, backend, torch.float32, chunk_bytes=2**14)
    finally:
        torch.set_num_threads(before)
