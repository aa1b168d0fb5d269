"""The fused head as it runs on CUDA: gradients of the logits in the products' half-width type.

They lie beside the float32 logits, which whole rows have only in groups, and whole pairs are made
without the pair's scalar. The products are numpy's, with float32 results (half_width.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import oracle
import pytest
import torch
from backends import COMPILED, parameters, use_backend
from half_width import take_half_width
from head_checks import (
    OPTIONS,
    CountedProducts,
    arguments_of,
    check_ignored_tokens,
    loss_and_gradients,
    oracle_heads,
    requiring_grad,
)
from inputs import labels_for, numpy64, relative_error
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tdpo_ext
from tdpo_ext.fused_head import problem, products

HALF = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
VOCABULARY, WIDTH, TOKENS = 640, 32, 24


@pytest.fixture(params=parameters([*(x for x in COMPILED if x != "cuda"), "fallback"]))
def backend(request, monkeypatch):
    take_half_width(monkeypatch)
    with use_backend(monkeypatch, request.param) as name:
        yield name


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of rows so small that these tests' few rows make several."""
    monkeypatch.setattr("tdpo_ext.fused_head.tiles.GROUP_ROWS", (4, 2))


METHODS = [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 0.0), ("tdpo2", 1.0), ("tdpo2", 2.5)]
# A token of 131 words takes 192 x 8 bytes of logits, 192 x 2 of gradient, and 200 of states.
WAYS = {
    "recompute": {"chunk_bytes": 7_000},
    "direction": {"frozen": True},
    "direction, two groups at a time": {"frozen": True, "chunk_bytes": 10_000},
    "a pair at a time": {"chunk_bytes": 16_000},
    "all pairs": {},
}


