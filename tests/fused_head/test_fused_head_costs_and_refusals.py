"""The fused head's products, memory, derivatives, compilation, autocast and refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from head_checks import (
    METHODS,
    NAMES,
    CountedProducts,
    arguments_of,
    loss_and_gradients,
    requiring_grad,
)
from inputs import labels_for
from processes import measure, needs_core, needs_linux
from torch.autograd import gradcheck, gradgradcheck

import tdpo_ext
from tdpo_ext.fused_head import passes

OPS = torch.ops.tdpo_ext

TOKENS, WIDTH, VOCABULARY = 12, 16, 640


@pytest.fixture(params=[0.0, 0.5], ids=["all kept", "half ignored"])
def batch(request) -> tuple[dict[str, Any], torch.Tensor, int]:
    sizes = {"vocabulary": VOCABULARY, "width": WIDTH, "reference_width": WIDTH}
    given = arguments_of(4, TOKENS // 4, **sizes, policy_bias=True)  # it costs no product
    labels = torch.randint(0, VOCABULARY, (4, 3))
    if request.param:
        labels.view(-1)[::2] = -100
    return given, labels, int((labels != -100).sum())


# Of forward, and of forward and backward.
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
    assert passes.DEFAULT_CHUNK_BYTES == 256 * 2**20
    monkeypatch.setattr("tdpo_ext.fused_head.passes.DEFAULT_CHUNK_BYTES", 20_000)
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
    # Of the others logits of the policy, dh and dW; in plain PyTorch those of the reference too.
    of_reference = 13 / WIDTH if on_host == "fallback" else 0
    assert counted.units() == (3 + of_reference) / 2


@needs_linux
@needs_core
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["forward", "recompute", "direction", "whole pairs"])
def test_the_process_grows_by_gradients_and_chunk_bytes(way, dtype):
    """At V = 128256, of what a step takes at its highest, in units of chunk_bytes."""
    grown = measure(f"""
        way, dtype = "{way}", torch.{dtype}
        tokens, width, vocabulary, chunk = 4, 96, 128256, 128 * 2**20
        if way != "whole pairs":
            tokens = 512
        def step(chunk, tokens):
            hidden, reference = (torch.randn(2, tokens // 2, width).to(dtype) for _ in range(2))
            labels = torch.randint(0, vocabulary, (2, tokens // 2))
            forget_peak()
            before = peak()
            hidden.requires_grad_(way != "forward")
            weight.requires_grad_(way in ("recompute", "whole pairs"))
            loss = tdpo_ext.linear_tdpo_loss(
                hidden, weight, reference, head, shift_labels=labels, chunk_bytes=chunk
            ).loss
            wanted = [x for x in (hidden, weight) if x.requires_grad]
            gradients = torch.autograd.grad(loss, wanted) if wanted else []
            # Each is added up in float32, and then stored in its own type.
            mine = sum(x.numel() * (4 if dtype == torch.float32 else 6) for x in gradients)
            return (peak() - before - mine) / chunk
        weight, head = (torch.randn(vocabulary, width).to(dtype) for _ in range(2))
        way, asked = "forward", way
        step(2**20, 4)
        way = asked
        print(json.dumps(dict(chunks=step(chunk, tokens))))
    """)
    assert grown["chunks"] <= 1.1


def small(**options: Any) -> tuple[dict[str, Any], list[torch.Tensor], torch.Tensor]:
    given = arguments_of(
        4, 2, vocabulary=7, width=3, reference_width=2, dtype=torch.float64, **options
    )
    labels = torch.randint(0, 7, (4, 2))
    labels[0, 1] = -100
    return *requiring_grad(given), labels


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(on_host, softcap):
    given, leaves, labels = small(policy_bias=True, logit_softcap=softcap)

    def stats(*tensors):
        result = tdpo_ext.linear_token_stats(
            **{**given, **dict(zip(NAMES, tensors, strict=True))}, labels=labels
        )
        return result.policy_logps, result.forward_kl

    assert gradcheck(stats, leaves)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck_of_the_loss(on_host, frozen):
    """With a gradient for the head, pair by pair: gradcheck goes backward twice."""
    given, _, labels = small()
    names = NAMES[: 1 if frozen else 2]
    given["policy_weight"] = given["policy_weight"].detach().requires_grad_(not frozen)
    options = {"variant": "tdpo1", "reduction": "mean" if frozen else "none"}

    def loss(*tensors):
        changed = {**given, **dict(zip(names, tensors, strict=True))}
        return tdpo_ext.linear_tdpo_loss(**changed, shift_labels=labels, **options).loss

    assert gradcheck(loss, [given[name] for name in names])


def test_gradgradcheck_of_the_reference():
    given, leaves, labels = small(policy_bias=True, logit_softcap=2.0)

    def loss(*tensors):
        changed = {**given, **dict(zip(NAMES, tensors, strict=True))}
        return tdpo_ext.reference.linear_tdpo_loss(**changed, shift_labels=labels, alpha=0.0).loss

    assert gradcheck(loss, leaves)
    assert gradgradcheck(loss, leaves)


def differentiate_twice(loss: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("way", ["recompute", "direction", "whole pairs"])
def test_a_second_derivative_names_the_reference(on_host, way):
    given, leaves, labels = small()
    if way == "direction":
        given["policy_weight"] = given["policy_weight"].detach()
        leaves = leaves[:1]
    reduction = "none" if way == "recompute" else "mean"
    loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        differentiate_twice(loss, leaves)


def test_the_graph_may_be_retained_but_where_gradients_are_scaled_in_place(on_host):
    given, leaves, labels = small()
    loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels, reduction="none").loss.sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss = tdpo_ext.linear_tdpo_loss(**given, shift_labels=labels).loss
    torch.autograd.grad(loss, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("frozen", [False, True])
def test_upstream_gradients_scale_the_loss(on_host, frozen):
    """As a loss scaler's do, or a weight of this loss among others."""
    given, leaves = requiring_grad(arguments_of(4, 5), frozen)
    labels = labels_for(torch.empty(4, 5, 131), 0.2)
    plain = torch.autograd.grad(tdpo_ext.linear_tdpo_loss(**given, labels=labels).loss, leaves)
    loss = tdpo_ext.linear_tdpo_loss(**given, labels=labels).loss
    for a, b in zip(torch.autograd.grad(-3 * loss, leaves), plain, strict=True):
        torch.testing.assert_close(a, -3 * b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(on_host, dtype):
    given = arguments_of(5, vocabulary=33, dtype=dtype, policy_bias=True, reference_bias=True)
    heads = [
        given[f"{side}_{name}"]
        for side in ("policy", "reference")
        for name in ("hidden", "weight", "bias")
    ]
    labels = torch.tensor([1, -100, 3, 32, 0])
    options = (0.7, 3.0, 1.0, 0.0, -100, 10_000, "", 0, 0)
    torch.library.opcheck(OPS.linear_token_stats.default, (*heads, labels, *options))
    normalizers = OPS.linear_token_stats(*heads, labels, *options)[3]
    upstream = torch.randn(2, 5)
    wanted = [True, True, True]
    arguments = (*heads, labels, normalizers, *upstream, *options, wanted)
    torch.library.opcheck(OPS.linear_token_stats_backward.default, arguments)
    torch.library.opcheck(
        OPS.linear_token_stats_direction.default, (*heads, labels, torch.rand(5), *options)
    )
    bounds = torch.tensor([0, 2, 2, 3, 5])
    loss_options = (0.1, 0.5, "tdpo2", 0.0, True, 0.5, 2, wanted)
    torch.library.opcheck(
        OPS.linear_tdpo_gradients.default, (*heads, labels, bounds, 4, *options, *loss_options)
    )


WAYS = ["recompute", "direction", "whole pairs"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_traced_in_one_graph(variant, alpha, way):
    check_compiled(variant, alpha, way, "aot_eager")


@pytest.mark.parametrize(
    "way", ["recompute", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])]
)
def test_compiled_by_inductor(way):
    check_compiled("tdpo2", 0.5, way, "inductor")


def check_compiled(variant, alpha, way, backend_of_compile):
    torch.compiler.reset()
    module = tdpo_ext.LinearTDPOLoss(
        variant=variant, alpha=alpha, chunk_bytes=10_000 if way == "recompute" else None
    )
    compiled = torch.compile(module, fullgraph=True, backend=backend_of_compile)
    for tokens in (5, 7, 9):
        given, leaves = requiring_grad(arguments_of(4, tokens), frozen=way == "direction")
        labels = labels_for(torch.empty(4, tokens, 131), 0.2)
        ours, wanted = (
            loss_and_gradients(given, leaves, loss=function, labels=labels)
            for function in (compiled, module)
        )
        for a, b in zip((*ours[0], *ours[1]), (*wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 5, 9, 17, 20])], ids=["", "packed"])
def test_the_module_is_the_function(on_host, bounds):
    shape = (4, 5) if bounds is None else (20,)
    given = arguments_of(*shape, policy_bias=True, reference_bias=True)
    labels = labels_for(torch.empty(*shape, 131), 0.2)
    options = {
        "beta": 0.3,
        "alpha": 0.7,
        "variant": "tdpo1",
        "label_smoothing": 0.1,
        "average_log_prob": True,
        "reduction": "sum",
        "ignore_index": -1,
        "logit_scale": 0.5,
        "logit_softcap": 4.0,
        "reference_logit_scale": 2.0,
        "reference_logit_softcap": 3.0,
        "chunk_bytes": 30_000,
    }
    labels[labels == -100] = -1
    module = tdpo_ext.LinearTDPOLoss(**options)
    given |= {"labels": labels, "cu_seqlens": bounds}
    for a, b in zip(module(**given), tdpo_ext.linear_tdpo_loss(**given, **options), strict=True):
        assert torch.equal(a, b)
    assert all(f"{name}=" in repr(module) for name in options)
    assert "process_group" not in repr(module)  # there is none


def test_under_autocast_operands_get_its_dtype(on_host):
    given, leaves = requiring_grad(arguments_of(4, 5))
    given["reference_hidden"] = given["reference_hidden"].bfloat16()
    labels = labels_for(torch.empty(4, 5, 131), 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        output, gradients = loss_and_gradients(given, leaves, labels=labels)
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    wanted = tdpo_ext.linear_tdpo_loss(**half, labels=labels)
    assert torch.equal(output.loss, wanted.loss)
    assert all(g.dtype == torch.float32 for g in gradients)


def test_autocast_leaves_float64_alone(on_host):
    """As it does in torch.nn.functional.linear."""
    given, labels = arguments_of(4, 5, dtype=torch.float64), labels_for(torch.empty(4, 5, 131), 0.2)
    wanted = tdpo_ext.linear_tdpo_loss(**given, labels=labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tdpo_ext.linear_tdpo_loss(**given, labels=labels).loss, wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_reference_computed_in_inference_mode(on_host, frozen):
    given, leaves = requiring_grad(arguments_of(4, 5), frozen)
    labels = labels_for(torch.empty(4, 5, 131), 0.2)
    options = {"shift_labels": labels, "chunk_bytes": 10_000}
    _, wanted = loss_and_gradients(given, leaves, **options)
    with torch.inference_mode():
        for name in ("reference_hidden", "reference_weight"):
            given[name] = given[name].clone()
        assert tdpo_ext.linear_tdpo_loss(**given, **options).loss.isfinite()
    _, ours = loss_and_gradients(given, leaves, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_tied_heads(on_host):
    """One weight for both models: the reference's side is a constant."""
    given, leaves = requiring_grad(arguments_of(4, 5, reference_width=19))
    given["reference_weight"] = given["policy_weight"].detach()
    labels = labels_for(torch.empty(4, 5, 131), 0.2)
    _, ours = loss_and_gradients(given, leaves, labels=labels)
    reference = tdpo_ext.reference.linear_tdpo_loss
    _, wanted = loss_and_gradients(given, leaves, loss=reference, labels=labels)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_hidden_states_that_are_slices(on_host):
    given = arguments_of(4, 6)
    whole = {k: v[:, :-1] if k.endswith("hidden") else v for k, v in given.items()}
    whole, leaves = requiring_grad(whole)
    labels = torch.randint(0, 131, (4, 5))
    output, gradients = loss_and_gradients(whole, leaves, shift_labels=labels)
    dense = {k: v.detach().contiguous() for k, v in whole.items()}
    dense, leaves = requiring_grad(dense)
    wanted, wanted_gradients = loss_and_gradients(dense, leaves, shift_labels=labels)
    for a, b in zip((*output, *gradients), (*wanted, *wanted_gradients), strict=True):
        assert torch.equal(a, b)


REFUSED = {
    "widths differ": ({"policy_weight": torch.randn(9, 4)}, ValueError, "policy_weight.*H"),
    "reference's width": ({"reference_weight": torch.randn(9, 4)}, ValueError, "reference_weight"),
    "vocabularies differ": (
        {"reference_weight": torch.randn(8, 3)},
        ValueError,
        "reference_weight.*9",
    ),
    "dtypes differ": ({"policy_weight": torch.randn(9, 5).bfloat16()}, TypeError, "policy_weight"),
    "integers": (
        {"policy_hidden": torch.zeros(4, 6, 5, dtype=torch.int64)},
        TypeError,
        "policy_hidden",
    ),
    "tokens differ": ({"reference_hidden": torch.randn(4, 5, 3)}, ValueError, "reference_hidden"),
    "no matrix": ({"policy_weight": torch.randn(5)}, ValueError, r"policy_weight.*\[V, H\]"),
    "bias": ({"policy_bias": torch.randn(8)}, ValueError, "policy_bias"),
    "reference's bias": ({"reference_bias": torch.randn(9).double()}, TypeError, "reference_bias"),
    "no tensor": ({"reference_weight": None}, TypeError, "reference_weight"),
    "reference requires grad": (
        {"reference_weight": torch.randn(9, 3, requires_grad=True)},
        ValueError,
        "reference_weight.*detach",
    ),
    "one in float64": (
        {
            "reference_hidden": torch.randn(4, 6, 3).double(),
            "reference_weight": torch.randn(9, 3).double(),
        },
        TypeError,
        "float64",
    ),
    "another device": ({"policy_weight": torch.randn(9, 5, device="meta")}, ValueError, "device"),
    "the reference on another device": (
        {
            "reference_hidden": torch.randn(4, 6, 3, device="meta"),
            "reference_weight": torch.randn(9, 3, device="meta"),
        },
        ValueError,
        "reference_hidden must be on the device of policy_hidden",
    ),
    "no vocabulary": (
        {"policy_weight": torch.randn(0, 5), "reference_weight": torch.randn(0, 3)},
        ValueError,
        "V, H >= 1",
    ),
    "reference's bias requires grad": (
        {"reference_bias": torch.randn(9, requires_grad=True)},
        ValueError,
        "reference_bias.*detach",
    ),
    "labels": ({"labels": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, "labels"),
    "labels on another device": (
        {"labels": torch.zeros(4, 6, dtype=torch.int64, device="meta")},
        ValueError,
        "labels must be on the device",
    ),
    "label too large": ({"labels": torch.full((4, 6), 9)}, IndexError, "labels.*got 9"),
    "scale": ({"logit_scale": float("inf")}, ValueError, "logit_scale"),
    "reference's scale": (
        {"reference_logit_scale": float("nan")},
        ValueError,
        "reference_logit_scale",
    ),
    "softcap infinite": ({"logit_softcap": float("inf")}, ValueError, "logit_softcap"),
    "softcap 0": ({"logit_softcap": 0.0}, ValueError, "logit_softcap"),
    "softcap negative": ({"reference_logit_softcap": -1.0}, ValueError, "reference_logit_softcap"),
    "softcap a string": ({"logit_softcap": "30"}, TypeError, "logit_softcap"),
    "ignore_index a float": ({"ignore_index": -100.0}, TypeError, "ignore_index"),
    "chunk_bytes 0": ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
    "chunk_bytes a bool": ({"chunk_bytes": True}, TypeError, "chunk_bytes"),
    "chunk_bytes float": ({"chunk_bytes": 1e6}, TypeError, "chunk_bytes"),
}


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference], ids=["ours", "reference"])
@pytest.mark.parametrize("name", ["linear_token_stats", "linear_tdpo_loss"])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, name, module):
    changes, error, message = REFUSED[case]
    given = arguments_of(4, 6, vocabulary=9, width=5, reference_width=3)
    given |= {"labels": torch.zeros(4, 6, dtype=torch.int64), **changes}
    with pytest.raises(error) as caught:
        getattr(module, name)(**given)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 6), "policy_hidden.*even"), ((6,), "policy_hidden.*cu_seqlens")]
)
def test_the_loss_refuses_what_are_no_pairs(shape, message):
    given = arguments_of(*shape, vocabulary=9)
    with pytest.raises(ValueError, match=message):
        tdpo_ext.linear_tdpo_loss(**given, labels=torch.zeros(*shape, dtype=torch.int64))


@pytest.mark.parametrize("module", [tdpo_ext, tdpo_ext.reference], ids=["ours", "reference"])
@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("reduction", "batchmean"),
        ("variant", "tdpo3"),
        ("beta", 0.0),
        ("alpha", -0.1),
        ("label_smoothing", 0.5),
    ],
)
def test_the_loss_refuses_options(option, wrong, module):
    given = arguments_of(4, 6, vocabulary=9) | {option: wrong}
    with pytest.raises(ValueError, match=option):
        module.linear_tdpo_loss(**given, labels=torch.zeros(4, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "wrong"),
    [("logit_scale", float("nan")), ("logit_softcap", -1.0), ("chunk_bytes", -1), ("beta", -1.0)],
)
def test_the_module_refuses_when_it_is_made(option, wrong):
    with pytest.raises(ValueError, match=option):
        tdpo_ext.LinearTDPOLoss(**{option: wrong})
