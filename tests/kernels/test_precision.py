"""The digits that are promised, where they are hardest to keep; the truth is the float64 oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from inputs import labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import ROUNDING, SUBNORMAL_STEP, stats_and_gradient
from torch import Tensor

import tdpo_ext

BOUND = {torch.float32: 1e-6, torch.float64: 1e-13}


def truth_and_gradient(
    policy: Tensor, reference: Tensor, labels: Tensor, grad_logps: Tensor, grad_kl: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    inputs = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
    upstream = (numpy64(grad_logps), numpy64(grad_kl))
    return oracle.token_stats(*inputs), oracle.token_stats_gradient(*inputs, *upstream)


# One below, at and above a vector and a block of every instruction set.
@pytest.mark.parametrize("vocabulary", [2, 3, 15, 16, 17, 31, 33, 64, 100, 2047, 2049, 32003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_policies_close_to_their_reference(backend, dtype, vocabulary):
    for gap in (1e-4, 1e-3, 1e-2):
        policy, reference = pair_of_logits(6, vocabulary, gap=gap, dtype=dtype)
        labels, upstream = labels_for(policy), torch.randn(2, 6, dtype=dtype)
        stats, gradient = stats_and_gradient(policy, reference, labels, *upstream)
        truth, wanted = truth_and_gradient(policy, reference, labels, *upstream)
        assert relative_error(gradient, wanted) <= BOUND[dtype]
        assert relative_error(stats.policy_logps, truth[0]) <= BOUND[dtype]
        assert stats.forward_kl.min() >= 0
        # Row by row: a norm over rows would let the large divergences hide the small ones.
        promised = truth[2] >= 1e-6
        error = np.abs(numpy64(stats.forward_kl) - truth[2])[promised]
        # float64: log p - log q is only known to 1e-16 of the logits, whatever the formula.
        bound = 1e-3 if dtype == torch.float32 else 1e-11
        assert np.all(error <= bound * truth[2][promised])


@pytest.mark.parametrize(("scale", "gap"), [(1.0, 1.0), (5.0, 5.0), (20.0, 20.0)])
def test_divergences_over_a_large_vocabulary(backend, scale, gap):
    policy, reference = pair_of_logits(8, 32003, scale=scale, gap=gap)
    labels = labels_for(policy)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    for ours, wanted in zip(stats, truth, strict=True):
        assert relative_error(ours, wanted) <= 1e-6


def kl_beside(
    grad_logps: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, np.ndarray, Tensor]:
    """The gradient of KL + grad_logps log p(y), as a KL penalty has it; its truth; the labels."""
    policy, reference = pair_of_logits(4, 128256, scale=1.0, dtype=dtype)
    labels, upstream = labels_for(policy), (torch.full((4,), grad_logps), torch.ones(4))
    _, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    return gradient, truth_and_gradient(policy, reference, labels, *upstream)[1], labels


@pytest.mark.parametrize("grad_logps", [0.0, 1e-4])
def test_the_gradient_of_the_kl_with_little_or_no_margin(backend, grad_logps):
    gradient, wanted, _ = kl_beside(grad_logps)
    assert relative_error(gradient, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_stored_gradient_of_the_kl_alone_is_only_rounded(backend, dtype):
    gradient, wanted, _ = kl_beside(0.0, dtype)
    allowed = np.abs(wanted) * ROUNDING[dtype] * 1.001 + SUBNORMAL_STEP[dtype]
    # 1e-9: what float32 leaves at the largest entries of a row, before they are stored.
    assert np.all(np.abs(numpy64(gradient) - wanted) <= allowed + 1e-9)


@pytest.mark.parametrize("shift", [3000.0, -3000.0])
def test_logits_shifted_far_against_each_other(backend, shift):
    """z - r has lost the digits that log p - log q would keep; p and q have not."""
    policy, reference = pair_of_logits(4, 3001, gap=0.1)
    policy += shift
    labels, upstream = labels_for(policy), (torch.full((4,), 1e-3), torch.ones(4))
    _, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    assert (
        relative_error(gradient, truth_and_gradient(policy, reference, labels, *upstream)[1])
        <= 3e-6
    )


@pytest.mark.parametrize("shift", [30.0, 300.0, -300.0, 1e4, -1e4])
@pytest.mark.parametrize("shifted", ["policy", "reference"])
@pytest.mark.parametrize("gap", [0.1, 1.0])
def test_divergences_of_logits_shifted_far_against_each_other(backend, shifted, shift, gap):
    """z - r would be known to 1e-7 of the shift; the kernels take the shift off first."""
    policy, reference = pair_of_logits(6, 3001, gap=gap)
    (policy if shifted == "policy" else reference).add_(shift)
    labels = labels_for(policy)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    allowed = 2e-7 * abs(shift) if backend == "fallback" else 2e-6 * truth[2].max()
    assert np.abs(numpy64(stats.forward_kl) - truth[2]).max() <= allowed


@pytest.mark.parametrize("gap", [103.0, 104.0, 200.0, 300.0])
@pytest.mark.parametrize("vocabulary", [3, 40, 4099])
def test_reference_logits_far_below_the_maximum(backend, vocabulary, gap):
    """The usual softmax().log() is -inf from 104 on, and 0 * -inf is NaN."""
    policy, reference = pair_of_logits(4, vocabulary, scale=1.0)
    reference[0, 1:] -= gap
    reference[1, 0] -= gap
    policy[2, 1:] -= gap
    policy[3, 0] -= gap
    labels, upstream = torch.tensor([0, 0, 1, 2]), torch.randn(2, 4)
    stats, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    truth, wanted = truth_and_gradient(policy, reference, labels, *upstream)
    assert all(values.isfinite().all() for values in (*stats, gradient))
    for ours, theirs in zip(stats, truth, strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    assert relative_error(gradient, wanted) <= 1e-6


@pytest.mark.parametrize("shape", [(37,), (2, 3, 2, 37), (2, 1, 3, 1, 37)])
def test_gradients_of_any_number_of_leading_dimensions(backend, shape):
    policy, reference = pair_of_logits(*shape)
    labels = labels_for(policy)
    upstream = torch.randn(2, *labels.shape)
    _, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    flat = (x.reshape(-1, 37) for x in (policy, reference))
    rows = (x.reshape(-1) for x in (labels, *upstream))
    _, wanted = truth_and_gradient(*flat, *rows)
    assert gradient.shape == policy.shape
    assert relative_error(gradient.reshape(-1, 37), wanted) <= 1e-6


@pytest.mark.parametrize("level", [-60.3, 0.0, 41.7, 61.9, 90.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_sums_are_as_exact_wherever_the_maxima_lie(cuda, dtype, level):
    """A label that is nearly certain has log p(y) = -(mass of the rest), whose relative error is
    held. An exponent r log2(e) near 100 is rounded to 4e-6; the error is a constant of the row, and
    can be put back."""
    policy, reference = pair_of_logits(4, 9001, scale=1.0, gap=0.3)
    policy, reference = policy + level + 2.2, reference + level
    labels = labels_for(policy)
    for logits in (policy, reference):
        logits.scatter_(1, labels[:, None], level + 20)
    policy, reference = policy.to(dtype), reference.to(dtype)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for ours, logits in zip(stats[:2], (policy, reference), strict=True):
        rest = logits.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        label = logits.double().gather(1, labels[:, None])[:, 0]
        truth = -torch.log1p((rest - label).exp())
        torch.testing.assert_close(ours.double(), truth, rtol=6e-7, atol=0)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (1.0, 0.5)])
def test_small_masses_of_a_gradient_keep_their_digits(cuda, weights):
    """p = e^(z - lse) of words up to 80 nats below the largest: the rounding of z - lse, and of its
    product with log2(e), would cost them 8e-6."""
    count = 4000
    policy, reference = (torch.linspace(-45, 35, count)[torch.randperm(count)] for _ in range(2))
    policy, reference = (x[None] + torch.randn(1, count).abs() for x in (policy, reference))
    labels, upstream = policy.argmax(-1), [torch.full((1,), x) for x in weights]
    _, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    _, wanted = truth_and_gradient(policy, reference, labels, *upstream)
    far = (policy.double().softmax(-1) / reference.double().softmax(-1)).log().abs() > 0.5
    error = np.abs(numpy64(gradient) / wanted - 1)[far.cpu().numpy() & (np.abs(wanted) > 1e-37)]
    assert error.max() <= 1e-6


@pytest.mark.parametrize("offset", [-20.0, -3.0, -0.5, 0.3, 0.6])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_an_outlier_where_the_reference_is_largest_costs_no_digits(backend, scale, offset):
    policy, reference = pair_of_logits(1, 128256, scale=scale, gap=1.4e-3)
    policy[0, reference.argmax()] += offset
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([0]))
    truth = oracle.forward_kl(numpy64(policy[0]), numpy64(reference[0]))
    assert truth > 1e-6
    assert stats.forward_kl.item() == pytest.approx(truth, rel=1e-4)
