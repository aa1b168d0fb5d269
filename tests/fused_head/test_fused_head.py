"""The fused head against the float64 oracle, which starts from the hidden states."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from head_checks import (
    METHODS,
    OPTIONS,
    arguments_of,
    bound_of,
    check_ignored_tokens,
    loss_and_gradients,
    oracle_heads,
    requiring_grad,
)
from inputs import DTYPES, labels_for, numpy64, relative_error
from torch import Tensor

import tdpo_ext
from tdpo_ext.fused_head import products

CHUNKS = [1, 20_000, 150_000, 10**9]  # a token and 64 words at a time, some, more, everything


def check_stats(given, labels, upstream, ignored=-100):
    given, leaves = requiring_grad(given)
    stats = tdpo_ext.linear_token_stats(**given, labels=labels)
    total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
    gradients = torch.autograd.grad(total, leaves)
    dtype = given["policy_hidden"].dtype
    policy, reference = oracle_heads(given)
    logits = policy.logits(), reference.logits()
    flat = labels.reshape(-1).cpu().numpy()
    wanted = oracle.token_stats(*logits, flat)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    for ours, theirs in zip(stats, wanted, strict=True):
        assert ours.shape == labels.shape
        assert relative_error(ours.reshape(-1), theirs) <= bound
    by_logits = oracle.token_stats_gradient(
        *logits, flat, *(numpy64(x).reshape(-1) for x in upstream)
    )
    for leaf, ours, theirs in zip(leaves, gradients, policy.gradients(by_logits), strict=False):
        assert ours.dtype == leaf.dtype
        assert relative_error(ours.reshape(theirs.shape), theirs) <= bound_of(dtype)
    return stats, gradients


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_any_upstream_gradients(backend, dtype, options):
    for chunk_bytes in CHUNKS:
        given = arguments_of(11, dtype=dtype, chunk_bytes=chunk_bytes, **OPTIONS[options])
        labels = torch.randint(0, 131, (11,))
        labels[3] = -100
        upstream = torch.randn(2, 11, dtype=products.accumulation_dtype(dtype))
        upstream[1, 4:6] = 0  # no reference is needed
        upstream[1, 6:8] = upstream[0, 6:8]  # nor the policy
        upstream[:, 8] = 0  # nor anything
        check_stats(given, labels, upstream)


@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 64, 65, 300])
def test_vocabularies_and_ignored_tokens(backend, vocabulary, ignored):
    for chunk_bytes in CHUNKS:
        given = arguments_of(3, 4, vocabulary=vocabulary, chunk_bytes=chunk_bytes)
        labels = torch.randint(0, vocabulary, (3, 4))
        labels = labels.masked_fill(torch.rand(3, 4) < ignored, -100)
        stats, gradients = check_stats(given, labels, torch.randn(2, 3, 4))
        assert not any(values[labels == -100].any() for values in stats)
        assert not gradients[0][labels == -100].any()


WAYS = {
    "recompute": {"chunk_bytes": 20_000},
    "direction": {"frozen": True},
    "direction, token by token": {"frozen": True, "chunk_bytes": 1},
    "a pair at a time": {"chunk_bytes": 15_000},
    "two pairs of three at a time": {"chunk_bytes": 25_000},
    "all pairs": {},
}


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("options", ["plain", "all, each its own"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_the_loss(backend, variant, alpha, way, options, average):
    chosen = dict(WAYS[way])
    frozen, chunk_bytes = chosen.pop("frozen", False), chosen.pop("chunk_bytes", None)
    given = arguments_of(6, 5, chunk_bytes=chunk_bytes, **OPTIONS[options])
    given, leaves = requiring_grad(given, frozen)
    labels = labels_for(torch.empty(6, 5, 131), 0.3)
    labels[1] = -100  # a response without a kept token
    loss_options = {
        "beta": 0.2,
        "alpha": alpha,
        "variant": variant,
        "label_smoothing": 0.1,
        "average_log_prob": average,
    }
    reduction = "none" if way == "recompute" else "mean"
    weights = torch.randn(3) if reduction == "none" else torch.full((3,), 1 / 3)
    output, gradients = loss_and_gradients(
        given,
        leaves,
        shift_labels=labels,
        reduction=reduction,
        weights=weights if reduction == "none" else None,
        **loss_options,
    )
    policy, reference = oracle_heads(given)
    truth = oracle.tdpo_loss(
        policy.logits().reshape(6, 5, 131),
        reference.logits().reshape(6, 5, 131),
        labels.cpu().numpy(),
        weights=numpy64(weights),
        **loss_options,
    )
    assert relative_error(output.losses, truth.losses) <= 1e-6
    if reduction == "mean":
        assert output.loss.item() == pytest.approx(truth.losses.mean(), rel=1e-6)
    wanted = policy.gradients(truth.gradient.reshape(30, 131))
    for ours, theirs in zip(gradients, wanted, strict=False):
        assert relative_error(ours.reshape(theirs.shape), theirs) <= 2e-6
    assert output.chosen_kl[1] == 0
    assert not gradients[0][1].any()


@pytest.mark.parametrize("way", WAYS)
def test_reductions(backend, way):
    options = {"chunk_bytes": WAYS[way].get("chunk_bytes")}
    given, leaves = requiring_grad(arguments_of(6, 5), WAYS[way].get("frozen", False))
    options["labels"] = labels_for(torch.empty(6, 5, 131), 0.2)
    none = loss_and_gradients(given, leaves, reduction="none", weights=torch.ones(3), **options)
    total = loss_and_gradients(given, leaves, reduction="sum", **options)
    mean = loss_and_gradients(given, leaves, **options)
    torch.testing.assert_close(total[0].loss, none[0].loss.sum())
    torch.testing.assert_close(mean[0].loss, none[0].loss.mean())
    for one, of_sum, of_mean in zip(none[1], total[1], mean[1], strict=True):
        torch.testing.assert_close(of_sum, one, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(3 * of_mean, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_the_ways_agree_in_float64(backend, variant):
    """Also where alpha is no float32."""
    given = arguments_of(4, 5, dtype=torch.float64, logit_softcap=3.0)
    labels, results = labels_for(torch.empty(4, 5, 131), 0.2), []
    options = {"shift_labels": labels, "variant": variant, "alpha": 0.7, "average_log_prob": True}
    for frozen, chunk_bytes in ((False, 20_000), (True, None), (False, None)):
        with_grad, leaves = requiring_grad({**given, "chunk_bytes": chunk_bytes}, frozen)
        output, gradients = loss_and_gradients(with_grad, leaves, **options)
        results.append([output.loss, *gradients])
    recomputed, frozen, at_once = results
    for ours, wanted in [
        *zip(frozen, recomputed, strict=False),
        *zip(at_once, recomputed, strict=True),
    ]:
        assert relative_error(ours, numpy64(wanted)) <= 1e-13


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 20_000, None])
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_packed_sequences_are_padded_ones_without_the_padding(
    backend, variant, alpha, chunk_bytes, frozen
):
    lengths = [5, 0, 3, 7, 1, 4]
    options = {"variant": variant, "alpha": alpha, "average_log_prob": True}
    given = arguments_of(6, 7, chunk_bytes=chunk_bytes)
    labels = labels_for(torch.empty(6, 7, 131), 0.2)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100

    def pack(x: Tensor) -> Tensor:
        return torch.cat([x[row, :length] for row, length in enumerate(lengths)])

    packed = {name: pack(x) if name.endswith("hidden") else x for name, x in given.items()}
    packed_labels, bounds = pack(labels), torch.tensor([0, *np.cumsum(lengths)])
    given, leaves = requiring_grad(given, frozen)
    padded, gradients = loss_and_gradients(given, leaves, labels=labels, **options)
    packed, leaves = requiring_grad(packed, frozen)
    ours, packed_gradients = loss_and_gradients(
        packed, leaves, labels=packed_labels, cu_seqlens=bounds, **options
    )
    for a, b in zip(ours, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    wanted = [pack(gradients[0]), *gradients[1:]]
    for a, b in zip(packed_gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_chunk_size_changes_nothing_but_rounding(backend):
    given, leaves = requiring_grad(arguments_of(9, vocabulary=700, policy_bias=True))
    labels, upstream = labels_for(torch.empty(9, 700), 0.2), torch.randn(2, 9)
    results = []
    for chunk_bytes in [1, 3000, 10_000, 30_000, 100_000, 300_000, 10**7, None]:
        stats = tdpo_ext.linear_token_stats(**given, labels=labels, chunk_bytes=chunk_bytes)
        total = (stats.policy_logps * upstream[0] + stats.forward_kl * upstream[1]).sum()
        results.append([*stats, *torch.autograd.grad(total, leaves)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert relative_error(a, numpy64(b)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_token_stats_of_the_logits(backend, dtype):
    given = arguments_of(8, vocabulary=1000, dtype=dtype)
    labels = labels_for(torch.empty(8, 1000), 0.2)
    stats = tdpo_ext.linear_token_stats(**given, labels=labels)
    logits = [given[f"{x}_hidden"] @ given[f"{x}_weight"].T for x in ("policy", "reference")]
    bound = 1e-13 if dtype == torch.float64 else 3e-7
    for ours, wanted in zip(stats, tdpo_ext.token_stats(*logits, labels), strict=True):
        assert relative_error(ours, numpy64(wanted)) <= bound


@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_costs_nothing_but_the_rounding_of_what_is_stored(on_host, frozen):
    """Against the same in float32 throughout, whose gradients are then rounded. (On a card dz is
    rounded too, before its products.)"""
    given = arguments_of(6, 5, vocabulary=500, dtype=torch.bfloat16)
    labels = labels_for(torch.empty(6, 5, 500), 0.2)
    given, leaves = requiring_grad(given, frozen)
    _, gradients = loss_and_gradients(given, leaves, shift_labels=labels)
    wide = {name: x.float() if isinstance(x, Tensor) else x for name, x in given.items()}
    wide, wide_leaves = requiring_grad(wide, frozen)
    _, wanted = loss_and_gradients(
        wide, wide_leaves, loss=tdpo_ext.reference.linear_tdpo_loss, shift_labels=labels
    )
    for ours, theirs in zip(gradients, wanted, strict=True):
        allowed = theirs.abs() * 2.0**-8 + 1e-6 * theirs.abs().max()
        assert ((ours.float() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("chunk_bytes", [1, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_what_stands_at_ignored_tokens_changes_no_bit(backend, frozen, chunk_bytes):
    given = arguments_of(4, 5, chunk_bytes=chunk_bytes)
    check_ignored_tokens(given, frozen)


def test_a_policy_that_is_its_reference_has_no_divergence(backend):
    given = arguments_of(6, reference_width=19, chunk_bytes=10_000)
    given["reference_hidden"], given["reference_weight"] = (
        given["policy_hidden"],
        given["policy_weight"],
    )
    labels = torch.randint(0, 131, (6,))
    assert not tdpo_ext.linear_token_stats(**given, labels=labels).forward_kl.any()


def test_infinite_divergences(backend):
    """A bias of -inf is a masked word."""
    given = arguments_of(3, policy_bias=True, reference_bias=True, chunk_bytes=10_000)
    labels = torch.tensor([1, 2, 3])
    given["policy_bias"][100] = -math.inf
    assert (tdpo_ext.linear_token_stats(**given, labels=labels).forward_kl == math.inf).all()
    given["reference_bias"][100] = -math.inf
    assert tdpo_ext.linear_token_stats(**given, labels=labels).forward_kl.isfinite().all()


def test_no_tokens(backend):
    given, leaves = requiring_grad(arguments_of(0))
    stats = tdpo_ext.linear_token_stats(**given, labels=torch.zeros(0, dtype=torch.int64))
    gradients = torch.autograd.grad(stats.forward_kl.sum(), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert not any(g.any() for g in gradients)


def test_the_same_bits_again(backend, two_threads):
    given, leaves = requiring_grad(arguments_of(4, 5, vocabulary=1000))
    labels = labels_for(torch.empty(4, 5, 1000), 0.2)
    results = [loss_and_gradients(given, leaves, shift_labels=labels) for _ in range(2)]
    for a, b in zip(*([*output, *gradients] for output, gradients in results), strict=True):
        assert torch.equal(a, b)
