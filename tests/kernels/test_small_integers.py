"""Logits for which sums are exact: no implementation, dtype, split or thread shows in log p."""

from __future__ import annotations

import pytest
import torch
from small_integers import Whole, check, logits
from torch import Tensor

import tdpo_ext

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def results(whole: Whole, dtype: torch.dtype, inplace: bool = False) -> dict[str, Tensor]:
    policy = whole.policy.to(dtype).requires_grad_()
    assert torch.equal(policy.double(), whole.policy)
    given = policy * 1 if inplace else policy
    stats = tdpo_ext.token_stats(
        given, whole.reference.to(dtype), whole.labels, inplace_backward=inplace
    )
    g_m, g_k = whole.upstream.to(stats.policy_logps.dtype)
    total = (stats.policy_logps * g_m + stats.forward_kl * g_k).sum()
    (gradient,) = torch.autograd.grad(total, policy)
    return {**stats._asdict(), "gradient": gradient}


def checked(whole: Whole, backend: str, dtype: torch.dtype = torch.float32, inplace: bool = False):
    found = results(whole, dtype, inplace)
    for quantity, value in found.items():
        check(value, getattr(whole, quantity), backend, quantity)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradient_are_the_whole_numbers(backend, dtype):
    for inplace in (False, True):
        checked(logits(9, 65), backend, dtype, inplace)


# Rows over threads, or over one warp, a block of warps, several blocks; and parts of a row.
@pytest.mark.parametrize("shape", [(1, 40000), (3, 40000), (12, 9000), (700, 33)], ids=str)
def test_the_number_of_threads_does_not_show(backend, shape):
    whole = logits(*shape)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(checked(whole, backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][x], other[x]) for x in other)


def test_a_row_has_the_same_bits_in_a_batch_of_any_size(backend):
    """The number of blocks and of their warps follows the number of rows."""
    many = logits(300, 2000)
    first = checked(many, backend)
    for rows in (1, 2, 8, 40):
        few = Whole(*(x[..., :rows] if x is many.upstream else x[:rows] for x in many))
        for quantity, value in checked(few, backend).items():
            assert torch.equal(value, first[quantity][:rows])
