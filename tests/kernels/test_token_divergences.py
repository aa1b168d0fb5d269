"""token_divergences and its gradient against the float64 oracle, and where it has to give way."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from inputs import DTYPES, labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import ROUNDING, SUBNORMAL_STEP
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import tdpo_ext
from tdpo_ext.checks import DIVERGENCES
from tdpo_ext.distributed import IGNORED
from tdpo_ext.token_statistics import divergence_kernels, fallback, kernels

OPS = torch.ops.tdpo_ext
OF_ROWS = ("forward_kl", "reverse_kl", "policy_entropy", "reference_entropy")
DIFFERENTIABLE = ("policy_logps", "forward_kl", "reverse_kl", "policy_entropy")
# Standard deviations of the reference's logits and of the gap between policy and reference.
SCALES = [(2.0, 0.05), (1.0, 1.0), (5.0, 5.0), (20.0, 20.0)]
ALL = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def results_of(policy, reference, labels=None, *, upstream, module=tdpo_ext, **options):
    """All outputs, and the gradient of their sum with the weights of ``upstream``, by name."""
    policy = policy.detach().requires_grad_()
    names = DIVERGENCES if labels is not None else OF_ROWS
    found = module.token_divergences(policy, reference, labels, outputs=names, **options)
    total = sum((getattr(found, name) * weight).sum() for name, weight in upstream.items())
    (gradient,) = torch.autograd.grad(total, policy)
    return found, gradient


def upstream_of(policy, labelled=True):
    """Random weights; among the rows are some of each kind of gradient."""
    names = DIFFERENTIABLE if labelled else DIFFERENTIABLE[1:]
    shape = policy.shape[:-1]
    upstream = {name: torch.randn(shape, dtype=accumulation(policy.dtype)) for name in names}
    upstream["forward_kl"][0] = 0  # p alone, and the reverse KL
    upstream["forward_kl"][1] = upstream["reverse_kl"][1] = 0  # p alone
    for weight in upstream.values():
        weight[2] = 0
    upstream["reverse_kl"][3] = 0
    return upstream


def wanted_gradient(truth, upstream, policy, labels):
    """From the oracle's derivatives of each output."""
    gradient = np.zeros(policy.shape)
    of_rows = zip(DIFFERENTIABLE[1:], truth.gradients, strict=True)
    for name, derivative in of_rows:
        gradient += numpy64(upstream[name])[:, None] * derivative
    if labels is not None:
        arrays = numpy64(policy), numpy64(policy), labels.cpu().numpy()
        zero = np.zeros(len(policy))
        weights = numpy64(upstream["policy_logps"])
        gradient += oracle.token_stats_gradient(*arrays, weights, zero)
        gradient[arrays[2] == -100] = 0
    return gradient


def check(policy, reference, labels=None, tolerance=1e-6):
    """Every output and the gradient of all of them, beside the oracle."""
    dtype = policy.dtype
    upstream = upstream_of(policy, labels is not None)
    found, gradient = results_of(policy, reference, labels, upstream=upstream)
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    kept = np.ones(len(policy)) if labels is None else (labels != -100).cpu().numpy()
    tolerance = 1e-12 if dtype == torch.float64 else tolerance
    for name in OF_ROWS:
        ours, value = getattr(found, name), getattr(truth, name) * kept
        assert ours.dtype == accumulation(dtype)
        assert ours.min() >= 0
        check_values(ours, value, tolerance, name)
    wanted = wanted_gradient(truth, upstream, policy, labels)
    assert gradient.dtype == dtype
    assert not gradient[2].any()
    error = np.abs(numpy64(gradient) - wanted)
    allowed = 2 * tolerance * np.linalg.norm(wanted, axis=-1, keepdims=True) + 1e-14
    # Where an entry has almost all of the mass, u - KL(p || q) is a difference of equal numbers,
    # known as z - r is.
    with np.errstate(invalid="ignore"):
        gaps = np.nan_to_num(np.abs(numpy64(policy) - numpy64(reference)), posinf=0).max(-1)
    of_sums = sum(np.abs(numpy64(weight)) for weight in upstream.values()) * (1 + gaps)
    allowed = allowed + (1e-15 if dtype == torch.float64 else 3e-7) * of_sums[:, None]
    if dtype in ROUNDING:
        allowed = allowed + np.abs(wanted) * ROUNDING[dtype] * 1.001 + SUBNORMAL_STEP[dtype]
    assert np.max(error / allowed) <= 1
    return found


