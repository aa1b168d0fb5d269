"""What only the CUDA kernels have: vectors at every alignment, rows in parts, a base that moves."""

from __future__ import annotations

import math

import emulated
import oracle
import pytest
import torch
from backends import EMULATED
from inputs import DTYPES, labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import check_against_oracle, stats_and_gradient

import tdpo_ext
from tdpo_ext.checks import DIVERGENCES

PER_VECTOR = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8, torch.float64: 2}


def at_alignment(rows: torch.Tensor, entries: int) -> torch.Tensor:
    """The same numbers, each row starting this many entries after a multiple of 16 bytes."""
    count, vocabulary = rows.shape
    stride = -(-(vocabulary + entries) // 16) * 16
    # Nothing after the last row, so that the sanitizer sees what is read there.
    size = entries + (count - 1) * stride + vocabulary
    memory = torch.empty(size, dtype=rows.dtype, device=rows.device)
    moved = memory.as_strided((count, vocabulary), (stride, 1), entries)
    moved.copy_(rows)
    assert moved.data_ptr() % 16 == entries * memory.element_size() % 16
    return moved


def test_the_path_is_the_plain_one_where_there_is_no_card(cuda):
    """Inline PTX has a plain path beside it; on the CPU that is the one."""
    if cuda in EMULATED:
        assert emulated.library(EMULATED[cuda]).emulated_path() == b"plain"


@pytest.mark.parametrize("rounding", emulated.roundings())
def test_the_two_builds_round_as_they_say(rounding):
    assert emulated.library(rounding).emulated_rounding() == rounding.encode()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [40, 5000, 40001])
