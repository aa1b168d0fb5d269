"""Strange shapes, strange strides, strange numbers."""

from __future__ import annotations

import math

import pytest
import torch
from backends import EMULATED
from inputs import DTYPES, labels_for, pair_of_logits

import tdpo_ext


def stats_and_gradient(policy, reference, labels, **options):
    policy = policy.detach().requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels, **options)
    weights = torch.linspace(-1, 1, labels.numel(), dtype=stats.policy_logps.dtype)
    weights = weights.reshape(labels.shape)
    total = (stats.policy_logps * weights).sum() + (stats.forward_kl * weights.cos()).sum()
    (gradient,) = torch.autograd.grad(total, policy)
    return stats, gradient


def assert_same_sums(backend, ours, wanted):
    """On a card the order of sums follows the rows' alignment in memory, so the last bits may."""
    if not backend.startswith("cuda"):
        assert_same_bits(ours, wanted)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def assert_same_bits(ours, wanted):
    for a, b in zip(ours, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(37,), (5, 37), (2, 3, 37), (2, 3, 2, 37), (2, 1, 2, 1, 3, 2, 2, 37)]
)
def test_any_number_of_leading_dimensions(backend, shape, dtype):
    policy, reference = pair_of_logits(*shape, dtype=dtype)
    labels = labels_for(policy)
    stats, gradient = stats_and_gradient(policy, reference, labels)
    assert gradient.shape == policy.shape
    rows = labels.numel()
    flat = tdpo_ext.token_stats(
        policy.reshape(rows, 37), reference.reshape(rows, 37), labels.reshape(rows)
    )
    assert_same_sums(backend, stats, [value.reshape(labels.shape) for value in flat])