def check_values(ours, wanted, tolerance, name):
    """Divergences relative to the norm of all rows, but for a few units in the last place of 1; the
    entropy of a row is a logarithm less a sum, so its error is one of these."""
    ours, infinite = numpy64(ours), np.isinf(wanted)
    assert np.array_equal(ours[infinite], wanted[infinite]), name
    error, wanted = np.abs(ours - wanted)[~infinite], wanted[~infinite]
    if name.endswith("entropy"):
        assert np.max(error / (3 * tolerance * (1 + wanted)), initial=0) <= 1, name
    else:
        floor = 3e-7 * tolerance / 1e-5
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(wanted) + floor, name


# --- values ---------------------------------------------------------------------------------------


def test_two_entries_by_hand(backend):
    """p = (1/4, 3/4) and q = (1/2, 1/2), where the directions differ."""
    policy = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    reference = torch.zeros(1, 2, dtype=torch.float64)
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    by_reverse = 0.25 * (math.log(0.5) - reverse)  # d/dz_0; that by z_1 is its negative
    derivatives = {
        "forward_kl": 0.25 - 0.5,
        "reverse_kl": by_reverse,
        "policy_entropy": -0.25 * (math.log(0.25) + entropy),
    }
    for labels in (None, torch.tensor([0]), torch.tensor([1])):
        for name, derivative in derivatives.items():
            one = {name: torch.ones(1, dtype=torch.float64)}
            found, gradient = results_of(policy, reference, labels, upstream=one)
            values = [getattr(found, name).item() for name in OF_ROWS]
            assert values == pytest.approx([forward, reverse, entropy, math.log(2)], abs=1e-15)
            assert gradient[0].tolist() == pytest.approx([derivative, -derivative], abs=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [2, 3, 17, 127, 1000, 4099])
def test_values_and_gradients(backend, dtype, vocabulary):
    for scale, gap in SCALES:
        policy, reference = pair_of_logits(7, vocabulary, scale=scale, gap=gap, dtype=dtype)
        # Plain PyTorch takes the KL from two rounded log-softmaxes, which costs digits when close.
        close = backend == "fallback" and gap < 1
        tolerance = 1e-5 if close else 4e-6
        check(policy, reference, labels_for(policy, 0.2), tolerance)
        check(policy, reference, tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 9])
def test_a_vocabulary_of_many_blocks(backend, dtype, rows):
    policy, reference = pair_of_logits(rows, 40003, dtype=dtype)
    check(policy, reference, labels_for(policy))
    check(policy, reference)


@pytest.mark.parametrize("gap", [1.4e-3, 7e-3, 6e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_divergences_keep_their_digits(backend, dtype, gap):
    policy, reference = pair_of_logits(3, 128256, gap=gap, dtype=dtype)
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    assert (truth.reverse_kl > 9e-7).all()
    for labels in (None, labels_for(policy)):
        names = ("forward_kl", "reverse_kl")
        found = tdpo_ext.token_divergences(policy, reference, labels, outputs=names)
        for name in names:
            ours, wanted = numpy64(getattr(found, name)), getattr(truth, name)
            assert np.all(np.abs(ours - wanted) <= 1e-3 * wanted), name


def test_the_gradient_of_close_rows_keeps_its_digits(backend):
    policy, reference = pair_of_logits(6, 5000, gap=1e-3)
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    derivatives = dict(zip(DIFFERENTIABLE[1:], truth.gradients, strict=True))
    for name in ("forward_kl", "reverse_kl"):
        for labels in (None, labels_for(policy)):
            one = {name: torch.ones(6)}
            _, gradient = results_of(policy, reference, labels, upstream=one)
            assert relative_error(gradient, derivatives[name]) <= 2e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 40, 5000])
def test_equal_rows_have_no_divergence(backend, dtype, vocabulary):
    policy, _ = pair_of_logits(9, vocabulary, scale=4.0, dtype=dtype)
    policy[4:] *= 6  # so that entropies are small, and show the last digits of their sums
    policy[1, 1::3] = -torch.inf
    policy[2, 1::3] = torch.finfo(dtype).min
    for labels in (None, torch.zeros(9, dtype=torch.int64)):
        one = {"reverse_kl": torch.ones(9, dtype=accumulation(dtype))}
        found, gradient = results_of(policy, policy, labels, upstream=one)
        assert not found.reverse_kl.any()
        assert not found.forward_kl.any()
        assert torch.equal(found.policy_entropy[:4], found.reference_entropy[:4])
        # In float64 the last digit shows which sums of products the compiler has contracted.
        digits = 1e-14 if dtype == torch.float64 else 0
        difference = found.policy_entropy - found.reference_entropy
        assert difference.abs().max() <= digits
        # log p - log q is z - r - (lse(z) - lse(r)), and all of it is 0 to the last bit.
        assert gradient.abs().max() <= (0 if backend != "fallback" else 1e-7)


