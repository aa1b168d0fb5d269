"""Derivatives: checked by differences, refused a second time, written in place when asked."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, labels_for, pair_of_logits
from torch.autograd import gradcheck, gradgradcheck

import tdpo_ext


def small(*shape):
    policy, reference = pair_of_logits(*shape, dtype=torch.float64)
    return policy.requires_grad_(), reference, labels_for(policy, 0.2)


def test_gradcheck_of_the_op(backend):
    policy, reference, labels = small(5, 11)
    reference[1, ::3] = -torch.inf
    assert gradcheck(lambda z: tdpo_ext.token_stats(z, reference, labels), policy)


def test_gradcheck_of_close_rows(backend):
    _, reference, labels = small(5, 11)
    policy = (reference + 0.01 * torch.randn_like(reference)).requires_grad_()
    assert gradcheck(lambda z: tdpo_ext.token_stats(z, reference, labels), policy)


def test_a_second_derivative_through_the_op_names_the_reference(backend):
    policy, reference, labels = small(4, 3, 7)
    loss = tdpo_ext.tdpo_loss(policy, reference, labels).loss
    (gradient,) = torch.autograd.grad(loss, policy, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("close", [False, True])
def test_gradgradcheck_of_the_reference(close):
    policy, reference, labels = small(4, 7)
    if close:
        policy = (reference + 0.05 * torch.randn_like(reference)).requires_grad_()
    function = lambda z: tdpo_ext.reference.token_stats(z, reference, labels)  # noqa: E731
    assert gradcheck(function, policy)
    assert gradgradcheck(function, policy)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("variant", "alpha"), [("tdpo1", 0.5), ("tdpo2", 0.0)])
def test_gradgradcheck_of_the_reference_loss(variant, alpha, packed):
    # TDPO2 with alpha > 0 stops a gradient, so differences do not check it; the oracle does.
    policy, reference, labels = small(4, 3, 5)
    options = {"variant": variant, "alpha": alpha, "label_smoothing": 0.1, "reduction": "sum"}
    if packed:
        reference, labels = reference.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.tensor([0, 4, 4, 9, 12])

    def function(z):
        z = z.flatten(0, 1) if packed else z
        return tdpo_ext.reference.tdpo_loss(z, reference, labels, **options).loss

    assert gradcheck(function, policy)
    assert gradgradcheck(function, policy)


def gradient_of(policy, reference, labels, **options):
    stats = tdpo_ext.token_stats(policy, reference, labels, **options)
    weights = torch.linspace(-1, 1, labels.numel(), dtype=stats.policy_logps.dtype)
    return torch.autograd.grad(
        (stats.policy_logps * weights).sum() + (stats.forward_kl * weights.cos()).sum(), policy
    )[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_the_gradient_is_the_same_and_lies_over_the_logits(backend, dtype):
    policy, reference = pair_of_logits(9, 3001, dtype=dtype)
    labels = labels_for(policy, 0.3)
    wanted = gradient_of(policy.clone().requires_grad_(), reference, labels)
    logits = policy.clone().requires_grad_() * 1  # the output of a model, not a leaf
    gradient = gradient_of(logits, reference, labels, inplace_backward=True)
    assert torch.equal(gradient, wanted)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(logits.detach(), wanted)


def test_in_place_reaches_the_model(backend):
    weight = torch.randn(16, 40, requires_grad=True)
    hidden, (_, reference) = torch.randn(4, 6, 16), pair_of_logits(4, 6, 40)
    labels = labels_for(reference)
    gradients = []
    for inplace in (False, True):
        loss = tdpo_ext.TDPOLoss(inplace_backward=inplace)(hidden @ weight, reference, labels).loss
        gradients += torch.autograd.grad(loss, weight)
    assert torch.equal(*gradients)


def test_in_place_a_second_backward_raises(backend):
    policy, reference, labels = small(6, 30)
    logits = policy * 1
    loss = tdpo_ext.token_stats(logits, reference, labels, inplace_backward=True).forward_kl.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("which", [0, 1], ids=["reference", "labels"])
def test_a_constant_that_changes_before_backward_is_noticed(backend, which):
    policy, *constants = small(6, 30)
    loss = tdpo_ext.token_stats(policy, *constants).forward_kl.sum()
    constants[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_a_second_derivative_raises(backend):
    policy, reference, labels = small(6, 30)
    stats = tdpo_ext.token_stats(policy * 1, reference, labels, inplace_backward=True)
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        torch.autograd.grad(stats.forward_kl.sum(), policy, create_graph=True)


def test_the_graph_may_be_retained(backend):
    policy, reference, labels = small(6, 30)
    loss = tdpo_ext.token_stats(policy, reference, labels).forward_kl.sum()
    first, second = (torch.autograd.grad(loss, policy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_only_what_is_used_gets_a_gradient(backend):
    policy, reference, labels = small(6, 30)
    stats = tdpo_ext.token_stats(policy, reference, labels)
    assert stats.policy_logps.requires_grad
    assert stats.forward_kl.requires_grad
    assert not stats.reference_logps.requires_grad
    with torch.no_grad():
        assert not tdpo_ext.token_stats(policy, reference, labels).forward_kl.requires_grad


def test_a_reference_computed_in_inference_mode(backend):
    policy, reference, labels = small(4, 3, 7)
    wanted = torch.autograd.grad(tdpo_ext.tdpo_loss(policy, reference, labels).loss, policy)[0]
    with torch.inference_mode():
        reference, labels = reference.clone(), labels.clone()
        assert tdpo_ext.tdpo_loss(policy, reference, labels).loss.isfinite()
    loss = tdpo_ext.tdpo_loss(policy, reference, labels).loss
    assert torch.equal(torch.autograd.grad(loss, policy)[0], wanted)
