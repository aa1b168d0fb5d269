"""Rows that make the kernels change path: bases that move, groups close or not, parts of rows.

The CPU's kernels decide for blocks of 1024 entries and groups of 64, and split long rows where
there are few (csrc/cpu/running_stats.h, token_stats.cpp); what they decide must not show.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from inputs import labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import check_against_oracle, stats_and_gradient

import tdpo_ext

ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def check_kl(policy, reference, rel):
    """Row by row: a norm over rows would let the large divergences hide the small ones."""
    stats = tdpo_ext.token_stats(policy, reference, labels_for(policy))
    for ours, z, r in zip(stats.forward_kl, numpy64(policy), numpy64(reference), strict=True):
        assert ours.item() == pytest.approx(oracle.forward_kl(z, r), rel=rel)


@ALL
def test_gaps_of_all_sizes_in_one_row(backend, dtype):
    policy, reference = pair_of_logits(5, 9001, scale=1.0, gap=0.0, dtype=torch.float64)
    gaps = torch.tensor([1e-3, 1.0, 0.3, 3.0, 0.1, 0.5, 1e-3, 0.4, 2.0])
    noise = torch.randn(5, 9001, dtype=torch.float64)
    policy += noise * gaps.repeat_interleave(1001)[:9001]
    check_against_oracle(policy.to(dtype), reference.to(dtype), labels_for(policy))


@ALL
@pytest.mark.parametrize("gap", [1e-2, 1.0])
@pytest.mark.parametrize("step", [3.0, 15.0, 60.0])
def test_logits_that_grow_along_the_row(backend, dtype, gap, step):
    policy, reference = pair_of_logits(5, 6000, scale=1.0, gap=gap, dtype=torch.float64)
    ramp = step * (torch.arange(6000) // 700)
    rise = torch.stack([ramp, ramp.flip(0), 0 * ramp, ramp, 0 * ramp])
    policy, reference = policy + rise, reference + rise
    policy[4] += ramp  # one side alone
    # Plain PyTorch takes the KL from two rounded log-softmaxes, which costs digits when close.
    close = backend == "fallback" and gap < 1 and dtype != torch.float64
    arguments = policy.to(dtype), reference.to(dtype), labels_for(policy)
    check_against_oracle(*arguments, kl_tolerance=1e-4 if close else 1e-6)


@ALL
@pytest.mark.parametrize("doublings", [21, 22, 23, 50, 51, 52, 53])
def test_entries_so_far_below_that_exponents_wrap(backend, dtype, doublings):
    """About 2^22 / log2(e) nats (2^52 in double) below the base the number that holds the exponent
    of exp() has lost its leading bits: such an entry looked as if it had mass."""
    policy, reference = pair_of_logits(3, 3000, gap=0.1, dtype=torch.float64)
    at = -(2.0**doublings) * np.log(2)
    step = 0.25 if doublings < 30 else 1.0
    policy[:, 100:700] = reference[:, 100:700] = at + step * (torch.arange(600.0) - 500).double()
    check_against_oracle(policy.to(dtype), reference.to(dtype), torch.full((3,), 2111))


@ALL
@pytest.mark.parametrize("mask", [-80.0, -1e3, -1e5, -8.7218e6, -1e7, -1e30, -torch.inf])
def test_masked_entries_in_some_blocks(backend, dtype, mask):
    policy, reference = pair_of_logits(5, 5000, gap=0.1, dtype=dtype)
    policy[:, 100:3000:7] = reference[:, 100:3000:7] = mask
    policy[1, :1500] = reference[1, :1500] = mask
    reference[2, 3500] = mask
    check_against_oracle(policy, reference, torch.full((5,), 3111), kl_tolerance=1e-5)


@ALL
@pytest.mark.parametrize("level", [-70e3, -65530.0, -33e3, -31e3, 31e3, 33e3, 60e3, 65530.0, 70e3])
def test_logits_all_far_from_zero(backend, dtype, level):
    """Up to some level the kernels take it for a whole number of powers of two."""
    policy, reference = pair_of_logits(5, 3000, scale=2.0, gap=1.0, dtype=torch.float64)
    policy, reference = ((x + level).to(dtype) for x in (policy, reference))
    # float32's log-sum-exps are taken in double.
    spacing = np.spacing(abs(level)) if dtype == torch.float64 else 0.0
    check_against_oracle(policy, reference, labels_for(policy), of_log_sums=spacing / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("level", [33e3, 65e3, 1e5])
def test_one_entry_far_above_a_block_of_close_ones(backend, dtype, level):
    """It raises the base so far that its steps are not exact; the other entries have no mass."""
    if level > torch.finfo(dtype).max:
        pytest.skip("more than this dtype holds")
    policy, reference = pair_of_logits(1, 1025, scale=0.5, gap=0.1, dtype=dtype)
    policy[0, 300] = reference[0, 300] = level
    label = torch.tensor([1024])
    stats, gradient = stats_and_gradient(policy, reference, label, torch.ones(1), torch.ones(1))
    arguments = numpy64(policy), numpy64(reference), label.cpu().numpy()
    for ours, wanted in zip(stats, oracle.token_stats(*arguments), strict=True):
        assert ours.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)
    wanted = oracle.token_stats_gradient(*arguments, np.ones(1), np.ones(1))
    assert relative_error(gradient, wanted) <= 1e-6


def test_a_reference_that_rises_while_the_policy_is_far_above(backend):
    """Between the two rises k = e^(reference_max + centre - policy_max) is 0 in float32."""
    policy, reference = pair_of_logits(1, 1025, scale=0.5, gap=0.1)
    policy[0, 300] = 300
    policy[0, 500] = reference[0, 500] = 30
    label = torch.tensor([1024])
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), label.cpu().numpy())
    for ours, wanted in zip(tdpo_ext.token_stats(policy, reference, label), truth, strict=True):
        assert ours.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.3, 1.0])
@pytest.mark.parametrize("count", [64, 130, 2000])
def test_a_start_without_mass_that_is_shifted_costs_no_digits(compiled, shift, count):
    """The first entries give the centre of gaps; it must not stay theirs."""
    policy, reference = pair_of_logits(4, 40000, scale=1.0, gap=3e-3)
    reference[:, :count] -= 6
    policy[:, :count] += shift - 6
    check_kl(policy, reference, rel=1e-3)


@pytest.mark.parametrize("gap", [0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("scale", [1.0, 5.0, 10.0])
def test_divergences_at_the_seam_of_close_and_far(compiled, gap, scale):
    policy, reference = pair_of_logits(4, 40000, scale=scale, gap=gap)
    check_kl(policy, reference, rel=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_labels_at_the_seams_of_pieces(on_processor, dtype, rows):
    vocabulary = 70000
    policy, reference = pair_of_logits(rows, vocabulary, dtype=dtype)
    width = (vocabulary // 4 // 64 + 1) * 64
    seams = [0, width - 1, width, width + 1, 3 * width - 1, 3 * width, vocabulary - 1]
    for label in seams:
        labels = torch.full((rows,), label)
        stats, gradient = stats_and_gradient(policy, reference, labels, torch.ones(rows), 0.3)
        arguments = (numpy64(policy), numpy64(reference), labels.numpy())
        truth = oracle.token_stats(*arguments)
        for ours, wanted in zip(stats, truth, strict=True):
            assert relative_error(ours, wanted) <= 1e-6
        upstream = (np.ones(rows), np.full(rows, 0.3))
        wanted = oracle.token_stats_gradient(*arguments, *upstream)
        bound = 1e-6 if dtype == torch.float32 else 3e-3
        assert relative_error(gradient, wanted) <= bound


@pytest.mark.parametrize("ratio", [0.5, 3.9, 4.1, 100.0, 1e6, -3.9, -4.1])
@pytest.mark.parametrize("gap", [1e-3, 0.3, 2.0])
def test_gradients_for_any_weight_of_the_divergence(backend, ratio, gap):
    policy, reference = pair_of_logits(4, 3001, scale=1.0, gap=gap)
    labels, upstream = labels_for(policy), (torch.full((4,), 1 / ratio), torch.ones(4))
    _, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    wanted = oracle.token_stats_gradient(
        numpy64(policy), numpy64(reference), labels.cpu().numpy(), *map(numpy64, upstream)
    )
    assert relative_error(gradient, wanted) <= 1e-6