def test_a_certain_label_keeps_the_digits_of_its_derivatives(backend):
    """p(y) (log p(y) - log q(y) - KL) is a difference of almost equal numbers."""
    policy, reference = pair_of_logits(3, 3000, scale=0.5, gap=0.5)
    labels = labels_for(policy)
    policy[torch.arange(3), labels] += torch.tensor([20.0, 22.0, 24.0])
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    derivatives = dict(zip(DIFFERENTIABLE[1:], truth.gradients, strict=True))
    for name in ("reverse_kl", "policy_entropy"):
        _, gradient = results_of(policy, reference, labels, upstream={name: torch.ones(3)})
        if backend == "fallback":  # its numbers of the label are those of all entries
            continue
        for row in range(3):
            assert relative_error(gradient[row], derivatives[name][row]) <= 5e-6, name


# --- rows that make the kernels change path -------------------------------------------------------


@ALL
def test_gaps_of_all_sizes_in_one_row(backend, dtype):
    policy, reference = pair_of_logits(5, 9001, scale=1.0, gap=0.0, dtype=torch.float64)
    gaps = torch.tensor([1e-3, 1.0, 0.3, 3.0, 0.1, 0.5, 1e-3, 0.4, 2.0])
    noise = torch.randn(5, 9001, dtype=torch.float64)
    policy += noise * gaps.repeat_interleave(1001)[:9001]
    check(policy.to(dtype), reference.to(dtype), labels_for(policy), 3e-6)


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
    # Elsewhere z - r of logits of this size, which backward takes, does.
    tolerance = 1e-4 if backend == "fallback" and gap < 1 else 3e-5
    check(policy.to(dtype), reference.to(dtype), labels_for(policy), tolerance)


@ALL
@pytest.mark.parametrize("mask", [-80.0, -1e3, -1e5, -1e7, -1e30, -torch.inf])
def test_masked_entries_in_some_blocks(backend, dtype, mask):
    """On both sides, and once on the reference's alone where the policy has next to no mass."""
    policy, reference = pair_of_logits(5, 5000, gap=0.1, dtype=dtype)
    policy[:, 100:3000:7] = reference[:, 100:3000:7] = mask
    policy[1, :1500] = reference[1, :1500] = mask
    policy[2, 3500] = mask
    check(policy, reference, torch.full((5,), 3111), 1e-5)


@pytest.mark.parametrize("mask", [-30.0, -60.0, -100.0, -1e4, -1e8, -1e30, -3.4e38, -torch.inf])
@pytest.mark.parametrize("share", ["first half", "last half", "one in seven", "one"])
def test_a_policy_that_masks_entries_of_the_reference(backend, mask, share):
    """The forward KL is as large as the mask, or infinite. The reverse KL is not: it is -log of
    the reference's mass of the other entries, and a little more."""
    policy, reference = pair_of_logits(4, 5000, scale=1.0, gap=0.1)
    masked = {"first half": slice(0, 2500), "last half": slice(2500, None)}.get(share)
    masked = masked or (slice(5, None, 7) if share == "one in seven" else slice(4000, 4001))
    policy[:, masked] = mask
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    for labels in (None, torch.full((4,), 4001)):
        one = {"reverse_kl": torch.ones(4)}
        found, gradient = results_of(policy, reference, labels, upstream=one)
        assert numpy64(found.reverse_kl) == pytest.approx(truth.reverse_kl, rel=3e-5, abs=3e-7)
        assert numpy64(found.forward_kl) == pytest.approx(truth.forward_kl, rel=3e-5)
        assert relative_error(found.policy_entropy, truth.policy_entropy) <= 1e-6
        assert relative_error(gradient, truth.gradients[1]) <= 1e-5


