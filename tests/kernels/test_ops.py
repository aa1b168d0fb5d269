"""torch's own checks of the ops; compilation; autocast."""

from __future__ import annotations

import pytest
import torch
from inputs import DTYPES, labels_for, pair_of_logits
from torch._dynamo.testing import CompileCounterWithBackend

import tdpo_ext
from tdpo_ext.token_statistics import fallback

OPS = torch.ops.tdpo_ext


def forward_arguments(*shape, dtype=torch.float32):
    policy, reference = pair_of_logits(*shape, dtype=dtype)
    return policy, reference, labels_for(policy, 0.2), -100


def backward_arguments(*shape, dtype=torch.float32):
    policy, reference, labels, ignore_index = forward_arguments(*shape, dtype=dtype)
    logps, _, _, normalizers = OPS.token_stats(policy, reference, labels, ignore_index)
    gradients = torch.randn(2, *labels.shape, dtype=logps.dtype)
    return policy, reference, labels, normalizers, *gradients, ignore_index


SHAPES = [(5,), (3, 17), (2, 3, 40), (4, 9)]


@pytest.mark.parametrize(("dtype", "shape"), [*zip(DTYPES, SHAPES, strict=True)], ids=str)
def test_opcheck(backend, dtype, shape):
    torch.library.opcheck(OPS.token_stats.default, forward_arguments(*shape, dtype=dtype))
    arguments = backward_arguments(*shape, dtype=dtype)
    torch.library.opcheck(OPS.token_stats_backward.default, arguments)
    torch.library.opcheck(OPS.token_stats_backward_.default, arguments)


def test_opcheck_of_transposed_logits(backend):
    """The gradient is laid out as the fake says, whatever the strides."""
    policy, *rest = backward_arguments(4, 3, 17)
    policy = policy.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(OPS.token_stats_backward.default, (policy, *rest))


def test_opcheck_of_the_bounds():
    torch.library.opcheck(OPS.sequence_bounds.default, (torch.tensor([0, 2, 2, 7]), 7))


def run(function, policy, *arguments, **options):
    policy = policy.detach().clone().requires_grad_()
    output = function(policy * 1, *arguments, **options)
    return (*output, *torch.autograd.grad(output.loss, policy))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("variant", "alpha"), [("tdpo1", 0.5), ("tdpo2", 0.5), ("tdpo2", 0.0)])
def test_compiled_in_one_graph_with_dynamic_shapes(variant, alpha, inplace):
    torch.compiler.reset()
    module = tdpo_ext.TDPOLoss(variant=variant, alpha=alpha, inplace_backward=inplace)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for pairs, tokens in ((2, 6), (3, 9), (5, 4)):
        policy, reference = pair_of_logits(2 * pairs, tokens, 33)
        labels = labels_for(policy, 0.2)
        ours, wanted = (run(f, policy, reference, labels) for f in (compiled, module))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b)
        first = first or counter.frame_count
        assert counter.frame_count == first, "a new shape must not mean a new graph"


def test_compiled_by_inductor():
    torch.compiler.reset()
    policy, reference = pair_of_logits(4, 6, 33)
    labels = labels_for(policy, 0.2)
    function = torch.compile(tdpo_ext.tdpo_loss, fullgraph=True)
    for a, b in zip(
        run(function, policy, reference, labels),
        run(tdpo_ext.tdpo_loss, policy, reference, labels),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiled_with_packed_sequences():
    torch.compiler.reset()
    compiled = torch.compile(tdpo_ext.tdpo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([0, 3, 9, 11, 15], [0, 5, 6, 6, 8]):
        policy, reference = pair_of_logits(lengths[-1], 33)
        labels = labels_for(policy)
        options = {"cu_seqlens": torch.tensor(lengths)}
        ours = run(compiled, policy, reference, labels, **options)
        for a, b in zip(
            ours, run(tdpo_ext.tdpo_loss, policy, reference, labels, **options), strict=True
        ):
            torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="cu_seqlens"):
        compiled(policy, reference, labels, cu_seqlens=torch.tensor([0, 5, 4, 6, 8]))


def test_a_compiled_label_outside_the_vocabulary_still_raises():
    torch.compiler.reset()
    function = torch.compile(tdpo_ext.token_stats, fullgraph=True, backend="aot_eager")
    policy, reference = pair_of_logits(4, 33)
    with pytest.raises(IndexError, match="labels"):
        function(policy, reference, torch.tensor([0, 1, 33, 2]))


def test_the_reference_compiles():
    torch.compiler.reset()
    compiled = torch.compile(tdpo_ext.reference.tdpo_loss, fullgraph=True, backend="aot_eager")
    policy, reference = pair_of_logits(4, 6, 33)
    labels = labels_for(policy, 0.2)
    ours, wanted = (
        run(f, policy, reference, labels) for f in (compiled, tdpo_ext.reference.tdpo_loss)
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    policy, reference = pair_of_logits(4, 6, 33, dtype=dtype)
    labels = labels_for(policy, 0.2)
    wanted = run(tdpo_ext.tdpo_loss, policy, reference, labels)
    with torch.autocast(policy.device.type, torch.bfloat16):
        ours = run(tdpo_ext.tdpo_loss, policy, reference, labels)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_around_a_model(backend):
    model, (_, reference) = torch.nn.Linear(8, 33), pair_of_logits(4, 6, 33, dtype=torch.bfloat16)
    hidden = torch.randn(4, 6, 8)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        logits = model(hidden)
        assert logits.dtype == torch.bfloat16
        loss = tdpo_ext.TDPOLoss()(logits, reference, labels_for(reference)).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.isfinite().all()


def test_both_implementations_save_the_same_for_backward(compiled):
    policy, reference = pair_of_logits(7, 2100)
    arguments = (policy, reference, labels_for(policy), -100)
    _, _, _, ours = OPS.token_stats(*arguments)
    _, _, _, wanted = fallback.forward(*arguments)

    def log_sums(saved):  # the maxima are a choice: any number near them will do
        return torch.stack((saved[:, 0] - saved[:, 1].log(), saved[:, 2] - saved[:, 3].log()))

    torch.testing.assert_close(log_sums(ours), log_sums(wanted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 4:], wanted[:, 4:], rtol=1e-5, atol=1e-5)