@pytest.mark.parametrize("options", ["plain", "all, each its own"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_loss(backend, small_groups, dtype, variant, alpha, way, options):
    frozen, chunk_bytes = WAYS[way].get("frozen", False), WAYS[way].get("chunk_bytes")
    given = arguments_of(6, 5, dtype=dtype, chunk_bytes=chunk_bytes, **OPTIONS[options])
    given, leaves = requiring_grad(given, frozen)
    labels = labels_for(torch.empty(6, 5, 131), 0.3)
    labels[1] = -100  # a response without a kept token
    loss_options = {
        "beta": 0.2,
        "alpha": alpha,
        "variant": variant,
        "label_smoothing": 0.1,
        "average_log_prob": True,
    }
    scale = torch.tensor(1024.0)  # as a loss scaler's, or small gradients leave float16's range
    output, gradients = loss_and_gradients(
        given, leaves, weights=scale, shift_labels=labels, **loss_options
    )
    policy, reference = oracle_heads(given)
    truth = oracle.tdpo_loss(
        policy.logits().reshape(6, 5, 131),
        reference.logits().reshape(6, 5, 131),
        labels.numpy(),
        weights=np.full(3, 1 / 3),
        **loss_options,
    )
    assert relative_error(output.losses, truth.losses) <= 1e-6
    wanted = policy.gradients(1024 * truth.gradient.reshape(30, 131))
    for ours, theirs in zip(gradients, wanted, strict=False):
        # dz, the scaled states and the result are rounded, each by 0.38 units on average.
        assert relative_error(ours.reshape(theirs.shape), theirs) <= ROUNDING[dtype]
    assert not gradients[0][1].any()


# Numbers that a gradient keeps: a row's whole logits, as hidden states times the unit matrix.
def rows_that_are_hard(kind: str, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Logits of policy and reference, [8, vocabulary], numbers that bfloat16 has."""
    at = torch.arange(vocabulary) / vocabulary
    noise = 2 * torch.randn(2, 8, vocabulary)
    policy, reference = noise[0], noise[0] + noise[1] / 2
    if kind == "the largest come last":
        policy, reference = policy + (8 * at).floor() * 16, reference + (8 * at).floor() * 16
    elif kind == "the largest come first":
        policy, reference = policy - (8 * at).floor() * 16, reference - (8 * at).floor() * 16
    elif kind == "each where the other is low":
        policy, reference = policy + (8 * at).floor() * 16, reference - (8 * at).floor() * 16
    elif kind == "one word has all":
        policy[:, -1] += 128
        reference[:, -1] += 128
    elif kind == "masked":
        policy[:, 5:70] = reference[:, 5:70] = -math.inf
        reference[:, 100:110] = -math.inf
    return policy.bfloat16(), reference.bfloat16()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        "the largest come last",
        "the largest come first",
        "each where the other is low",
        "one word has all",
        "masked",
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_entry_keeps_its_digits_wherever_the_largest_stand(
    backend, small_groups, kind, alpha, frozen
):
    """With the unit matrix for a head the gradient of the hidden states is that of the logits."""
    vocabulary = 200
    policy, reference = rows_that_are_hard(kind, vocabulary)
    labels = torch.randint(110, vocabulary, (4, 2))
    given = {
        "policy_hidden": policy.nan_to_num(neginf=0).view(4, 2, vocabulary),
        "reference_hidden": reference.nan_to_num(neginf=0).view(4, 2, vocabulary),
        "policy_weight": torch.eye(vocabulary).bfloat16(),
        "reference_weight": torch.eye(vocabulary).bfloat16(),
        "policy_bias": torch.where(policy[0] == -math.inf, -math.inf, 0.0).bfloat16(),
        "reference_bias": torch.where(reference[0] == -math.inf, -math.inf, 0.0).bfloat16(),
    }
    given, leaves = requiring_grad(given, frozen)
    if frozen:
        given["policy_bias"] = given["policy_bias"].detach()
    options = {"alpha": alpha, "average_log_prob": True}
    _, gradients = loss_and_gradients(given, leaves[:1], shift_labels=labels, **options)
    truth = oracle.tdpo_loss(
        numpy64(policy).reshape(4, 2, -1),
        numpy64(reference).reshape(4, 2, -1),
        labels.numpy(),
        weights=np.full(2, 0.5),
        beta=0.1,
        variant="tdpo2",
        **options,
    ).gradient
    ours = numpy64(gradients[0])
    # dz is rounded, and the gradient as it is stored. Float32 loses digits of p - q where they
    # are almost equal, so an entry may be off by a part of the terms that it is made of.
    of_terms = 3e-6 * np.abs(truth).max(-1, keepdims=True)
    assert np.isfinite(ours).all()
    assert (np.abs(ours - truth) <= 2.01 * 2.0**-8 * np.abs(truth) + of_terms).all()


@pytest.mark.parametrize("way", ["recompute", "direction", "all pairs"])
def test_float16_keeps_the_digits_of_small_gradients(backend, small_groups, way):
    """An entry's gradient is about 1e-5 of the token's, where float16 has eight bits. The labels'
    own entries, which have far larger gradients, do not come into what is compared."""
    vocabulary, scale = 100_000, 2.0**-4 if way == "recompute" else 2.0**14
    labels = torch.arange(12).view(4, 3)
    given = arguments_of(4, 3, vocabulary=vocabulary, dtype=torch.float16)
    for which in ("policy", "reference"):
        given[f"{which}_hidden"] /= 256
        given[f"{which}_weight"] *= 64
        given[f"{which}_weight"][:12] = 0
    given, leaves = requiring_grad(given, way == "direction")
    policy, reference = oracle_heads(given)
    z, r = (x.logits().reshape(4, 3, vocabulary) for x in (policy, reference))
    if way == "recompute":
        stats = tdpo_ext.linear_token_stats(**given, labels=labels)
        gradients = torch.autograd.grad(scale * stats.forward_kl.sum(), leaves)
        rows = (x.reshape(12, vocabulary) for x in (z, r))
        dz = oracle.token_stats_gradient(*rows, labels.numpy().ravel(), np.zeros(12), np.ones(12))
    else:
        options = {"alpha": 0.5, "beta": 0.1, "variant": "tdpo2"}
        weights = torch.tensor(scale)
        _, gradients = loss_and_gradients(
            given, leaves, weights=weights, shift_labels=labels, **options
        )
        dz = oracle.tdpo_loss(z, r, labels.numpy(), weights=np.full(2, 0.5), **options).gradient
    wanted = policy.gradients(scale * dz.reshape(12, vocabulary))
    assert relative_error(gradients[0].reshape(12, -1), wanted[0]) <= 2.0**-11
    if way == "all pairs":
        assert relative_error(gradients[1][12:], wanted[1][12:]) <= 2.0**-11


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of NaN
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("divergences", [False, True])
def test_an_unusual_upstream_gradient_spoils_no_other_token(backend, value, divergences):
    """In float16, where one power of 2 scales the gradients of all tokens. An ignored token's
    upstream gradient changes no bit of anything; one that is not finite spoils its own token."""
    given, leaves = requiring_grad(arguments_of(6, vocabulary=64, dtype=torch.float16))
    labels, upstream = torch.tensor([1, -100, 2, 3, 4, 5]), 1024 * (torch.rand(6) + 0.5)
    if divergences:
        found = tdpo_ext.linear_token_divergences(**given, labels=labels)
    else:
        found = tdpo_ext.linear_token_stats(**given, labels=labels)

    def gradients_with(token: int, value: float) -> list[Tensor]:
        weights = upstream.clone()
        weights[token] = value
        statistic = found.reverse_kl if divergences else found.forward_kl
        return [*torch.autograd.grad(statistic, leaves, weights, retain_graph=True)]

    for ours, wanted in zip(gradients_with(1, value), gradients_with(1, 0.0), strict=True):
        assert torch.equal(ours, wanted)
    if not math.isfinite(value):
        ours, wanted = (gradients_with(2, x)[0] for x in (value, 0.0))
        others = [0, 1, 3, 4, 5]
        assert not ours[2].isfinite().any()
        assert relative_error(ours[others], numpy64(wanted[others])) <= ROUNDING[torch.float16]


def made_in_forward(given: dict[str, Any], labels: Tensor, chunk_bytes: int) -> list[Tensor]:
    """What the op makes, before it is stored in the tensors' type."""
    names = ("policy_hidden", "policy_weight", "policy_bias")
    heads = [given.get(x) for x in (*names, *(x.replace("policy", "reference") for x in names))]
    heads = [x.flatten(0, 1) if i in (0, 3) and x is not None else x for i, x in enumerate(heads)]
    options = (1.0, 0.0, 1.0, 0.0, -100, chunk_bytes, "", 0, 0)
    sequences = labels.shape[0]
    loss_options = (0.1, 0.5, "tdpo2", 0.0, False, "mean", sequences // 2)
    results = torch.ops.tdpo_ext.linear_tdpo_gradients(
        *heads, labels.flatten(), None, sequences, *options, *loss_options, [True, True, False]
    )
    return [gradient.double() * results[-1].double() for gradient in results[3:5]]


def test_what_rounding_costs(backend, small_groups):
    """Against dz, scalar included, rounded once. dz without it is rounded once as well, and then dh
    is scaled in float32. The states that dW is made of are rounded when they are scaled, so its
    error is the root of two errors' squares: up to 1.55 times as large."""
    given = arguments_of(8, 16, vocabulary=500, width=64, dtype=torch.bfloat16)
    labels = torch.randint(0, 500, (8, 16))
    policy, reference = oracle_heads(given)
    options = {"alpha": 0.5, "beta": 0.1, "variant": "tdpo2", "weights": np.full(4, 0.25)}
    shape = (8, 16, 500)
    logits = policy.logits().reshape(shape), reference.logits().reshape(shape)
    exact = oracle.tdpo_loss(*logits, labels.numpy(), **options).gradient.reshape(128, 500)
    once = torch.from_numpy(exact).float().bfloat16().double().numpy()
    ours = made_in_forward(given, labels, 10**9)
    errors = [
        relative_error(gradient, wanted) / relative_error(torch.from_numpy(rounded), wanted)
        for gradient, wanted, rounded in zip(
            ours, policy.gradients(exact), policy.gradients(once), strict=False
        )
    ]
    assert errors[0] <= 1
    assert errors[1] <= 1.55


def test_the_chunk_size_changes_nothing_but_rounding(backend, small_groups):
    given = arguments_of(8, 4, vocabulary=300, dtype=torch.bfloat16)
    labels = labels_for(torch.empty(8, 4, 300), 0.2)
    given, leaves = requiring_grad(given)
    results = []
    for chunk_bytes in [1, 30_000, 40_000, 60_000, 100_000, 10**9, None]:
        output, gradients = loss_and_gradients(
            given, leaves, shift_labels=labels, chunk_bytes=chunk_bytes
        )
        results.append((output, gradients))
    for output, gradients in results[1:]:
        assert relative_error(output.losses, numpy64(results[0][0].losses)) <= 1e-6
        for a, b in zip(gradients, results[0][1], strict=True):
            assert relative_error(a, numpy64(b)) <= 2.0**-8


@pytest.mark.parametrize("frozen", [False, True])
def test_what_stands_at_ignored_tokens_changes_no_bit(backend, small_groups, frozen):
    given = arguments_of(4, 5, dtype=torch.bfloat16)
    check_ignored_tokens(given, frozen)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
def test_no_tokens_and_a_frozen_head(backend, shape):
    given, leaves = requiring_grad(arguments_of(*shape, dtype=torch.bfloat16), frozen=True)
    labels = torch.zeros(shape, dtype=torch.int64)
    output, gradients = loss_and_gradients(given, leaves, shift_labels=labels, reduction="sum")
    assert output.losses.shape == (shape[0] // 2,)
    assert not any(gradient.any() for gradient in gradients)


def test_small_slopes_stay_in_the_range_of_float16(backend, small_groups):
    """A mean over 64 pairs, of means over tokens, with a small beta: factors of 3e-7 a token."""
    given = arguments_of(128, 2, vocabulary=50, width=8, reference_width=8, dtype=torch.float16)
    labels = torch.randint(0, 50, (128, 2))
    given, leaves = requiring_grad(given)
    options = {"beta": 1e-4, "average_log_prob": True}
    output, _ = loss_and_gradients(given, leaves, shift_labels=labels, **options)
    loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, **options).loss
    ours = torch.autograd.grad(2.0**16 * loss, leaves)  # as a loss scaler asks
    wide = {k: v.detach().double() if isinstance(v, Tensor) else v for k, v in given.items()}
    wide, wide_leaves = requiring_grad(wide)
    exact = tdpo_ext.reference.linear_tdpo_loss(**wide, shift_labels=labels, **options).loss
    assert output.loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for a, b in zip(ours, torch.autograd.grad(2.0**16 * exact, wide_leaves), strict=True):
        assert relative_error(a, numpy64(b)) <= 2.0**-10


# A token of 640 words takes 6400 bytes and of states 2 x (32 + 32) gathered, 4 x 32 for dh, 2 x 32
# scaled. A pair of 12 tokens: 12 x (1280 + 320) kept, and 5120 for each token in the group.
@pytest.mark.parametrize(
    ("chunk_bytes", "units"), [(29_000, 5.5), (30_000, 4), (45_000, 4), (10**9, 4)]
)
def test_units_of_whole_pairs(backend, small_groups, monkeypatch, chunk_bytes, units):
    if backend == "fallback" and units > 4:
        pytest.skip("plain PyTorch makes both logits anew for every row")
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "reference_width": WIDTH}
    given = arguments_of(4, TOKENS // 4, dtype=torch.bfloat16, **sizes)
    given, leaves = requiring_grad(given)
    labels = torch.randint(0, VOCABULARY, (4, TOKENS // 4))
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    loss_and_gradients(given, leaves, shift_labels=labels, chunk_bytes=chunk_bytes)
    assert counted.units() == units


@pytest.mark.parametrize("chunk_bytes", [1, 20_000, 10**9])
def test_units_of_a_frozen_head(backend, small_groups, monkeypatch, chunk_bytes):
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "reference_width": WIDTH}
    given = arguments_of(4, TOKENS // 4, dtype=torch.bfloat16, **sizes)
    given, leaves = requiring_grad(given, frozen=True)
    labels = torch.randint(0, VOCABULARY, (4, TOKENS // 4))
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    loss_and_gradients(given, leaves, shift_labels=labels, chunk_bytes=chunk_bytes)
    assert counted.units() == 3


@pytest.mark.skipif("cuda-on-cpu" not in COMPILED, reason="no C++ compiler on the path")
@pytest.mark.parametrize(
    ("way", "multiplications", "launches"),
    [
        # For each of 8 tiles of all rows: logits of both; the records of a tile, and their merge.
        # At the end the outputs, the sums of the sequences and the pairs.
        ("forward", 8 * 2, 8 * 2 + 3),
        # Then for each tile of chosen rows: the policy's logits, dh, dW and dz. For rejected rows
        # also the reference's logits.
        ("recompute", 8 * (2 + 3 + 4), 8 * (2 + 1 + 1) + 3),
        # For each of 6 groups of rows: logits of both; the rows' records, their outputs, dz. For
        # each of 2 chunks: dh, dW, and for their slopes the sums of the sequences and the pairs, as
        # at the end.
        ("whole pairs", 6 * 2 + 2 * 2, 6 * 3 + 2 * 2 + 2),
        ("direction", 6 * 2 + 1, 6 * 3 + 2),
    ],
)
def test_launches_of_a_step(monkeypatch, way, multiplications, launches):
    """docs/fused-head.md counts what they are at full size."""
    take_half_width(monkeypatch)
    monkeypatch.setattr("tdpo_ext.fused_head.tiles.GROUP_ROWS", (4,))
    monkeypatch.setattr("tdpo_ext.fused_head.problem.MOST_COLUMNS_ON_CPU", VOCABULARY // 8)
    given = arguments_of(4, TOKENS // 4, vocabulary=VOCABULARY, dtype=torch.bfloat16)
    leaves = []
    if way != "forward":
        given, leaves = requiring_grad(given, frozen=way == "direction")
    given["chunk_bytes"] = 45_000 if way == "whole pairs" else None  # a pair at a time
    labels = torch.randint(0, VOCABULARY, (4, TOKENS // 4))
    calls = []
    for name in ("multiply", "multiply_add"):
        product = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda a, b, out, product=product: calls.append(product(a, b, out=out))
        )
    with use_backend(monkeypatch, "cuda-on-cpu"):
        before = emulated.library().emulated_launches()
        reduction = "none" if way == "recompute" else "mean"
        loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, reduction=reduction).loss
        if leaves:
            torch.autograd.grad(loss.sum(), leaves)
        launched = emulated.library().emulated_launches() - before
    assert (len(calls), launched) == (multiplications, launches)


def most_bytes(run: Callable[[], object]) -> int:
    """What tensors take at the highest, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    del kept
    return max(itertools.accumulate(change for _, change in changes))


MEMORY = {
    "forward": ({}, 400_000),
    # Without a bias: on the CPU PyTorch casts what it sums in another type.
    "recompute": ({"policy_hidden", "policy_weight"}, 400_000),
    "direction": ({"policy_hidden"}, 1_500_000),
    "whole pairs": ({"policy_hidden", "policy_weight", "policy_bias"}, 2_200_000),
}


@pytest.mark.parametrize("ignored", [0.0, 0.5], ids=["all kept", "half ignored"])
@pytest.mark.parametrize("way", MEMORY)
def test_all_that_exists_at_a_time_fits_chunk_bytes(backend, monkeypatch, way, ignored):
    """Beyond outputs and gradients: tiles, dz, gathered and scaled states, dh of gathered rows.

    Not counted are some numbers a token: outputs, upstream gradients, indices, records.
    """
    if backend == "fallback":
        pytest.skip("plain PyTorch makes temporaries of its own")
    monkeypatch.setattr("tdpo_ext.fused_head.tiles.GROUP_ROWS", (32, 16))
    vocabulary, width, tokens = 4096, 16, 256
    wanted, chunk_bytes = MEMORY[way]
    given = arguments_of(4, tokens // 4, vocabulary=vocabulary, width=width, dtype=torch.bfloat16)
    given["policy_bias"] = torch.randn(vocabulary).bfloat16()
    labels = torch.randint(0, vocabulary, (4, tokens // 4))
    labels = labels.masked_fill(torch.rand(labels.shape) < ignored, -100)
    for name in wanted:
        given[name].requires_grad_()

    def step() -> object:
        loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, chunk_bytes=chunk_bytes).loss
        return loss, torch.autograd.grad(loss, [given[x] for x in wanted]) if wanted else ()

    counted = CountedProducts(monkeypatch, int((labels != -100).sum()), vocabulary, width)
    step()
    of_reference = 13 / width - 1
    units = {"forward": 2, "recompute": 5.5, "direction": 3, "whole pairs": 4}
    assert counted.units() == pytest.approx(units[way] + of_reference, abs=0.6)
    of_gradients = 4 * sum(
        given[name].numel() for name in wanted
    )  # half as much when stored, later
    beyond = most_bytes(step) - of_gradients
    assert 0.4 * chunk_bytes <= beyond <= chunk_bytes + 400 * tokens
    assert beyond >= of_gradients / 2


def test_without_chunk_bytes_a_card_gives_a_part_of_its_memory(monkeypatch):
    card = torch.device("cuda", 0)
    for memory, wanted in [
        (141 * 2**30, 2 * 2**30),
        (80 * 2**30, 2 * 2**30),
        (24 * 2**30, 3 * 2**28),
        (6 * 2**30, 2**28),
    ]:
        found = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert problem.default_chunk_bytes(card) == wanted
    assert problem.default_chunk_bytes(torch.device("cpu")) == 2**28
