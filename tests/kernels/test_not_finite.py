"""Infinities and NaN come out where the mathematics has them, and nowhere else."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from inputs import DTYPES, labels_for, numpy64, pair_of_logits

import tdpo_ext
from tdpo_ext.token_statistics import fallback

# In float32 e^-104 is 0; in float64 e^-746 is.
UNDERFLOWS = {torch.float64: 800.0}


def excluded_word(
    vocabulary: int, dtype: torch.dtype, below: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row 0: the policy excludes a word that the reference has so far below its maximum."""
    policy, reference = pair_of_logits(2, vocabulary, scale=1.0, dtype=dtype)
    policy[0, 3] = -math.inf
    reference[0, 3] = reference[0].max() - below
    labels = torch.zeros(2, dtype=torch.int64)
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    assert truth[2, 0] == math.inf
    assert math.isfinite(truth[2, 1])
    return policy, reference, labels


def check_kl_is_infinite(module, policy, reference, labels):
    policy = policy.requires_grad_()
    stats = module.token_stats(policy, reference, labels)
    assert stats.forward_kl[0] == math.inf
    assert stats.forward_kl[1].isfinite()
    assert stats.policy_logps.isfinite().all()
    total = stats.policy_logps.sum() + 0.3 * stats.forward_kl.sum()
    assert torch.autograd.grad(total, policy)[0].isfinite().all()


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_excluded_word_that_the_reference_has_makes_the_kl_infinite(backend, dtype, vocabulary):
    check_kl_is_infinite(tdpo_ext, *excluded_word(vocabulary, dtype, below=10.0))


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_also_where_the_mass_of_the_reference_underflows(backend, dtype, vocabulary):
    """q = e^-300 is 0 in float32, and yet not 0: its logit is finite."""
    below = UNDERFLOWS.get(dtype, 300.0)
    check_kl_is_infinite(tdpo_ext, *excluded_word(vocabulary, dtype, below))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_also_in_the_reference(dtype):
    arguments = excluded_word(5, dtype, UNDERFLOWS.get(dtype, 300.0))
    check_kl_is_infinite(tdpo_ext.reference, *arguments)


@pytest.mark.parametrize("vocabulary", [5, 130, 5000])
@pytest.mark.parametrize("position", ["first", "last", "label"])
@pytest.mark.parametrize("which", ["policy", "reference"])
def test_nan_in_a_kept_row_shows_in_it_and_nowhere_else(backend, which, position, vocabulary):
    policy, reference = pair_of_logits(3, vocabulary)
    labels = labels_for(policy)
    at = {"first": 0, "last": vocabulary - 1, "label": int(labels[1])}[position]
    (policy if which == "policy" else reference)[1, at] = math.nan
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels)
    by_logps, by_kl = (
        torch.autograd.grad(values.sum(), policy, retain_graph=True)[0]
        for values in (stats.policy_logps, stats.forward_kl)
    )
    poisoned = [False, True, False]
    clean = [False, False, False]
    from_policy = poisoned if which == "policy" else clean
    assert stats.forward_kl.isnan().tolist() == poisoned
    assert stats.policy_logps.isnan().tolist() == from_policy
    assert stats.reference_logps.isnan().tolist() == (clean if which == "policy" else poisoned)
    assert by_kl.isnan().any(-1).tolist() == poisoned
    # log p(y) does not depend on the reference, which is not even read then.
    assert by_logps.isnan().any(-1).tolist() == from_policy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_finite_logits_give_no_nan(backend, dtype):
    """Each side is certain of another word, and the difference of their logits overflows."""
    largest = torch.finfo(dtype).max
    policy, reference = torch.zeros(2, 1, 40, dtype=dtype)
    policy[0, 0] = reference[0, 20] = largest
    for label in (1, 10, 30):  # alone with the policy's word, and not
        stats = tdpo_ext.token_stats(policy, reference, torch.tensor([label]))
        logps = torch.tensor([-largest], dtype=stats.policy_logps.dtype)
        assert torch.equal(stats.policy_logps, logps)
        assert torch.equal(stats.reference_logps, logps)
        # That is the divergence too. In float32 and float64 sums this large may overflow to inf.
        assert stats.forward_kl > 0.9 * largest