@pytest.mark.parametrize("shift", [-2.0, -0.3, 0.3, 1.0])
@pytest.mark.parametrize("count", [64, 130, 2000])
def test_a_start_without_mass_that_is_shifted_costs_no_digits(compiled, shift, count):
    """The first entries give the centre of gaps; it must not stay theirs."""
    policy, reference = pair_of_logits(4, 40000, scale=1.0, gap=3e-3)
    reference[:, :count] -= 6
    policy[:, :count] += shift - 6
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    found = tdpo_ext.token_divergences(policy, reference)
    assert numpy64(found.reverse_kl) == pytest.approx(truth.reverse_kl, rel=1e-3)


@pytest.mark.parametrize("gap", [0.2, 0.35, 0.5, 0.7])
@pytest.mark.parametrize("scale", [1.0, 5.0, 10.0])
def test_divergences_at_the_seam_of_close_and_far(compiled, gap, scale):
    policy, reference = pair_of_logits(4, 40000, scale=scale, gap=gap)
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    found = tdpo_ext.token_divergences(policy, reference)
    assert numpy64(found.reverse_kl) == pytest.approx(truth.reverse_kl, rel=2e-5)


@pytest.mark.parametrize("shift", [30.0, -30.0, 300.0, -300.0, 1e4])
def test_logits_shifted_far_against_each_other(compiled, shift):
    policy, reference = pair_of_logits(5, 3001, gap=0.5)
    policy += shift
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    for labels in (None, labels_for(policy)):
        found = tdpo_ext.token_divergences(policy, reference, labels, outputs=OF_ROWS)
        assert relative_error(found.reverse_kl, truth.reverse_kl) <= 5e-6
        assert relative_error(found.policy_entropy, truth.policy_entropy) <= 1e-6


