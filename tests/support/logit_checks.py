"""Statistics, loss and gradient of logits, against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import torch
from inputs import numpy64, relative_error

import tdpo_ext

STATISTICS = {torch.float64: 1e-12}  # 1e-6 for the others, which all accumulate in float32
# Gradients are stored rounded: half a unit in the last place of the dtype.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL_STEP = {torch.bfloat16: 0.0, torch.float16: 2.0**-25}


def stats_and_gradient(policy, reference, labels, grad_logps, grad_kl):
    policy = policy.detach().requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels)
    total = (stats.policy_logps * grad_logps + stats.forward_kl * grad_kl).sum()
    (gradient,) = torch.autograd.grad(total, policy)
    return stats, gradient


def check_against_oracle(policy, reference, labels, kl_tolerance=1e-6, of_log_sums=0.0):
    """``of_log_sums``: what rounding alone makes of lse(z) and of lse(r), in nats."""
    dtype, accumulation = policy.dtype, torch.float32
    if dtype == torch.float64:
        accumulation = torch.float64
    grad_logps, grad_kl = torch.randn(2, *labels.shape, dtype=accumulation)
    grad_kl[0] = 0  # the rows that skip the reference, the policy, and both
    grad_kl[1] = grad_logps[1]
    grad_logps[2] = grad_kl[2] = 0
    stats, gradient = stats_and_gradient(policy, reference, labels, grad_logps, grad_kl)
    arguments = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
    truth = oracle.token_stats(*arguments)
    # An error of a log-sum-exp is one of log p(y), and the relative one of p; the KL has both.
    bound = STATISTICS.get(dtype, 1e-6) + 2 * of_log_sums
    assert relative_error(stats.policy_logps, truth[0]) <= bound
    assert relative_error(stats.reference_logps, truth[1]) <= bound
    assert relative_error(stats.forward_kl, truth[2]) <= max(bound, kl_tolerance)
    assert all(values.dtype == accumulation for values in stats)
    assert stats.policy_logps.max() <= 0
    assert stats.reference_logps.max() <= 0
    assert stats.forward_kl.min() >= 0

    wanted = oracle.token_stats_gradient(*arguments, numpy64(grad_logps), numpy64(grad_kl))
    assert gradient.dtype == dtype
    if dtype in ROUNDING:
        rounding = np.abs(wanted) * ROUNDING[dtype] * 1.001 + SUBNORMAL_STEP[dtype]
        # 1e-14: where a token is certain for both, the oracle's own 1 - p(y) has no more digits.
        allowed = rounding + 1e-6 * np.linalg.norm(wanted, axis=-1, keepdims=True) + 1e-14
        assert np.all(np.abs(numpy64(gradient) - wanted) <= allowed)
    else:
        assert relative_error(gradient, wanted) <= bound


METHODS = [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 0.0)]


def loss_and_gradient(policy, reference, *labels, loss=tdpo_ext.tdpo_loss, weights=None, **options):
    policy = policy.detach().requires_grad_()
    output = loss(policy, reference, *labels, **options)
    scalar = output.loss if weights is None else (output.loss * weights).sum()
    (gradient,) = torch.autograd.grad(scalar, policy)
    return output, gradient


def loss_beside_oracle(
    policy, reference, shift_labels, weights, *, loss=tdpo_ext.tdpo_loss, **options
):
    """The losses of pairs, the gradient of their weighted sum, and what the oracle has for both."""
    output, gradient = loss_and_gradient(
        policy,
        reference,
        shift_labels=shift_labels,
        loss=loss,
        reduction="none",
        weights=weights,
        **options,
    )
    arrays = numpy64(policy), numpy64(reference), shift_labels.cpu().numpy()
    return output, gradient, oracle.tdpo_loss(*arrays, weights=numpy64(weights), **options)
