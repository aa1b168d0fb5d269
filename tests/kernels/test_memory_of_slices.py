"""Memory where the logits are slices or 16-bit numbers, which an innocent copy would hide."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, labels_for, pair_of_logits
from processes import measure, needs_core, needs_linux

import tdpo_ext


@needs_linux
@needs_core
def test_a_bfloat16_slice_is_neither_copied_nor_converted():
    """[:, :-1] of bfloat16 logits, through the loss: the process grows by its gradient alone."""
    grown = measure("""
        sequences, tokens, vocabulary = 4, 101, 150000
        def logits():
            return torch.zeros(sequences, tokens, vocabulary, dtype=torch.bfloat16).normal_()
        def step(policy, reference, labels, **options):
            before = peak()
            loss = tdpo_ext.tdpo_loss(policy, reference, shift_labels=labels, **options).loss
            forward = peak() - before
            gradient = torch.autograd.grad(loss, policy)
            return forward, peak() - before
        warm = torch.zeros(4, 9, 4000, dtype=torch.bfloat16)[:, :-1]
        step(warm.clone().requires_grad_(), warm, torch.zeros(4, 8, dtype=torch.long))
        policy, reference = (logits()[:, :-1] for _ in range(2))
        labels = torch.randint(0, vocabulary, policy.shape[:2])
        size = policy.numel() * policy.element_size()
        # The peak never falls, so what must not grow comes before what does.
        forward, inplace = step(policy.requires_grad_(), reference, labels, inplace_backward=True)
        _, ordinary = step(policy, reference, labels)
        print(json.dumps([forward / size, inplace / size, ordinary / size]))
    """)
    assert grown[0] < 0.05
    assert grown[1] < 0.05
    assert 0.9 < grown[2] < 1.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_writes_the_slice_and_nothing_beside_it(backend, dtype):
    whole, reference = pair_of_logits(4, 7, 43, dtype=dtype)
    before = whole.clone()
    policy, labels = whole[:, 1:-1, 3:40], labels_for(whole[:, 1:-1, 3:40], 0.3)
    reference = reference[:, 1:-1, 3:40]
    gradients = []
    for inplace in (False, True):
        policy.requires_grad_()
        stats = tdpo_ext.token_stats(policy, reference, labels, inplace_backward=inplace)
        total = stats.policy_logps.sum() - 0.3 * stats.forward_kl.sum()
        gradients += torch.autograd.grad(total, policy)
        if not inplace:
            assert torch.equal(whole, before)
    assert torch.equal(*gradients)
    policy = policy.detach()
    assert torch.equal(policy, gradients[0])
    policy.copy_(before[:, 1:-1, 3:40])
    assert torch.equal(whole, before)