# --- excluded entries -----------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", [None, 0, 3])
@pytest.mark.parametrize("below", [10.0, 300.0])
def test_an_entry_that_the_reference_excludes(backend, dtype, vocabulary, label, below):
    """The reverse KL is infinite, also where p underflows; the forward one is not."""
    policy, reference = pair_of_logits(2, vocabulary, scale=1.0, dtype=dtype)
    reference[0, 3] = -math.inf
    policy[0, 3] = policy[0].max() - below
    policy[1, 3] = reference[1, 3] = -math.inf  # excluded by both: nothing special
    if label == 3:
        policy[1, 3] = reference[1, 3] = 0
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    labels = None if label is None else torch.full((2,), label)
    weight = torch.ones(2, dtype=accumulation(dtype))
    found, gradient = results_of(policy, reference, labels, upstream={"reverse_kl": weight})
    assert found.reverse_kl[0] == math.inf
    for name in ("forward_kl", "policy_entropy", "reference_entropy"):
        check_values(getattr(found, name), getattr(truth, name), 1e-5, name)
    assert found.reverse_kl[1].isfinite()
    assert gradient[1].isfinite().all()
    # An infinite divergence has no gradient, and it shows.
    assert not gradient[0, 0].isfinite()
    # The other outputs of the row have theirs.
    others = dict.fromkeys(("forward_kl", "policy_entropy"), weight)
    _, gradient = results_of(policy, reference, labels, upstream=others)
    wanted = truth.gradients[0] + truth.gradients[2]
    bound = 1e-2 if dtype in ROUNDING else 1e-5
    assert relative_error(gradient, wanted) <= bound


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", [None, 0, 3])
def test_an_entry_that_the_policy_excludes(backend, dtype, vocabulary, label):
    """The forward KL is infinite, and its gradient p - q all the same. The reverse KL is finite."""
    policy, reference = pair_of_logits(2, vocabulary, scale=1.0, dtype=dtype)
    policy[0, 3] = -math.inf
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    labels = None if label is None else torch.full((2,), label)
    weight = torch.ones(2, dtype=accumulation(dtype))
    every = dict.fromkeys(DIFFERENTIABLE[1:], weight)
    found, gradient = results_of(policy, reference, labels, upstream=every)
    assert found.forward_kl[0] == math.inf
    for name in ("reverse_kl", "policy_entropy", "reference_entropy"):
        check_values(getattr(found, name), getattr(truth, name), 1e-5, name)
    bound = 1e-2 if dtype in ROUNDING else 1e-5
    assert relative_error(gradient, sum(truth.gradients)) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_masks_of_the_lowest_number_on_the_reference_alone(backend, dtype, vocabulary):
    """KL(pi || pi_ref) is the policy's mass of these entries times that number."""
    lowest = torch.finfo(dtype).min
    policy, reference = pair_of_logits(1, vocabulary, scale=0.5, gap=0.0, dtype=dtype)
    reference[0, 2 : vocabulary // 2] = lowest
    share = policy.double().softmax(-1)[0, 2 : vocabulary // 2].sum().item()
    for labels in (None, torch.tensor([1]), torch.tensor([3])):
        found = tdpo_ext.token_divergences(policy, reference, labels, outputs=OF_ROWS)
        assert found.reverse_kl.item() == pytest.approx(-lowest * share, rel=1e-5)
        assert found.forward_kl.isfinite().all()
        assert found.policy_entropy.isfinite().all()


def test_the_limit_of_the_gradient_of_an_infinite_reverse_kl(backend):
    """As eager PyTorch has it: -inf where q > 0, NaN where p > 0 = q; 0 only where p = 0."""
    policy = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    reference = torch.tensor([[0.0, 1.0, -math.inf, 0.0]])
    _, gradient = results_of(policy, reference, upstream={"reverse_kl": torch.ones(1)})
    assert gradient[0, :2].tolist() == [-math.inf, -math.inf]
    assert gradient[0, 2].isnan()
    assert gradient[0, 3] == 0


# --- which rows, and what is read -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_rows_that_are_left_out_are_not_read(backend, dtype, vocabulary):
    policy, reference = pair_of_logits(6, vocabulary, dtype=dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    labels = labels_for(policy).masked_fill(~mask, -100)
    upstream = {name: torch.randn(6, dtype=accumulation(dtype)) for name in OF_ROWS[:3]}
    plain = results_of(policy, reference, upstream=upstream)
    policy[~mask] = reference[~mask] = torch.nan
    for options in ({"mask": mask}, {"labels": labels}):
        found, gradient = results_of(policy, reference, **options, upstream=upstream)
        for name in OF_ROWS:
            ours = getattr(found, name)
            assert not ours[~mask].any()
            torch.testing.assert_close(ours[mask], getattr(plain[0], name)[mask])
        assert not gradient[~mask].any()
        tolerance = {"rtol": 0.02, "atol": 1e-3} if dtype in ROUNDING else {}
        torch.testing.assert_close(gradient[mask], plain[1][mask], **tolerance)


def test_a_row_reads_what_its_upstream_gradients_need(backend):
    policy, reference = pair_of_logits(5, 3000)
    policy.requires_grad_()
    poisoned = reference.clone()
    found = tdpo_ext.token_divergences(policy, poisoned, outputs=OF_ROWS)
    poisoned.data.fill_(torch.nan)

    def gradient_of(name, weight):
        (gradient,) = torch.autograd.grad(
            getattr(found, name), policy, torch.full((5,), weight), retain_graph=True
        )
        return gradient

    assert gradient_of("policy_entropy", 1.0).isfinite().all()
    for name in ("forward_kl", "reverse_kl"):
        assert gradient_of(name, 1.0).isnan().all()
        assert not gradient_of(name, 0.0).any()


def test_upstream_gradients_may_be_one_number_for_all_rows(backend):
    policy, reference = pair_of_logits(5, 300)
    policy.requires_grad_()
    found = tdpo_ext.token_divergences(policy, reference, outputs=OF_ROWS)
    for name in DIFFERENTIABLE[1:]:
        values, ones = getattr(found, name), torch.ones(5)
        (wanted,) = torch.autograd.grad(values, policy, ones, retain_graph=True)
        (ours,) = torch.autograd.grad(values.sum(), policy, retain_graph=True)
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("which", ["policy", "reference"])
def test_nan_in_a_kept_row_shows_in_it_and_nowhere_else(backend, which, position):
    policy, reference = pair_of_logits(3, 5000)
    at = {"first": 0, "last": 4999}[position]
    (policy if which == "policy" else reference)[1, at] = math.nan
    weights = torch.ones(3)
    names = ("forward_kl", "reverse_kl", "policy_entropy")
    for name in names:
        found, gradient = results_of(policy, reference, upstream={name: weights})
        read = which == "policy" or name != "policy_entropy"
        assert getattr(found, name).isnan().tolist() == [False, read, False]
        assert gradient.isnan().any(-1).tolist() == [False, read, False]
    entropy = found.reference_entropy.isnan().tolist()
    assert entropy == [False, which == "reference", False]


def test_outputs_are_those_asked_for_in_any_order(backend):
    policy, reference = pair_of_logits(4, 50)
    labels = labels_for(policy)
    every = tdpo_ext.token_divergences(policy, reference, labels, outputs=DIVERGENCES)
    for names in itertools.combinations(reversed(DIVERGENCES), 2):
        found = tdpo_ext.token_divergences(policy, reference, labels, outputs=names)
        for name in DIVERGENCES:
            ours, wanted = getattr(found, name), getattr(every, name)
            if name in names:
                torch.testing.assert_close(ours, wanted, rtol=3e-6, atol=1e-7)
            else:
                assert ours is None


def test_what_has_the_same_name_in_token_stats_is_the_same(backend):
    policy, reference = pair_of_logits(4, 5000)
    labels = labels_for(policy, 0.3)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    alone = tdpo_ext.token_divergences(policy, reference, labels, outputs=stats._fields)
    more = tdpo_ext.token_divergences(policy, reference, labels, outputs=DIVERGENCES)
    for name in stats._fields:
        assert torch.equal(getattr(alone, name), getattr(stats, name))
        torch.testing.assert_close(getattr(more, name), getattr(stats, name), rtol=2e-6, atol=1e-7)


def test_only_what_depends_on_the_policy_has_a_gradient(backend):
    policy, reference = pair_of_logits(4, 50)
    labels = labels_for(policy)
    policy.requires_grad_()
    found = tdpo_ext.token_divergences(policy, reference, labels, outputs=DIVERGENCES)
    with_gradient = [name for name in DIVERGENCES if getattr(found, name).requires_grad]
    assert tuple(with_gradient) == DIFFERENTIABLE


@pytest.mark.parametrize("shape", [(37,), (2, 3, 37), (2, 1, 3, 2, 37)])
def test_leading_dimensions_and_strides(backend, shape):
    policy, reference = (torch.randn(*shape[:-1], 45)[..., 3:40] for _ in range(2))
    weights = {name: torch.randn(shape[:-1]) for name in DIFFERENTIABLE[1:]}
    found, gradient = results_of(policy, reference, upstream=weights)
    flat = [x.reshape(-1, 37).contiguous() for x in (policy, reference)]
    rows = {name: x.reshape(-1) for name, x in weights.items()}
    wanted, of_rows = results_of(*flat, upstream=rows)
    for name in OF_ROWS:
        assert getattr(found, name).shape == shape[:-1]
        torch.testing.assert_close(getattr(found, name).reshape(-1), getattr(wanted, name))
    assert gradient.shape == policy.shape
    torch.testing.assert_close(gradient.reshape(-1, 37), of_rows)


def test_no_rows_at_all(backend):
    policy, reference = torch.empty(2, 0, 30), torch.empty(2, 0, 7)
    with pytest.raises(ValueError, match="reference_logits"):
        tdpo_ext.token_divergences(policy, reference)
    found, gradient = results_of(
        policy, torch.empty(2, 0, 30), upstream={"reverse_kl": torch.ones(2, 0)}
    )
    assert found.reverse_kl.shape == (2, 0)
    assert gradient.shape == policy.shape


# --- tiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("cuts", [[], [64], [1, 700, 701, 4000]])
@ALL
def test_tiles_of_the_vocabulary(compiled, dtype, labelled, cuts):
    vocabulary = 5000
    policy, reference = pair_of_logits(5, vocabulary, dtype=dtype)
    policy[1, 10:900] = -torch.inf
    reference[2, 4999] = -torch.inf
    labels = labels_for(policy) if labelled else torch.full((5,), -1)
    labels[3] = IGNORED
    whole = divergence_kernels.forward(policy, reference, labels, IGNORED, not labelled)
    bounds = [0, *cuts, vocabulary]
    # Two sets of records, as processes send them.
    records = [kernels.empty_records(5, policy, divergences=True) for _ in range(2)]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        tile = policy[:, start:end], reference[:, start:end]
        of_tile = torch.where(labels == IGNORED, IGNORED, labels - start)
        kernels.add_tile(records[number % 2], *tile, of_tile)
    parts = divergence_kernels.finish(
        torch.stack(records), labels, vocabulary, IGNORED, not labelled
    )
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for ours, wanted in zip(parts[:6], whole[:6], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    gradients = [torch.randn(5, dtype=whole[0].dtype) for _ in range(4)]
    wanted, joined = torch.empty_like(policy), torch.empty_like(policy)
    saved = whole[-1]
    divergence_kernels.write_gradient(wanted, policy, reference, labels, saved, *gradients)
    for start, end in itertools.pairwise(bounds):
        tile = (x[:, start:end] for x in (joined, policy, reference))
        of_tile = torch.where(labels == IGNORED, IGNORED, labels - start)
        divergence_kernels.write_gradient(*tile, of_tile, saved, *gradients)
    if dtype in ROUNDING:
        torch.testing.assert_close(joined, wanted, rtol=0.01, atol=1e-5, equal_nan=True)
    else:
        torch.testing.assert_close(joined, wanted, rtol=1e-5, atol=1e-7, equal_nan=True)


# --- autograd, the ops, compilation ---------------------------------------------------------------


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_gradcheck(backend, close, labelled):
    policy, reference = pair_of_logits(5, 11, gap=0.01 if close else 1.0, dtype=torch.float64)
    policy[1, ::3] = reference[1, ::3] = -torch.inf
    labels = labels_for(policy, 0.2).masked_fill(torch.arange(5) == 1, 1) if labelled else None
    names = DIFFERENTIABLE if labelled else DIFFERENTIABLE[1:]
    finite = policy.isfinite()

    def function(z):
        z = torch.where(finite, z, -torch.inf)
        found = tdpo_ext.token_divergences(z, reference, labels, outputs=names)
        return tuple(getattr(found, name) for name in names)

    assert gradcheck(function, policy.masked_fill(~finite, 0).requires_grad_())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_the_reference_is_the_oracle_and_differentiable_twice(labelled, close):
    policy, reference = pair_of_logits(4, 7, gap=0.05 if close else 1.0, dtype=torch.float64)
    reference[1, ::3] = policy[1, ::3] = -torch.inf
    labels = labels_for(policy, 0.2).masked_fill(torch.arange(4) == 1, 1) if labelled else None
    weights = {name: torch.randn(4, dtype=torch.float64) for name in DIFFERENTIABLE[1:]}
    found, gradient = results_of(
        policy, reference, labels, upstream=weights, module=tdpo_ext.reference
    )
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    kept = 1.0 if labels is None else (labels != -100).double().numpy()
    for name in OF_ROWS:
        assert relative_error(getattr(found, name), getattr(truth, name) * kept) <= 1e-11
    every = zip(weights.values(), truth.gradients, strict=True)
    wanted = sum(numpy64(weight)[:, None] * derivative for weight, derivative in every)
    wanted = wanted * np.broadcast_to(kept, 4)[:, None]
    assert relative_error(gradient, wanted) <= 1e-11
    rows = torch.tensor([0, 2, 3])
    labels = None if labels is None else labels[rows]
    names = DIFFERENTIABLE if labelled else DIFFERENTIABLE[1:]

    def function(z):
        found = tdpo_ext.reference.token_divergences(z, reference[rows], labels, outputs=names)
        return tuple(getattr(found, name) for name in names)

    assert gradgradcheck(function, policy[rows].requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_the_gradient_is_the_same_and_lies_over_the_logits(backend, dtype):
    policy, reference = pair_of_logits(9, 3001, dtype=dtype)
    weights = {name: torch.randn(9, dtype=accumulation(dtype)) for name in DIFFERENTIABLE[1:]}
    gradients = []
    for inplace in (False, True):
        logits = policy.clone().requires_grad_() * 1
        found = tdpo_ext.token_divergences(
            logits, reference, outputs=OF_ROWS, inplace_backward=inplace
        )
        total = sum((getattr(found, name) * weight).sum() for name, weight in weights.items())
        gradients.append(torch.autograd.grad(total, logits)[0])
    assert torch.equal(*gradients)
    assert gradients[1].data_ptr() == logits.data_ptr()


def test_a_second_derivative_names_the_reference(backend):
    policy, reference = pair_of_logits(3, 9)
    policy.requires_grad_()
    for options in ({}, {"inplace_backward": True}):
        found = tdpo_ext.token_divergences(policy * 1, reference, **options)
        with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
            second_derivative(found.reverse_kl.sum(), policy)


def second_derivative(value, policy):
    (gradient,) = torch.autograd.grad(value, policy, create_graph=True)
    gradient.square().sum().backward()


def forward_arguments(*shape, dtype, unlabelled):
    policy, reference = pair_of_logits(*shape, dtype=dtype)
    labels = labels_for(policy, 0.2)
    return policy, reference, labels.clamp(max=-1) if unlabelled else labels, -100, unlabelled


@pytest.mark.parametrize("unlabelled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"), [*zip(DTYPES, [(5,), (3, 17), (2, 3, 40), (4, 9)], strict=True)], ids=str
)
def test_opcheck(backend, dtype, shape, unlabelled):
    arguments = forward_arguments(*shape, dtype=dtype, unlabelled=unlabelled)
    torch.library.opcheck(OPS.token_divergences.default, arguments)
    policy, reference, labels, ignore_index, _ = arguments
    *of_rows, normalizers = OPS.token_divergences(*arguments)
    gradients = torch.randn(4, *labels.shape, dtype=of_rows[0].dtype)
    arguments = (policy, reference, labels, normalizers, *gradients, ignore_index)
    torch.library.opcheck(OPS.token_divergences_backward.default, arguments)
    torch.library.opcheck(OPS.token_divergences_backward_.default, arguments)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_in_one_graph_with_dynamic_shapes(labelled, inplace):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(policy, reference, rows):
        given = {"labels": rows} if labelled else {"mask": rows}
        found = tdpo_ext.token_divergences(
            policy * 1, reference, **given, outputs=OF_ROWS, inplace_backward=inplace
        )
        return (found.reverse_kl + 0.1 * found.policy_entropy - found.forward_kl).sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for count, tokens in ((4, 6), (6, 9), (10, 5)):
        policy, reference = pair_of_logits(count, tokens, 33)
        rows = labels_for(policy, 0.2) if labelled else torch.rand(count, tokens) < 0.7
        results = []
        for run in (compiled, function):
            leaf = policy.clone().requires_grad_()
            loss = run(leaf, reference, rows)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for ours, wanted in zip(*results, strict=True):
            torch.testing.assert_close(ours, wanted)
        first = first or counter.frame_count
        assert counter.frame_count == first, "a new shape must not mean a new graph"


def test_both_implementations_save_the_same_for_backward(compiled):
    policy, reference = pair_of_logits(7, 2100)
    for unlabelled in (False, True):
        labels = torch.full((7,), -1) if unlabelled else labels_for(policy)
        arguments = policy, reference, labels, -100, unlabelled
        ours, wanted = OPS.token_divergences(*arguments), fallback.divergences_forward(*arguments)
        first = 8 if unlabelled else 4  # the label's own numbers mean nothing where there is none
        for column in range(first, 12):
            if column == 9:  # relative to the maximum, which is a choice
                continue
            torch.testing.assert_close(
                ours[-1][:, column], wanted[-1][:, column], rtol=2e-5, atol=2e-6
            )


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference])
def test_errors_name_the_argument(module):
    policy, reference = pair_of_logits(3, 9)
    labels, mask = labels_for(policy), torch.ones(3, dtype=torch.bool)

    def call(kind, words, *labels, **options):
        with pytest.raises(kind, match=words):
            module.token_divergences(policy, reference, *labels, **options)

    call(ValueError, "'reverse'.*|outputs must be some of", outputs=("reverse",))
    call(ValueError, "outputs must be some of", outputs=())
    call(TypeError, "outputs must be a tuple", outputs="reverse_kl")
    call(ValueError, "policy_logps.*needs labels", outputs=("policy_logps",))
    call(ValueError, "labels and mask", labels, mask=mask)
    call(TypeError, "mask must have dtype bool", mask=mask.long())
    call(ValueError, "mask must have the shape", mask=mask[:2])
    call(TypeError, "mask must be a torch.Tensor", mask=[True] * 3)
    call(ValueError, "labels must have the shape", labels[:2])
    call(IndexError, "labels must lie in", torch.tensor([0, 1, 9]))
    call(IndexError, "labels must lie in", torch.tensor([0, 1, -1]))


def test_a_label_outside_the_vocabulary_raises_on_the_host(on_host):
    policy, reference = pair_of_logits(3, 9)
    for label in (9, -1):
        with pytest.raises(IndexError, match="labels must lie in"):
            tdpo_ext.token_divergences(policy, reference, torch.tensor([0, 1, label]))


def test_a_label_outside_the_vocabulary_gives_nan_where_nobody_looks(cuda_unchecked):
    policy, reference = pair_of_logits(4, 40)
    labels = torch.tensor([0, 40, -1, -100])
    found, gradient = results_of(policy, reference, labels, upstream={"reverse_kl": torch.ones(4)})
    for name in DIVERGENCES:
        values = getattr(found, name)
        assert values.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, True, False]