def test_in_plain_pytorch_a_label_outside_the_vocabulary_gives_nan():
    """As on a card, where no host looks at the labels: in what is saved for backward as well."""
    policy, reference = pair_of_logits(4, 40)
    outputs = fallback.forward(policy, reference, torch.tensor([0, 40, -1, -100]), -100)
    for values in outputs:
        assert values.view(4, -1).isnan().all(-1).tolist() == [False, True, True, False]
        assert not values[[0, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label", [0, 1, 4])
def test_a_mask_of_the_lowest_number_on_the_first_word(backend, dtype, label):
    """All there is before label 1: gaps of the words behind must not be taken from there."""
    lowest = torch.finfo(dtype).min
    policy = torch.tensor([[lowest, 0, 0, 0, 0]], dtype=dtype)
    stats = tdpo_ext.token_stats(policy, torch.zeros_like(policy), torch.tensor([label]))
    assert stats.forward_kl.item() == pytest.approx(-lowest / 5 + math.log(0.8), rel=1e-6)


MASKED = {
    "the last": lambda count: slice(count - 1, count),
    "half of the first": lambda count: slice(0, count // 2, 2),
    "the first half": lambda count: slice(2, count // 2),
    "the last half": lambda count: slice(count // 2, count),
    "all but three": lambda count: slice(3, count),
    "all but the last three": lambda count: slice(2, count - 3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 5000, 128256])
@pytest.mark.parametrize("words", MASKED)
def test_masks_of_the_lowest_number_on_words_of_the_reference(backend, dtype, vocabulary, words):
    """The policy masks them, the reference does not: KL = q(masked) times that number, whatever
    the largest of their weights is, and however many there are."""
    lowest = torch.finfo(dtype).min
    policy, reference = pair_of_logits(1, vocabulary, scale=0.5, gap=0.0, dtype=dtype)
    masked = MASKED[words](vocabulary)
    reference[0, masked.stop - 1] += 3.0  # above all that came before
    policy[0, masked] = lowest
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([1]))
    share = reference.double().softmax(-1)[0, masked].sum().item()
    truth = -lowest * share  # all of it but for a few nats, which matter beside float16's lowest
    if dtype == torch.float16:
        truth = oracle.forward_kl(numpy64(policy)[0], numpy64(reference)[0])
    rel = 1e-12 if dtype == torch.float64 else 5e-6
    assert stats.forward_kl.item() == pytest.approx(truth, rel=rel)
    assert stats.policy_logps.isfinite().all()


@pytest.mark.parametrize("lowest", [-1e4, -1e10, -1e30, -1e37])
def test_a_huge_gap_of_a_word_with_next_to_no_mass(backend, lowest):
    """The first words make a centre that the last word, with all of the mass, moves by 44 nats."""
    policy = torch.tensor([[80.0, lowest, 28.0, 35.7, 20.8, 34.2, 22.0, 70.25]])
    reference = torch.tensor([[-39.9, -9.9, 28.0, 35.7, 20.8, 34.2, 22.0, 70.25]])
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([6]))
    truth = oracle.forward_kl(numpy64(policy)[0], numpy64(reference)[0])
    assert stats.forward_kl.item() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("logit", [-60.0, -69.0, -75.0])
@pytest.mark.parametrize("masked", ["policy", "reference"])
def test_the_lowest_number_on_a_word_that_has_hardly_any_mass(backend, masked, logit):
    """Its mass is a normal number in float32, and times its gap more than everything else."""
    policy, reference = torch.zeros(2, 1, 8)
    lowest, other = (policy, reference) if masked == "policy" else (reference, policy)
    lowest[0, 3], other[0, 3] = torch.finfo(torch.float32).min, logit
    found = tdpo_ext.token_divergences(policy, reference)
    kl = found.forward_kl if masked == "policy" else found.reverse_kl
    truth = oracle.forward_kl(numpy64(lowest)[0], numpy64(other)[0])
    assert kl.item() == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize(
    ("policy", "reference", "kl"),
    [
        ([-math.inf, 0, 0], [1000, 0, 0], "reverse_kl"),
        ([1000, 0, 0], [-math.inf, 0, 0], "forward_kl"),
        ([0, -math.inf, -math.inf], [-1000, 0, 0], "reverse_kl"),
        ([-1000, 0, 0], [0, -math.inf, -math.inf], "forward_kl"),
    ],
)
@pytest.mark.parametrize("label", [0, 1])
def test_one_side_excludes_what_has_all_the_mass_of_the_other(
    backend, policy, reference, kl, label
):
    """The divergence in the direction that does not need the excluded words is finite."""
    policy, reference = torch.tensor([policy], dtype=torch.float32), torch.tensor([reference])
    policy.requires_grad_()
    reference = reference.to(torch.float32)
    found = tdpo_ext.token_divergences(
        policy, reference, torch.tensor([label]), outputs=("forward_kl", "reverse_kl")
    )
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    for name in ("forward_kl", "reverse_kl"):
        wanted = getattr(truth, name).item()
        assert math.isfinite(wanted) == (name == kl)
        assert getattr(found, name).item() == pytest.approx(wanted, rel=1e-6)
    (gradient,) = torch.autograd.grad(getattr(found, kl).sum(), policy)
    assert gradient.isfinite().all()


ALL_OF_A_ROW = ("policy_logps", "reference_logps", "forward_kl", "reverse_kl", "policy_entropy")


def check_as_the_reference(policy, reference, label):
    """NaN, infinities and numbers, where tdpo_ext.reference has them."""
    labels = torch.tensor([label])
    ours, wanted = (
        module.token_divergences(policy, reference, labels, outputs=ALL_OF_A_ROW)
        for module in (tdpo_ext, tdpo_ext.reference)
    )
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for name in ALL_OF_A_ROW:
        value = getattr(wanted, name)
        torch.testing.assert_close(getattr(ours, name), value, equal_nan=True)
        if name in stats._fields:
            torch.testing.assert_close(getattr(stats, name), value, equal_nan=True)


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("at", [0, 2, -1])
@pytest.mark.parametrize("which", ["policy", "reference"])
def test_an_infinite_logit_gives_nan(backend, which, at, vocabulary):
    """At the label too, where log p(y) = 0 would hide that the logits have overflowed."""
    for label in (2, vocabulary - 1):
        policy, reference = pair_of_logits(1, vocabulary)
        (policy if which == "policy" else reference)[0, at] = math.inf
        check_as_the_reference(policy, reference, label)


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("which", ["policy", "reference"])
def test_nan_beside_an_excluded_word_gives_nan(backend, which, order, vocabulary):
    for label in (0, vocabulary - 1):  # the second is the label in one of the two orders
        both = pair_of_logits(1, vocabulary)
        side = both[0] if which == "policy" else both[1]
        side[0, [1, vocabulary - 2][::order]] = torch.tensor([math.nan, -math.inf])
        check_as_the_reference(*both, label)
        side[0, label] = -math.inf
        check_as_the_reference(*both, label)


@pytest.mark.parametrize("vocabulary", [5, 3000])
@pytest.mark.parametrize("which", ["policy", "reference"])
def test_a_row_of_excluded_words_alone_gives_nan(backend, which, vocabulary):
    both = pair_of_logits(1, vocabulary)
    (both[0] if which == "policy" else both[1])[:] = -math.inf
    check_as_the_reference(*both, 2)


@pytest.mark.parametrize("row", [0, 1])
def test_a_huge_gap_of_one_word_counts_as_what_it_is(backend, row):
    """Whether its row begins at an aligned address or not."""
    policy, reference = torch.zeros(2, 2, 127)
    policy[row, 0] = 2e34
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([12, 12]))
    assert stats.forward_kl[row].item() == pytest.approx(2e34 * 126 / 127, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_nan_of_any_bits_stays_nan(backend, dtype):
    """Rounded as a number, the one with all bits would become 0."""
    policy, reference = pair_of_logits(2, 70, dtype=dtype)
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels_for(policy))
    width = torch.int64 if dtype == torch.float64 else torch.int32
    nan = torch.full((2,), torch.iinfo(width).max, dtype=width).view(stats.forward_kl.dtype)
    (gradient,) = torch.autograd.grad(stats.policy_logps, policy, nan)
    assert gradient.isnan().all()
