"""What must hold whatever the inputs: properties, on inputs that Hypothesis draws.

How many examples, and how to draw other ones: tests/support/strategies.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from backends import COMPILED, use_backend
from hypothesis import assume, given
from hypothesis import strategies as st
from inputs import numpy64
from strategies import SEEDS, WIDE_DTYPES, Rows, laid_out, layouts, rows
from torch import Tensor

import tdpo_ext
from tdpo_ext.token_statistics import kernels

pytestmark = pytest.mark.usefixtures("one_thread")

RTOL = {torch.float64: 1e-12}  # 2e-6 for the others, which accumulate in float32


def on_device(drawn: Rows, backend: str) -> Rows:
    return Rows(*(x.cuda() for x in drawn)) if backend == "cuda" else drawn


def shuffled(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator, device="cpu")


def results_of(drawn: Rows) -> list[Tensor]:
    """The three statistics and the gradient."""
    policy = drawn.policy.detach().requires_grad_()
    stats = tdpo_ext.token_stats(policy, drawn.reference, drawn.labels)
    outputs = (stats.policy_logps, stats.forward_kl)
    gradient = torch.autograd.grad(outputs, policy, tuple(drawn.upstream))
    return [*(x.detach() for x in stats), *gradient]


def assert_same_bits(ours: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        # As integers: NaN equals itself, and 0 is not -0.
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_sums(backend: str, ours: list[Tensor], wanted: list[Tensor], drawn: Rows) -> None:
    """On a card the order of sums follows the rows' alignment in memory, so the last bits may."""
    if backend.startswith("cuda"):
        # Infinite and undefined ones are compared by the tests of bits that stay.
        usable = [(x.isfinite() & y.isfinite()) for x, y in zip(ours, wanted, strict=True)]
        ours, wanted = (
            [x.masked_fill(~y, 0) for x, y in zip(z, usable, strict=True)] for z in (ours, wanted)
        )
        assert_close(ours, wanted, drawn)
    else:
        assert_same_bits(ours, wanted)