STRIDED = {
    "slice of tokens": lambda x: x[:, :-1],
    "slice of sequences": lambda x: x[::2],
    "transposed": lambda x: x.transpose(0, 1),
    "part of the vocabulary": lambda x: x[..., 3:40],
    "misaligned": lambda x: x.flatten()[1 : 1 + 6 * 5 * 40].view(6, 5, 40),
    "sliced and transposed": lambda x: x[1:5, ::2, 1:38].transpose(0, 1),
    "five dimensions": lambda x: x[:4].view(2, 2, 5, 43)[:, :, :, None].transpose(0, 2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_strides_change_nothing(backend, view, dtype):
    policy, reference = (STRIDED[view](x) for x in pair_of_logits(6, 5, 43, dtype=dtype))
    labels = labels_for(policy, 0.2)
    strided = stats_and_gradient(policy, reference, labels)
    wanted = stats_and_gradient(policy.contiguous(), reference.contiguous(), labels)
    assert_same_sums(backend, (*strided[0], strided[1]), (*wanted[0], wanted[1]))


@pytest.mark.parametrize("elements", [1, 90])
def test_plain_pytorch_takes_rows_a_block_at_a_time(monkeypatch, elements):
    """One at least, and in the last block what is left; real blocks are larger than tests."""
    monkeypatch.setattr("tdpo_ext.token_statistics.kernels.core", None)
    policy, reference = pair_of_logits(7, 40)
    labels = labels_for(policy, 0.2)
    wanted = stats_and_gradient(policy, reference, labels)
    monkeypatch.setattr("tdpo_ext.token_statistics.fallback._BLOCK_ELEMENTS", elements)
    ours = stats_and_gradient(policy, reference, labels)
    assert_same_bits((*ours[0], ours[1]), (*wanted[0], wanted[1]))


def test_a_reference_that_all_rows_share(backend):
    policy, reference = pair_of_logits(6, 5, 43)
    shared = reference[:1, :1].expand(6, 5, 43)
    labels = labels_for(policy)
    ours, wanted = (stats_and_gradient(policy, x, labels) for x in (shared, shared.contiguous()))
    assert_same_sums(backend, (*ours[0], ours[1]), (*wanted[0], wanted[1]))


def test_as_many_leading_dimensions_as_the_kernels_count(backend):
    """Four that no stride merges; one of size 1 is none."""
    policy, reference = (x[:2, :2, :1, :2, :2] for x in pair_of_logits(3, 3, 3, 3, 3, 7))
    labels = labels_for(policy, 0.2)
    ours, gradient = stats_and_gradient(policy, reference, labels)
    wanted = stats_and_gradient(policy.contiguous(), reference.contiguous(), labels)
    assert_same_sums(backend, (*ours, gradient), (*wanted[0], wanted[1]))


def test_more_leading_dimensions_than_strides_can_merge(compiled):
    logits = torch.randn(3, 3, 3, 3, 3, 7)[:2, :2, :2, :2, :2]
    with pytest.raises(ValueError, match=r"leading dimensions.*contiguous"):
        tdpo_ext.token_stats(logits, logits, torch.zeros(2, 2, 2, 2, 2, dtype=torch.int64))


def test_rows_more_than_two_to_the_31_elements_apart(compiled):
    """The memory between the rows is asked for and never touched."""
    apart = 2**31 + 7
    far = torch.empty(apart + 40, dtype=torch.bfloat16).as_strided((2, 40), (apart, 1))
    policy, reference = pair_of_logits(2, 40, dtype=torch.bfloat16)
    far.copy_(policy)
    labels = labels_for(policy)
    wanted, gradient = stats_and_gradient(policy, reference, labels)
    stats, in_place = stats_and_gradient(far, reference, labels, inplace_backward=True)
    assert_same_sums(compiled, (*stats, in_place, far), (*wanted, gradient, gradient))


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_no_rows(backend, shape):
    policy, reference = torch.zeros(2, *shape)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    stats, gradient = stats_and_gradient(policy, reference, labels)
    assert all(values.shape == shape[:-1] for values in stats)
    assert gradient.shape == shape


def test_a_vocabulary_of_one(backend):
    policy, reference = pair_of_logits(5, 1, scale=30)
    stats, gradient = stats_and_gradient(policy, reference, torch.zeros(5, dtype=torch.int64))
    assert not any(values.any() for values in (*stats, gradient))


def test_a_vocabulary_of_one_may_have_any_stride(backend):
    policy, reference = (x.T[:, :1] for x in pair_of_logits(3, 5))
    stats, gradient = stats_and_gradient(policy, reference, torch.zeros(5, dtype=torch.int64))
    assert not any(values.any() for values in (*stats, gradient))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_never_read(backend, dtype, poison):
    policy, reference = pair_of_logits(3, 8, 130, dtype=dtype)
    labels = labels_for(policy, 0.5)
    clean = stats_and_gradient(policy, reference, labels)
    policy[labels == -100] = poison
    reference[labels == -100] = poison
    dirty = stats_and_gradient(policy, reference, labels)
    assert_same_bits((*dirty[0], dirty[1]), (*clean[0], clean[1]))
    assert not dirty[1][labels == -100].any()
    assert not any(values[labels == -100].any() for values in dirty[0])


def test_all_rows_ignored(backend):
    policy, reference = torch.full((2, 4, 9, 50), math.nan)
    labels = torch.full((4, 9), -100)
    stats, gradient = stats_and_gradient(policy, reference, labels)
    assert not any(values.any() for values in (*stats, gradient))


@pytest.mark.parametrize("which", ["policy", "reference"])
@pytest.mark.parametrize("position", [0, 70, 129])
def test_nan_in_a_kept_row_stays_in_its_row(backend, which, position):
    policy, reference = pair_of_logits(4, 130)
    labels = labels_for(policy)
    clean = stats_and_gradient(policy, reference, labels)
    (policy if which == "policy" else reference)[2, position] = math.nan
    dirty = stats_and_gradient(policy, reference, labels)
    assert dirty[0].forward_kl[2].isnan()
    rest = torch.tensor([0, 1, 3])
    assert_same_bits(
        [x[rest] for x in (*dirty[0], dirty[1])], [x[rest] for x in (*clean[0], clean[1])]
    )


@pytest.mark.parametrize("gap", [50.0, 103.0, 104.0, 110.0, 200.0, 5000.0])
@pytest.mark.parametrize("vocabulary", [3, 40, 4099])
def test_wide_gaps_stay_finite(backend, vocabulary, gap):
    """The paper's script gives NaN from 104 on."""
    policy, reference = pair_of_logits(4, vocabulary, scale=1.0)
    labels = torch.tensor([0, 1, 2, 0])
    reference[0, 1:] -= gap
    policy[1, :-1] -= gap
    reference[2, 0] += gap
    policy[2, 1] += gap
    policy[3] += gap
    stats, gradient = stats_and_gradient(policy, reference, labels)
    assert all(values.isfinite().all() for values in (*stats, gradient))
    truth = tdpo_ext.reference.token_stats(policy.double(), reference.double(), labels)
    for ours, wanted in zip(stats, truth, strict=True):
        torch.testing.assert_close(
            ours, wanted.float(), rtol=2e-6, atol=1e-4 if gap == 5000 else 2e-6
        )


@pytest.mark.parametrize("vocabulary", [5, 3000])
def test_masked_vocabulary(backend, vocabulary):
    """-inf logits are legal: 0 log 0 is 0, and p = 0 < q makes the KL infinite."""
    policy, reference = pair_of_logits(3, vocabulary)
    labels = torch.tensor([0, 0, 0])
    policy[0, 3:] = reference[0, 3:] = -math.inf
    reference[1, 2:] = -math.inf
    policy[2, 1:3] = -math.inf
    stats, gradient = stats_and_gradient(policy, reference, labels)
    small = tdpo_ext.token_stats(policy[:1, :3], reference[:1, :3], labels[:1])
    torch.testing.assert_close(stats.forward_kl[0], small.forward_kl[0])
    log_p, log_q = policy[1].double().log_softmax(-1), reference[1].double().log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p))[:2].sum()
    assert stats.forward_kl[1].item() == pytest.approx(kl.item(), rel=1e-6)
    assert stats.forward_kl[2] == math.inf
    assert not stats.policy_logps.isnan().any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("vocabulary", [5, 3000])
