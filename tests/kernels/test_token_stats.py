"""token_stats and its gradient against the float64 oracle, on the same (rounded) inputs."""

from __future__ import annotations

import oracle
import pytest
import torch
from inputs import DTYPES, labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import check_against_oracle, stats_and_gradient

import tdpo_ext

VOCABULARIES = [1, 2, 3, 7, 15, 16, 17, 33, 127, 513, 1000, 2048, 4099]
# Standard deviations of the reference's logits and of the gap between policy and reference.
SCALES = [(2.0, 0.05), (1.0, 1.0), (5.0, 5.0), (20.0, 20.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_values_and_gradients(backend, dtype, vocabulary):
    for scale, gap in SCALES:
        policy, reference = pair_of_logits(8, vocabulary, scale=scale, gap=gap, dtype=dtype)
        # Plain PyTorch takes the KL from two rounded log-softmaxes, which costs digits when close.
        close = backend == "fallback" and gap < 1 and dtype != torch.float64
        kl_tolerance = 1e-5 if close else 1e-6
        check_against_oracle(policy, reference, labels_for(policy, 0.2), kl_tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_of_many_blocks(backend, dtype):
    policy, reference = pair_of_logits(4, 32003, dtype=dtype)
    check_against_oracle(policy, reference, labels_for(policy))


@pytest.mark.parametrize("gap", [7e-4, 7e-3, 6e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_divergences_keep_their_digits(backend, dtype, gap):
    """KL around 3e-7, 2.5e-5 and 2e-3 at V = 128256: the usual formula is off by up to 16x."""
    policy, reference = pair_of_logits(3, 128256, gap=gap, dtype=dtype)
    labels = labels_for(policy)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for row in range(3):
        truth = oracle.forward_kl(numpy64(policy[row]), numpy64(reference[row]))
        assert 2e-7 < truth < 3e-3
        assert stats.forward_kl[row].item() == pytest.approx(truth, rel=1e-3)


def test_the_gradient_of_close_rows_keeps_its_digits(backend):
    """d KL / dz = p - q, a difference of almost equal numbers."""
    policy, reference = pair_of_logits(6, 5000, gap=1e-3)
    labels = labels_for(policy)
    zero, one = torch.zeros(6), torch.ones(6)
    _, gradient = stats_and_gradient(policy, reference, labels, zero, one)
    truth = oracle.token_stats_gradient(
        numpy64(policy), numpy64(reference), labels.cpu().numpy(), numpy64(zero), numpy64(one)
    )
    assert relative_error(gradient, truth) <= 1e-6


def test_the_gradient_of_a_certain_token_keeps_its_digits(backend):
    """d log p(y) / dz_y = 1 - p(y), a difference of almost equal numbers."""
    policy, reference = pair_of_logits(4, 3000, scale=0.5, gap=0.5)
    labels = labels_for(policy)
    policy[torch.arange(4), labels] += torch.tensor([20.0, 22.0, 24.0, 26.0])
    one, half = torch.ones(4), torch.full((4,), 0.0)
    _, gradient = stats_and_gradient(policy, reference, labels, one, half)
    truth = oracle.token_stats_gradient(
        numpy64(policy), numpy64(reference), labels.cpu().numpy(), numpy64(one), numpy64(half)
    )
    for row in range(4):
        assert relative_error(gradient[row], truth[row]) <= 3e-6


def test_gradient_rows_sum_to_zero(backend):
    policy, reference = pair_of_logits(16, 4099)
    grad_logps, grad_kl = torch.randn(2, 16)
    _, gradient = stats_and_gradient(policy, reference, labels_for(policy), grad_logps, grad_kl)
    assert gradient.double().sum(-1).abs().max() <= 1e-7 * gradient.abs().sum(-1).max() * 10