def assert_close(ours: list[Tensor], wanted: list[Tensor], drawn: Rows, loss: float = 1.0) -> None:
    """Up to rounding. Gradients are as uncertain as their dtype, and as the gap z - r is."""
    dtype = drawn.policy.dtype
    rtol = RTOL.get(dtype, 2e-6) * loss
    gap = (drawn.policy - drawn.reference).double().abs().nan_to_num(0, 0, 0)
    spread = 1 + (float(gap.max()) if gap.numel() else 0)
    for a, b in zip(ours[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * spread, equal_nan=True)
    size = drawn.upstream.abs().sum(0).unsqueeze(-1).double()
    stored = rtol * spread + torch.finfo(dtype).eps * (dtype in (torch.bfloat16, torch.float16))
    difference = (ours[3].double() - wanted[3].double()).abs()
    assert bool((difference <= stored * size + torch.finfo(dtype).tiny).all())


@pytest.fixture
def another_default_device():
    with torch.device("meta"):
        yield


@given(rows(extremes=True), layouts(), SEEDS)
def test_inputs_are_drawn_on_the_cpu(another_default_device, drawn, layout, seed):
    """The tests of a card run where the card is the default device; `on_device` moves them."""
    tensors = (*drawn, laid_out(drawn.policy, layout), shuffled(7, seed))
    assert {x.device.type for x in tensors} == {"cpu"}


# --- bits that stay -------------------------------------------------------------------------------


@given(rows(extremes=True))
def test_the_same_inputs_give_the_same_bits(backend, drawn):
    drawn = on_device(drawn, backend)
    assert_same_bits(results_of(drawn), results_of(drawn))


@given(rows(extremes=True), layouts(), layouts())
def test_strides_and_what_lies_between_rows_change_no_bit(on_host, drawn, a, b):
    moved = drawn._replace(policy=laid_out(drawn.policy, a), reference=laid_out(drawn.reference, b))
    assert_same_sums(on_host, results_of(moved), results_of(drawn), drawn)


@given(rows(extremes=True), SEEDS)
def test_the_order_of_rows_changes_no_bit(on_host, drawn, seed):
    count = drawn.labels.numel()
    order = shuffled(count, seed)
    turned = Rows(*(x[order] for x in drawn[:3]), drawn.upstream[:, order])
    wanted = [x[order] for x in results_of(drawn)]
    assert_same_sums(on_host, results_of(turned), wanted, turned)


@given(rows(extremes=True), st.integers(0, 6))
def test_splitting_the_rows_changes_no_bit(on_host, drawn, cut):
    parts = [
        Rows(*(x[part] for x in drawn[:3]), drawn.upstream[:, part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    both = [torch.cat(x) for x in zip(*(results_of(part) for part in parts), strict=True)]
    assert_same_sums(on_host, both, results_of(drawn), drawn)


@given(rows(extremes=True), st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e4]))
def test_what_stands_in_ignored_rows_changes_no_bit(backend, drawn, poison):
    ignored = (drawn.labels == -100).unsqueeze(-1)
    other = drawn._replace(
        policy=drawn.policy.masked_fill(ignored, poison),
        reference=drawn.reference.masked_fill(ignored, poison),
    )
    ours = results_of(on_device(other, backend))
    assert_same_bits(ours, results_of(on_device(drawn, backend)))
    assert not any(x.cpu()[drawn.labels == -100].any() for x in ours)


# --- what changes nothing but rounding ------------------------------------------------------------


@given(rows(), SEEDS)
def test_the_order_of_the_vocabulary_changes_nothing(backend, drawn, seed):
    vocabulary = drawn.policy.shape[1]
    order = shuffled(vocabulary, seed)
    ignored = drawn.labels == -100
    places = order.argsort()[drawn.labels.masked_fill(ignored, 0)]
    turned = drawn._replace(
        policy=drawn.policy[:, order],
        reference=drawn.reference[:, order],
        labels=places.masked_fill(ignored, -100),
    )
    wanted = results_of(on_device(drawn, backend))
    wanted[3] = wanted[3][:, order.to(wanted[3].device)]
    assert_close(results_of(on_device(turned, backend)), wanted, on_device(drawn, backend))


@given(rows(WIDE_DTYPES), st.integers(-64, 64), st.integers(-64, 64))
def test_a_constant_added_to_all_logits_changes_nothing(backend, drawn, a, b):
    # In steps of 2^-8 below 2^8 the sums are exact.
    policy, reference = ((x.clamp(-128, 128) * 256).round() / 256 for x in drawn[:2])
    drawn = on_device(drawn._replace(policy=policy, reference=reference), backend)
    moved = drawn._replace(policy=drawn.policy + a, reference=drawn.reference + b)
    wanted = results_of(drawn)
    # z - r has lost the digits that the constants took.
    loss = 1 + abs(a - b)
    assert_close(results_of(moved), wanted, drawn, loss)


@pytest.mark.skipif(not COMPILED, reason="the extension is not built")
@given(rows(WIDE_DTYPES, least_rows=1), st.lists(st.integers(0, 2049), max_size=4))
def test_splitting_the_vocabulary_changes_nothing(compiled, drawn, cuts):
    policy, reference, labels, _ = on_device(drawn, compiled)
    vocabulary = policy.shape[1]
    whole = kernels.token_stats(policy, reference, labels, -100)
    bounds = sorted({0, vocabulary, *(cut % (vocabulary + 1) for cut in cuts)})
    records = kernels.empty_records(labels.numel(), policy)
    for start, end in itertools.pairwise(bounds):
        tile = policy[:, start:end], reference[:, start:end]
        kernels.add_tile(records, *tile, labels - start)
    parts = kernels.finish(records[None], labels, vocabulary, -100)
    no_gradient = torch.zeros(policy.shape, device="cpu")
    ours, wanted = ([*(x.cpu() for x in outputs[:3]), no_gradient] for outputs in (parts, whole))
    assert_close(ours, wanted, drawn)


@given(rows(WIDE_DTYPES), st.integers(1, 400_000), st.integers(1, 400_000), SEEDS)
def test_the_chunk_size_changes_nothing(backend, drawn, a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    count, vocabulary = drawn.policy.shape
    dtype = drawn.policy.dtype
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")
        for shape in ((count, 7), (vocabulary, 7), (vocabulary,))
    )
    given_ = [hidden, weight, hidden * 1.1, weight, drawn.labels]
    if backend == "cuda":
        given_, bias, drawn = [x.cuda() for x in given_], bias.cuda(), on_device(drawn, backend)
    results = []
    for chunk_bytes in (a, b, None):
        leaves = [x.detach().requires_grad_() for x in (*given_[:2], bias)]
        stats = tdpo_ext.linear_token_stats(
            *leaves[:2], *given_[2:], policy_bias=leaves[2], chunk_bytes=chunk_bytes
        )
        outputs = (stats.policy_logps, stats.forward_kl)
        results.append([*stats, *torch.autograd.grad(outputs, leaves, tuple(drawn.upstream))])
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- what the numbers mean ------------------------------------------------------------------------


@given(rows(extremes=True))
def test_divergences_are_never_below_0_and_log_probabilities_never_above(backend, drawn):
    # Where a side excludes every word there is no distribution.
    assume(has_mass(drawn))
    policy_logps, reference_logps, kl, gradient = results_of(on_device(drawn, backend))
    assert not bool((kl < 0).any())
    assert not bool((policy_logps > 0).any())
    assert not bool((reference_logps > 0).any())
    # Where the policy excludes a word that the reference has, the KL is infinite; NaN never.
    assert not any(bool(x.isnan().any()) for x in (policy_logps, reference_logps, kl, gradient))


@given(rows(least_vocabulary=2))
def test_rows_of_the_gradient_sum_to_0(backend, drawn):
    drawn = on_device(drawn, backend)
    gradient = results_of(drawn)[3].double()
    eps = torch.finfo(drawn.policy.dtype).eps
    eps = max(eps, 1e-6) if drawn.policy.dtype != torch.float64 else 1e-12
    allowed = eps * (gradient.abs().sum(1) + 20 * drawn.upstream.double().abs().sum(0))
    assert bool((gradient.sum(1).abs() <= allowed + 1e-6 * drawn.policy.shape[1]).all())


@given(rows(st.just(torch.float64), least_rows=1), SEEDS)
def test_the_gradient_is_the_derivative(backend, drawn, seed):
    """In a random direction, by a central difference."""
    drawn = on_device(drawn, backend)
    assume(bool((drawn.policy - drawn.reference).abs().max() < 30))
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(
        drawn.policy.shape, generator=generator, dtype=torch.float64, device="cpu"
    )
    direction = direction.to(drawn.policy.device)

    def value(policy: Tensor) -> Tensor:
        stats = tdpo_ext.token_stats(policy, drawn.reference, drawn.labels)
        return (torch.stack((stats.policy_logps, stats.forward_kl)) * drawn.upstream).sum()

    step = 1e-4
    ahead, back = (value(drawn.policy + sign * step * direction) for sign in (1, -1))
    slope = (ahead - back) / (2 * step)
    ours = (results_of(drawn)[3] * direction).sum()
    size = 1 + drawn.upstream.abs().sum() * direction.abs().max() ** 3
    assert abs(float(ours - slope)) <= 1e-6 * float(size)


def has_mass(drawn: Rows) -> bool:
    """Whether some word is possible in each row, on both sides: else there are no distributions."""
    return all(bool((x > -torch.inf).any(1).all()) for x in drawn[:2])


@given(rows(extremes=True))
def test_the_statistics_are_the_oracles_also_at_the_limits_of_a_dtype(backend, drawn):
    assume(has_mass(drawn))
    arrays = numpy64(drawn.policy), numpy64(drawn.reference), drawn.labels.numpy()
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        wanted = oracle.token_stats(*arrays)
    stats = results_of(on_device(drawn, backend))[:3]
    rtol = RTOL.get(stats[0].dtype, 2e-6)
    gap = np.abs(np.nan_to_num(arrays[0] - arrays[1], posinf=0, neginf=0))[arrays[2] != -100]
    # An error of z - r counts as far as q does: at most as the largest gap.
    atol = rtol * (1 + (gap.max() if gap.size else 0))
    for ours, truth in zip(stats, wanted, strict=True):
        np.testing.assert_allclose(numpy64(ours), truth, rtol=rtol, atol=atol)


@given(rows(extremes=True))
def test_all_backends_agree(drawn):
    """Those that take tensors in host memory; a card is compared in test_cuda_device.py."""
    results = {}
    for name in (*(x for x in COMPILED if x != "cuda"), "fallback"):
        with pytest.MonkeyPatch.context() as patch, use_backend(patch, name):
            results[name] = results_of(drawn)
    assume(has_mass(drawn))
    plain = results.pop("fallback")
    infinite = plain[2].isinf().unsqueeze(-1)  # an infinite divergence has no gradient
    wanted = [*plain[:3], plain[3].masked_fill(infinite, 0)]
    for ours in results.values():
        assert_close([*ours[:3], ours[3].masked_fill(infinite, 0)], wanted, drawn)