def test_masked_words_beside_close_ones(backend, vocabulary):
    """Both mask a word; the reference alone masks one of which the policy has little."""
    policy, reference = pair_of_logits(2, vocabulary, gap=0.01)
    policy[0, 1] = reference[:, 1] = -math.inf
    policy[1, 1] = -12.0
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([0, 0]))
    (gradient,) = torch.autograd.grad(stats.forward_kl.sum(), policy)
    p, q = (x.detach().double().softmax(-1) for x in (policy, reference))
    assert stats.forward_kl.max() < 0.5
    torch.testing.assert_close(gradient.double(), p - q, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("position", [0, 5, 2999])
def test_no_policy_mass_is_infinite_however_little_the_reference_has(backend, position):
    """q = e^-90 is no normal float32, and still not 0; where q = 0 the KL stays finite."""
    policy, reference = pair_of_logits(2, 3000)
    policy[:, position] = -math.inf
    reference[0, position] = reference[0].max() - 90
    reference[1, position] = -math.inf
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([1, 1]))
    assert stats.forward_kl[0] == math.inf
    assert stats.forward_kl[1].isfinite()


def test_policy_mass_where_the_reference_has_none_counts_when_small(backend):
    """The policy puts a little mass on words the reference excludes: KL = -log(1 - that mass)."""
    _, reference = pair_of_logits(2, 500)
    policy = reference.clone()
    reference[:, 100:103] = -math.inf
    policy[:, 100:103] = -8.0
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([0, 1]))
    mass = policy.double().softmax(-1)[:, 100:103].sum(-1)
    torch.testing.assert_close(stats.forward_kl, -torch.log1p(-mass).float(), rtol=2e-3, atol=0)


def test_logps_are_never_above_0_and_kl_never_below(backend):
    for gap in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2):
        policy, reference = pair_of_logits(300, 67, gap=gap, scale=8.0)
        stats = tdpo_ext.token_stats(policy, reference, policy.argmax(-1))
        assert stats.policy_logps.max() <= 0
        assert stats.reference_logps.max() <= 0
        assert stats.forward_kl.min() >= 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_inputs_same_bits(backend, dtype, two_threads):
    policy, reference = pair_of_logits(16, 5000, dtype=dtype)
    labels = labels_for(policy, 0.3)
    first = stats_and_gradient(policy, reference, labels)
    second = stats_and_gradient(policy, reference, labels)
    assert_same_bits((*first[0], first[1]), (*second[0], second[1]))


def test_int32_labels(backend):
    policy, reference = pair_of_logits(6, 40)
    labels = labels_for(policy, 0.3)
    assert_same_bits(
        tdpo_ext.token_stats(policy, reference, labels.int()),
        tdpo_ext.token_stats(policy, reference, labels),
    )


