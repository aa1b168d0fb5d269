"""What the fused head spends: products, memory, and nothing where nothing is asked for."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from head_checks import (
    NAMES,
    CountedProducts,
    arguments_of,
    loss_and_gradients,
    requiring_grad,
)
from processes import measure, needs_core, needs_linux

import tdpo_ext
from tdpo_ext.fused_head import problem

TOKENS, WIDTH, VOCABULARY = 12, 16, 640


@pytest.fixture(params=[0.0, 0.5], ids=["all kept", "half ignored"])
def batch(request) -> tuple[dict[str, Any], torch.Tensor, int]:
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "reference_width": WIDTH}
    given = arguments_of(4, TOKENS // 4, **sizes, policy_bias=True)  # it costs no product
    labels = torch.randint(0, VOCABULARY, (4, 3))
    if request.param:
        labels.view(-1)[::2] = -100
    return given, labels, int((labels != -100).sum())


# GEMM units of forward, and of forward and backward.
UNITS = {
    ("recompute", "tdpo1"): (2, 5),
    ("recompute", "tdpo2"): (2, 5.5),
    ("recompute", "dpo"): (2, 5),
    ("direction", "tdpo1"): (3, 3),
    ("direction", "tdpo2"): (3, 3),
    ("whole pairs", "tdpo1"): (4, 4),
    ("whole pairs", "tdpo2"): (4, 4),
}


@pytest.mark.parametrize(("way", "method"), UNITS)
def test_units_of_the_loss(on_host, monkeypatch, batch, way, method):
    if on_host == "fallback" and way == "recompute":
        pytest.skip("plain PyTorch makes both logits anew for every row")
    given, labels, kept = batch
    variant, alpha = ("tdpo2", 0.0) if method == "dpo" else (method, 0.5)
    given, leaves = requiring_grad(given, frozen=way == "direction")
    counted = CountedProducts(monkeypatch, kept, VOCABULARY, WIDTH)
    chunk_bytes = None if way == "whole pairs" else 20_000
    options = {"shift_labels": labels, "variant": variant, "alpha": alpha}
    loss = tdpo_ext.linear_tdpo_loss(**given, **options, chunk_bytes=chunk_bytes).loss
    forward = counted.units()
    torch.autograd.grad(loss, leaves)
    both = forward + counted.units()
    chosen = (labels[:2] != -100).sum() / kept  # of TDPO2's rows, those that need no reference
    exact = (
        5 + float(1 - chosen) if (way, method) == ("recompute", "tdpo2") else UNITS[way, method][1]
    )
    assert (forward, both) == (UNITS[way, method][0], pytest.approx(exact))
    with torch.no_grad():
        tdpo_ext.linear_tdpo_loss(**given, **options, chunk_bytes=chunk_bytes)
    assert counted.units() == 2


# A token takes two logits of 640 words, the states it gathers and their gradient: 5120 + 116 + 64
# bytes.
@pytest.mark.parametrize(
    ("packed", "chunk_bytes", "whole"),
    [(False, 31_700, False), (False, 31_900, True), (True, 63_500, False), (True, 63_700, True)],
)
def test_whole_pairs_are_taken_where_they_fit(on_host, monkeypatch, packed, chunk_bytes, whole):
    """One of 6 tokens; of packed ones all 12, since the host does not know how long each is."""
    shape = (TOKENS,) if packed else (4, TOKENS // 4)
    given, _ = requiring_grad(arguments_of(*shape, vocabulary=VOCABULARY, width=WIDTH))
    given["cu_seqlens"] = torch.tensor([0, 3, 6, 9, 12]) if packed else None
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    labels = torch.zeros(shape, dtype=torch.int64)
    tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, chunk_bytes=chunk_bytes)
    assert counted.units() == 1 + 13 / WIDTH + (2 if whole else 0)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0)])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_pairs_and_no_tokens(on_host, frozen, shape):
    given, leaves = requiring_grad(arguments_of(*shape), frozen)
    labels = torch.zeros(shape, dtype=torch.int64)
    output, gradients = loss_and_gradients(given, leaves, labels=labels, reduction="sum")
    assert output.loss.item() == pytest.approx(shape[0] / 2 * math.log(2))
    assert not any(gradient.any() for gradient in gradients)


def test_without_chunk_bytes_there_are_256_mebibytes(on_host, monkeypatch):
    """On the CPU, seen by how much of the logits exists, with another number in their place."""
    assert problem.DEFAULT_CHUNK_BYTES == 256 * 2**20
    monkeypatch.setattr("tdpo_ext.fused_head.problem.DEFAULT_CHUNK_BYTES", 20_000)
    given, _ = requiring_grad(arguments_of(4, TOKENS // 4, vocabulary=VOCABULARY, width=WIDTH))
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    labels = torch.zeros(4, TOKENS // 4, dtype=torch.int64)
    tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels)
    assert counted.units() == 1 + 13 / WIDTH  # no gradient is made in forward


@pytest.mark.parametrize(("asked", "units"), [([0], 3), ([1], 3), ([0, 1], 4)])
def test_units_of_any_upstream_gradients(on_host, monkeypatch, batch, asked, units):
    """What does not require a gradient costs none."""
    given, labels, kept = batch
    for index in asked:
        given[NAMES[index]].requires_grad_()
    counted = CountedProducts(monkeypatch, kept, VOCABULARY, WIDTH)
    stats = tdpo_ext.linear_token_stats(**given, labels=labels)
    assert counted.units() == 2
    total = stats.policy_logps.sum() + 0.3 * stats.forward_kl.sum()
    torch.autograd.grad(total, [given[NAMES[index]] for index in asked])
    assert counted.units() == units


def test_no_gradient_is_promised_of_the_reference(on_host):
    given, _ = requiring_grad(arguments_of(5))
    stats = tdpo_ext.linear_token_stats(**given, labels=torch.randint(0, 131, (5,)))
    assert [x.requires_grad for x in stats] == [True, False, True]


def test_tokens_that_no_gradient_reaches_cost_nothing(on_host, monkeypatch):
    given, leaves = requiring_grad(arguments_of(TOKENS, vocabulary=VOCABULARY, width=WIDTH))
    counted = CountedProducts(monkeypatch, TOKENS, VOCABULARY, WIDTH)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    stats = tdpo_ext.linear_token_stats(**given, labels=labels)
    counted.units()
    torch.autograd.grad(stats.policy_logps[: TOKENS // 2].sum(), leaves)
    # The other tokens take logits of the policy, dh and dW; in plain PyTorch also logits of the
    # reference.
    of_reference = 13 / WIDTH if on_host == "fallback" else 0
    assert counted.units() == (3 + of_reference) / 2


@functools.cache
def growth_of_steps() -> dict[str, float]:
    """At V = 128256: the memory of each step at its highest, without its gradients, in units of
    chunk_bytes. All in one process, which takes seconds to start."""
    return measure("""
        width, vocabulary, chunk = 96, 128256, 128 * 2**20
        def step(way, dtype, chunk, tokens):
            hidden, reference = (torch.randn(2, tokens // 2, width).to(dtype) for _ in range(2))
            labels = torch.randint(0, vocabulary, (2, tokens // 2))
            forget_peak()
            before = peak()
            hidden.requires_grad_(way != "forward")
            weight.requires_grad_(way in ("recompute", "divergences", "whole pairs"))
            tensors = hidden, weight, reference, head
            if way == "divergences":
                found = tdpo_ext.linear_token_divergences(*tensors, chunk_bytes=chunk)
                loss = found.reverse_kl.sum()
            else:
                options = {"shift_labels": labels, "chunk_bytes": chunk}
                loss = tdpo_ext.linear_tdpo_loss(*tensors, **options).loss
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            gradients = torch.autograd.grad(loss, wanted) if wanted else []
            # Each is added up in float32, and then stored in its own type.
            mine = sum(x.numel() * (4 if dtype == torch.float32 else 6) for x in gradients)
            return (peak() - before - mine) / chunk
        grown = {}
        for dtype in (torch.float32, torch.bfloat16):
            weight, head = (torch.randn(vocabulary, width).to(dtype) for _ in range(2))
            step("forward", dtype, 2**20, 4)
            for way in ("forward", "direction", "recompute", "divergences", "whole pairs"):
                tokens = 4 if way == "whole pairs" else 512
                grown[f"{way}, {dtype}"] = step(way, dtype, chunk, tokens)
        print(json.dumps(grown))
    """)


@needs_linux
@needs_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["forward", "recompute", "divergences", "direction", "whole pairs"])
def test_the_process_grows_by_gradients_and_chunk_bytes(way, dtype):
    assert growth_of_steps()[f"{way}, {dtype}"] <= 1.1