def test_the_order_in_which_warps_run_changes_no_bit(emulated_core, dtype, vocabulary):
    """Nor may it: what depends on it is a race."""
    policy, reference = pair_of_logits(9, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    results = []
    for backwards in (0, 1):
        emulated_core.run_warps_backwards(backwards)
        results.append(torch.ops.tdpo_ext.token_stats(policy, reference, labels, -100))
    emulated_core.run_warps_backwards(0)
    for forwards, backwards in zip(*results, strict=True):
        assert torch.equal(forwards, backwards)


@pytest.mark.parametrize("vocabulary", [5, 37, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_and_reference_at_any_two_alignments(cuda, dtype, vocabulary):
    policy, reference = pair_of_logits(4, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    count = PER_VECTOR[dtype]
    for of_policy in range(count):
        for of_reference in range(count):
            rows = at_alignment(policy, of_policy), at_alignment(reference, of_reference)
            check_against_oracle(*rows, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [101, 20011])  # of a warp, and of several blocks
def test_the_gradient_at_any_alignment(cuda, dtype, vocabulary):
    """In place: the gradient has the policy's alignment."""
    policy, reference = pair_of_logits(4, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    upstream = torch.randn(2, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _, wanted = stats_and_gradient(policy, reference, labels, *upstream)
    for entries in range(PER_VECTOR[dtype]):
        moved = at_alignment(policy, entries).requires_grad_()
        stats = tdpo_ext.token_stats(moved, reference, labels, inplace_backward=True)
        total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
        (gradient,) = torch.autograd.grad(total, moved)
        torch.testing.assert_close(gradient, wanted)
        assert gradient.data_ptr() == moved.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences_where_one_side_is_shifted(cuda, dtype):
    """Values against the oracle, and the gradient against that of rows that lie alike."""
    policy, reference = pair_of_logits(3, 5401, dtype=dtype)
    labels = labels_for(policy)
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    upstream = torch.randn(3, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[0, 0] = upstream[:2, 1] = 0  # so that rows differ in what they read
    gradients = []
    for of_policy, of_reference in [(0, 0), (0, 1), (1, PER_VECTOR[dtype] - 1)]:
        moved = at_alignment(policy, of_policy).requires_grad_()
        found = tdpo_ext.token_divergences(
            moved, at_alignment(reference, of_reference), labels, outputs=DIVERGENCES
        )
        for name in DIVERGENCES[2:]:
            assert relative_error(getattr(found, name), getattr(truth, name)) <= 2e-6, name
        outputs = found.forward_kl, found.reverse_kl, found.policy_entropy
        gradients.append(torch.autograd.grad(outputs, moved, [*upstream])[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_the_loss_of_packed_sequences(cuda):
    """All kernels of the loss in one small call, for the sanitizers."""
    policy, reference = pair_of_logits(11, 37)
    labels, bounds = labels_for(policy, 0.2), torch.tensor([0, 4, 5, 5, 11])
    results = []
    for function, dtype in (
        (tdpo_ext.tdpo_loss, torch.float32),
        (tdpo_ext.reference.tdpo_loss, torch.float64),
    ):
        leaf = policy.to(dtype).requires_grad_()
        output = function(leaf, reference.to(dtype), labels, cu_seqlens=bounds)
        results.append((output.losses, torch.autograd.grad(output.loss, leaf)[0]))
    for ours, wanted in zip(*results, strict=True):
        assert relative_error(ours, numpy64(wanted)) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [*range(1, 20), 31, 32, 33, 255, 256, 257])
def test_labels_at_every_place_of_a_row(cuda, dtype, vocabulary):
    rows = min(vocabulary, 40)
    policy, reference = pair_of_logits(rows, vocabulary, dtype=dtype)
    labels = torch.arange(vocabulary - rows, vocabulary)
    upstream = torch.ones(2, rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    stats, gradient = stats_and_gradient(policy, reference, labels, upstream[0], 0.5 * upstream[1])
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    for ours, wanted in zip(stats, truth, strict=True):
        assert relative_error(ours, wanted) <= 1e-6
    at_label = gradient.gather(1, labels.unsqueeze(1))
    assert (at_label >= 0).all() or vocabulary == 1


@pytest.mark.parametrize("vocabulary", [4097, 20011, 150001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_are_split_and_give_what_many_rows_give(cuda, dtype, vocabulary):
    policy, reference = pair_of_logits(2, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    one = [
        stats_and_gradient(p[None], r[None], y[None], torch.ones(1), torch.ones(1) / 2)
        for p, r, y in zip(policy, reference, labels, strict=True)
    ]
    both, gradient = stats_and_gradient(
        policy, reference, labels, torch.ones(2), torch.full((2,), 0.5)
    )
    for row in range(2):
        for ours, wanted in zip(one[row][0], both, strict=True):
            torch.testing.assert_close(ours[0], wanted[row], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(one[row][1][0], gradient[row], rtol=2e-2, atol=1e-6)


GROWING = 14


def growing_rows(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose largest entries come late, early, in steps, after nothing but -inf."""
    at = torch.linspace(0, 1, vocabulary, dtype=torch.float64)
    noise = torch.randn(2, GROWING, vocabulary, dtype=torch.float64)
    policy, reference = noise[0], noise[0] + 0.3 * noise[1]
    policy[0] += 300 * at
    reference[0] += 300 * at
    policy[1] += 300 * (1 - at)
    reference[1] += 300 * at  # far apart everywhere
    policy[2] += 40 * (at * 8).floor()
    reference[2] += 40 * (at * 8).floor()
    policy[3, : vocabulary // 2] = -math.inf
    reference[3, : vocabulary // 2] = -math.inf
    policy[4] -= 500
    reference[4] += 500
    policy[5] += 13 * (at > 0.9)  # within the headroom, or just above it
    reference[5] += 11 * (at > 0.9)
    for place in range(8):  # one high entry, at each place of a vector, and all far below 0
        row, entry = 6 + place, vocabulary // 2 + place
        policy[row, entry] += 20
        reference[row, entry] += 20
        policy[row] -= 60
        reference[row] -= 60
    return policy, reference


@pytest.mark.parametrize("vocabulary", [300, 5000, 40001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_base_follows_rows_that_grow(cuda, dtype, vocabulary):
    policy, reference = (x.to(dtype) for x in growing_rows(vocabulary))
    labels = torch.full((GROWING,), vocabulary - 2)
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for ours, wanted in zip(stats, truth, strict=True):
        for row in range(GROWING):
            # A shift by 1000 leaves float32 logits spacings of 3e-5.
            digits = 1e-12 if dtype == torch.float64 else 1e-4 if row in (0, 2, 4) else 5e-6
            assert ours[row].item() == pytest.approx(wanted[row], rel=digits, abs=digits), row


@pytest.mark.parametrize("gap", [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergences_whatever_the_gap_is(cuda, dtype, gap):
    """Row by row; entries take a polynomial or a difference, each as it needs."""
    policy, reference = pair_of_logits(5, 9001, gap=gap, dtype=dtype)
    labels = labels_for(policy)
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for row in range(5):
        assert stats.forward_kl[row].item() == pytest.approx(truth[2, row], rel=2e-6)


@pytest.mark.parametrize("error", [2.0**-22, -(2.0**-22)])
def test_the_error_of_exponentials_costs_close_rows_no_digits(emulated_core, error):
    """The centre comes from the first vectors and stays there, 0.1 nats beside most gaps; an
    error of all exponentials would then be one of every term of the reverse KL."""
    policy, reference = pair_of_logits(4, 7000, gap=3e-3)
    reference[:, :900] -= 8
    policy[:, :900] += 0.1 - 8
    truth = oracle.divergences(numpy64(policy), numpy64(reference))
    with emulated_core.ex2_off_by(error):
        found = tdpo_ext.token_divergences(policy, reference, outputs=("forward_kl", "reverse_kl"))
    assert numpy64(found.forward_kl) == pytest.approx(truth.forward_kl, rel=1e-3)
    assert numpy64(found.reverse_kl) == pytest.approx(truth.reverse_kl, rel=1e-3)


def test_one_far_entry_among_close_ones_costs_no_digits(cuda):
    policy, reference = pair_of_logits(3, 20000, gap=1e-3)
    policy[0, 700] += 1.5
    policy[1, reference[1].argmax()] += 3.0
    policy[2, reference[2].argmin()] -= 30.0
    labels = torch.tensor([1, 2, 3])
    truth = oracle.token_stats(numpy64(policy), numpy64(reference), labels.cpu().numpy())
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for row in range(3):
        assert stats.forward_kl[row].item() == pytest.approx(truth[2, row], rel=1e-4)


@pytest.mark.parametrize("vocabulary", [40, 5000, 30001])
@pytest.mark.parametrize("label", [-1, -101, -(2**40), 2**40, "vocabulary"])
def test_labels_outside_the_vocabulary_give_nan_and_read_nothing(cuda_unchecked, label, vocabulary):
    wrong = vocabulary if label == "vocabulary" else label
    policy, reference = pair_of_logits(3, vocabulary)
    labels = labels_for(policy)
    upstream = torch.randn(2, 3)
    clean, clean_gradient = stats_and_gradient(policy, reference, labels, *upstream)
    labels[1] = wrong
    stats, gradient = stats_and_gradient(policy, reference, labels, *upstream)
    for ours, wanted in zip(stats, clean, strict=True):
        assert ours.isnan().tolist() == [False, True, False]
        assert torch.equal(ours[[0, 2]], wanted[[0, 2]])
    assert gradient[1].isnan().all()
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])