@pytest.mark.parametrize("vocabulary", [2, 37, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_reads_only_what_its_algebra_needs(compiled, dtype, vocabulary):
    """TDPO1 needs no policy, DPO no reference, a row without upstream gradient neither."""
    policy, reference = pair_of_logits(4, vocabulary, dtype=dtype)
    labels = labels_for(policy)
    logps, _, _, normalizers = torch.ops.tdpo_ext.token_stats(policy, reference, labels, -100)
    g_m = torch.randn_like(logps)
    g_k = g_m.clone()
    g_m[2:] = g_k[1:] = 0
    backward = torch.ops.tdpo_ext.token_stats_backward
    wanted = backward(policy, reference, labels, normalizers, g_m, g_k, -100)
    policy[[0, 2, 3]] = math.nan
    reference[1:] = math.nan
    got = backward(policy, reference, labels, normalizers, g_m, g_k, -100)
    assert wanted[:2].any(-1).all()
    assert not wanted[2:].any()
    assert torch.equal(got, wanted)


def test_opposite_upstream_gradients_are_no_special_case(backend):
    """-g_m p + g_k (p - q) with g_k = -g_m reads both."""
    policy, reference = pair_of_logits(3, 40, dtype=torch.float64)
    labels = labels_for(policy)
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels)
    (gradient,) = torch.autograd.grad((stats.policy_logps - stats.forward_kl).sum(), policy)
    p, q = policy.softmax(-1), reference.softmax(-1)
    onehot = torch.nn.functional.one_hot(labels, 40)
    torch.testing.assert_close(gradient, (onehot - p - (p - q)).detach())


def every_rounding(dtype):
    """float32 values at, just above and just below every tie between two neighbours of a dtype."""
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    bits = bits[bits.isfinite() & (bits.abs() < 1e38)]
    ties = (bits[1:].double() + bits[:-1].double()).div(2).float()
    ties = ties[ties > 1e-37]
    up, down = (torch.nextafter(ties, torch.tensor(x)) for x in (math.inf, 0.0))
    values = torch.cat((ties, up, down, torch.tensor([65519.0, 65520.0, 1e30, 3e38 / 4])))
    return torch.cat((values, -values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_round_to_nearest_even_everywhere(compiled, dtype):
    """Two equal logits: p = 1/2 exactly, so the gradient beside the label is -g_m / 2 exactly."""
    values = every_rounding(dtype)
    if compiled in EMULATED:  # emulated, a row takes a millisecond
        values = values[::7]  # an odd step: between even neighbours and odd ones
    logits = torch.zeros(len(values), 2, dtype=dtype, requires_grad=True)
    labels = torch.zeros(len(values), dtype=torch.int64)
    stats = tdpo_ext.token_stats(logits, logits.detach().clone(), labels)
    (gradient,) = torch.autograd.grad(stats.policy_logps, logits, -2 * values)
    assert torch.equal(gradient[:, 1], values.to(dtype))
    assert torch.equal(gradient[:, 0], (-values).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_width_logit_is_read_exactly(compiled, dtype):
    """log p = z - log(1 + e^z) of (z, 0), for every z that the dtype has."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = z[z.isfinite() & (z.abs() < 80)]
    policy = torch.stack((z, torch.zeros_like(z)), dim=1)
    labels = torch.zeros(len(z), dtype=torch.int64)
    stats = tdpo_ext.token_stats(policy, torch.zeros_like(policy), labels)
    wanted = -torch.nn.functional.softplus(-z.double())
    torch.testing.assert_close(stats.policy_logps.double(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("vocabulary", [4, 40, 5000])
@pytest.mark.parametrize(
    "fill", [-1e4, -1e9, -1e20, torch.finfo(torch.bfloat16).min, -3.4028234e38]
)
def test_masks_of_large_finite_numbers(backend, fill, vocabulary):
    """The policy masks what the reference likes best; both mask something; the reference masks."""
    _, reference = pair_of_logits(3, vocabulary, scale=0.1)
    policy = reference.clone()
    policy[0, reference[0].argmax()] = fill
    policy[1, 2:] = reference[1, 2:] = fill
    reference[2, 1] = fill
    labels = torch.tensor([1, 0, 0])
    policy.requires_grad_()
    stats = tdpo_ext.token_stats(policy, reference, labels)
    (gradient,) = torch.autograd.grad(stats.forward_kl.sum(), policy)
    truth = tdpo_ext.reference.token_stats(policy.detach().double(), reference.double(), labels)
    torch.testing.assert_close(stats.forward_kl.double(), truth.forward_kl, rtol=2e-6, atol=1e-7)
    p, q = (x.detach().double().softmax(-1) for x in (policy, reference))
    torch.testing.assert_close(gradient.double(), p - q, rtol=1e-5, atol=1e-7)


def test_no_tokens(backend):
    policy, reference = torch.zeros(2, 2, 0, 5)
    labels = torch.zeros(2, 0, dtype=torch.int64)
    assert tdpo_ext.tdpo_loss(policy, reference, labels).loss.item() == pytest.approx(math.log(2))
