"""torch.compile beside the habits that graph capture likes to break."""

from __future__ import annotations

import pytest
import torch
from inputs import labels_for, pair_of_logits
from torch import Tensor

import tdpo_ext


@pytest.fixture(params=["aot_eager", "inductor"])
def compile_loss(request):
    torch.compiler.reset()
    yield torch.compile(tdpo_ext.tdpo_loss, fullgraph=True, backend=request.param)
    torch.compiler.reset()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    policy, reference = pair_of_logits(4, 6, 33)
    return policy, reference, labels_for(policy, 0.2)


def eager_gradient(policy: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    policy = policy.clone().requires_grad_()
    return torch.autograd.grad(tdpo_ext.tdpo_loss(policy, reference, labels).loss, policy)[0]


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "output of a model"])
def test_in_place_the_compiled_gradient_is_the_eager_one(compile_loss, batch, leaf):
    if leaf and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 does not compile a backward that writes to a leaf: it raises")
    policy, reference, labels = batch
    wanted = eager_gradient(*batch)
    logits = policy.clone().requires_grad_()
    logits = logits if leaf else logits * 1
    loss = compile_loss(logits, reference, labels, inplace_backward=True).loss
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(gradient, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_in_place_leaves_logits_alone_that_the_graph_still_needs(batch):
    """The logits have a second use in the same graph, whose backward reads them."""
    torch.compiler.reset()
    policy, reference, labels = batch

    def function(policy: Tensor, inplace: bool) -> Tensor:
        logits = policy * 1
        loss = tdpo_ext.tdpo_loss(logits, reference, labels, inplace_backward=inplace).loss
        return loss + logits.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for run, inplace in ((function, False), (compiled, True)):
        leaf = policy.clone().requires_grad_()
        gradients += torch.autograd.grad(run(leaf, inplace), leaf)
    torch.testing.assert_close(*gradients)


def test_any_upstream_gradient_reaches_the_pairs(compile_loss, batch):
    policy, reference, labels = batch
    weights, gradients = torch.tensor([0.7, -1.3]), []
    for function in (compile_loss, tdpo_ext.tdpo_loss):
        leaf = policy.clone().requires_grad_()
        losses = function(leaf, reference, labels, reduction="none").loss
        gradients += torch.autograd.grad((losses * weights).sum(), leaf)
    torch.testing.assert_close(*gradients)
