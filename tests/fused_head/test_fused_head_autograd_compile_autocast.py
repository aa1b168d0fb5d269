"""The fused head's derivatives, torch's checks of its ops, compilation, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_checks import (
    METHODS,
    NAMES,
    arguments_of,
    loss_and_gradients,
    requiring_grad,
)
from inputs import labels_for
from torch.autograd import gradcheck, gradgradcheck

import tdpo_ext

OPS = torch.ops.tdpo_ext


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
    loss_options = (0.1, 0.5, "tdpo2", 0.0, True, "mean", 2, wanted)
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
