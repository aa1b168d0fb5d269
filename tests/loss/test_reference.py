"""tdpo_ext.reference is what the kernels are compared with: it needs a truth of its own."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from inputs import labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import METHODS, loss_beside_oracle

from tdpo_ext import reference as plain


@pytest.mark.parametrize("vocabulary", [1, 2, 33, 1000])
@pytest.mark.parametrize(("scale", "gap"), [(2.0, 0.01), (1.0, 1.0), (20.0, 20.0)])
def test_statistics_and_their_gradient(vocabulary, scale, gap):
    policy, reference = pair_of_logits(8, vocabulary, scale=scale, gap=gap, dtype=torch.float64)
    labels, upstream = labels_for(policy, 0.2), torch.randn(2, 8, dtype=torch.float64)
    policy.requires_grad_()
    stats = plain.token_stats(policy, reference, labels)
    total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
    (gradient,) = torch.autograd.grad(total, policy)
    inputs = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
    for ours, wanted in zip(stats, oracle.token_stats(*inputs), strict=True):
        assert relative_error(ours, wanted) <= 1e-11
    wanted = oracle.token_stats_gradient(*inputs, *numpy64(upstream))
    assert relative_error(gradient, wanted) <= 1e-12


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_the_loss_and_its_gradient(variant, alpha, smoothing, average):
    policy, reference = pair_of_logits(6, 5, 40, gap=0.5, dtype=torch.float64)
    labels, weights = labels_for(policy, 0.3), torch.randn(3, dtype=torch.float64)
    options = {
        "beta": 0.2,
        "alpha": alpha,
        "variant": variant,
        "label_smoothing": smoothing,
        "average_log_prob": average,
    }
    output, gradient, truth = loss_beside_oracle(
        policy, reference, labels, weights, loss=plain.tdpo_loss, **options
    )
    # kept counts and their quotients are float32 numbers, exact ones
    assert relative_error(output.losses, truth.losses) <= 1e-13
    assert relative_error(gradient, truth.gradient) <= 1e-12


def test_derivatives_are_finite_wherever_the_statistics_are():
    """0 log 0 is 0, and so must be what reaches its logits: not 0 * inf."""
    policy, reference = pair_of_logits(5, 12, dtype=torch.float64)
    labels = torch.zeros(5, dtype=torch.int64)
    policy[0, 3:] = reference[0, 3:] = -math.inf
    reference[1, 3:] = -math.inf
    reference[2, 3:] -= 2000.0
    policy[3, 3:] -= 2000.0
    policy[4], reference[4], labels[4] = math.nan, math.inf, -100
    policy.requires_grad_()
    stats = plain.token_stats(policy, reference, labels)
    assert all(values.isfinite().all() for values in stats)
    total = stats.policy_logps.sum() + 0.3 * stats.forward_kl.sum()
    (gradient,) = torch.autograd.grad(total, policy, create_graph=True)
    assert gradient.isfinite().all()
    assert not gradient[4].any()
    (second,) = torch.autograd.grad(gradient.square().sum(), policy)
    assert second.isfinite().all()
    inputs = (numpy64(policy)[:4], numpy64(reference)[:4], labels[:4].cpu().numpy())
    wanted = oracle.token_stats_gradient(*inputs, np.ones(4), np.full(4, 0.3))
    assert relative_error(gradient[:4], wanted) <= 1e-12


def test_a_policy_that_is_its_reference_has_no_divergence():
    logits, _ = pair_of_logits(4, 300, scale=6.0)
    stats = plain.token_stats(logits, logits.clone(), labels_for(logits))
    assert not stats.forward_kl.any()
