"""The op from logits to the loss: shapes, sequences and derivatives that its own kernels have."""

from __future__ import annotations

from typing import Any

import emulated
import numpy as np
import oracle
import pytest
import torch
from inputs import DTYPES, labels_for, numpy64, pair_of_logits, relative_error
from logit_checks import METHODS, loss_and_gradient
from torch import Tensor
from torch.autograd import gradcheck

import tdpo_ext
from tdpo_ext.loss import LossOptions
from tdpo_ext.token_statistics import loss_ops
from tdpo_ext.token_statistics.loss_kernels import Batch

OPS = torch.ops.tdpo_ext


def packed_labels(lengths: list[int], labels: Tensor) -> Tensor:
    """Aligned by hand: each label stands at the position before it, the last of each is ignored."""
    parts = []
    for part in labels.split(lengths):
        parts += [part[1:], torch.full((min(1, len(part)),), -100)]
    return torch.cat(parts)


def check_packed(lengths: list[int], vocabulary: int = 17, **options: Any) -> None:
    """Losses and gradients of packed sequences against the oracle, which takes padded ones."""
    total, width = sum(lengths), max(1, *lengths)
    options["beta"] = 1 / width  # so that no loss is saturated
    policy, reference = pair_of_logits(total, vocabulary)
    labels = labels_for(policy, 0.3)
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    weights = torch.randn(len(lengths) // 2)
    output, gradient = loss_and_gradient(
        policy,
        reference,
        labels,
        cu_seqlens=bounds,
        reduction="none",
        weights=weights,
        **options,
    )
    inside = np.arange(width) < np.array(lengths)[:, None]
    z, r = np.zeros((2, *inside.shape, vocabulary))
    y = np.full(inside.shape, -100)
    z[inside], r[inside] = numpy64(policy), numpy64(reference)
    y[inside] = packed_labels(lengths, labels).cpu().numpy()
    truth = oracle.tdpo_loss(z, r, y, weights=numpy64(weights), **options)
    assert relative_error(output.losses, truth.losses) <= 1e-6
    assert relative_error(output.loss, truth.losses) <= 1e-6
    assert relative_error(gradient, truth.gradient[inside]) <= 1e-6
    logps = torch.cat((output.chosen_logps, output.rejected_logps))
    assert relative_error(logps, truth.logps) <= 1e-6


LENGTHS = {
    "one pair": [5, 3],
    "one token each": [1, 1, 1, 1],
    "some empty": [0, 4, 0, 0, 7, 0],
    "all empty but one": [0, 0, 0, 3],
    "short beside long": [1, 600, 300, 2],
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_sequences_against_the_oracle(backend, lengths, average):
    check_packed(lengths, variant="tdpo1", label_smoothing=0.1, average_log_prob=average)
    check_packed(lengths, alpha=0.7, average_log_prob=average)


def test_many_packed_sequences(on_processor):
    lengths = torch.randint(0, 4, (10_000,)).tolist()
    check_packed(lengths, vocabulary=3)


def test_a_sequence_of_one_token_beside_one_of_65536(on_processor):
    check_packed([1, 65_536], vocabulary=2)


@pytest.mark.parametrize("shape", [(2, 1, 9), (2, 0, 9), (0, 3, 9), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_shapes_at_the_edges(backend, shape, shifted):
    policy, reference = pair_of_logits(*shape, dtype=torch.float64)
    labels = {"labels" if shifted else "shift_labels": labels_for(policy)}
    for reduction in ("none", "mean", "sum"):
        ours, wanted = (
            loss(policy, reference, **labels, reduction=reduction)
            for loss in (tdpo_ext.tdpo_loss, tdpo_ext.reference.tdpo_loss)
        )
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_all_ignored(backend):
    policy, reference = pair_of_logits(4, 5, 9)
    labels = torch.full((4, 5), -100)
    output, gradient = loss_and_gradient(policy, reference, labels, average_log_prob=True)
    assert output.loss.item() == pytest.approx(np.log(2))
    assert not gradient.any()
    assert not torch.stack(output[2:]).any()


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_one_token_kept(backend, kept):
    """The others are not counted in the mean, and their gradient is 0."""
    policy, reference = pair_of_logits(2, 8, 33)
    labels = torch.full((2, 8), -100)
    labels[0, kept] = 5
    stats = tdpo_ext.token_stats(policy, reference, labels)
    for average in (False, True):
        output, gradient = loss_and_gradient(
            policy, reference, shift_labels=labels, average_log_prob=average
        )
        assert output.chosen_logps == stats.policy_logps[0, kept]
        assert output.chosen_kl == stats.forward_kl[0, kept]
        assert gradient[0, kept].any()
        gradient[0, kept] = 0
        assert not gradient.any()


def test_sums_keep_the_digits_that_float32_loses(compiled):
    """4096 tokens whose statistics are equal: their sum is 4096 times one of them."""
    policy, reference = pair_of_logits(1, 1, 11)
    shape = (2, 4096, 11)
    labels = torch.full(shape[:2], 3)
    output = tdpo_ext.tdpo_loss(
        policy.expand(shape), reference.expand(shape), shift_labels=labels, beta=1.0
    )
    stats = tdpo_ext.token_stats(policy, reference, labels[:1, :1])
    assert output.chosen_logps.item() == 4096 * stats.policy_logps.item()
    assert output.rejected_kl.item() == 4096 * stats.forward_kl.item()
    assert output.losses.item() == pytest.approx(np.log(2), rel=1e-7)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_gradcheck_with_any_upstream_gradient(backend, variant, alpha, packed):
    policy, reference = pair_of_logits(4, 3, 5, dtype=torch.float64)
    labels, options = labels_for(policy, 0.2), {}
    if packed:
        policy, reference, labels = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.tensor([0, 4, 5, 5, 12])
    # TDPO2 stops the gradient of the chosen response's KL, which differences do not know of: so
    # the chosen response has no tokens there.
    if variant == "tdpo2" and alpha:
        labels[: (5 if packed else 2)] = -100

    def losses(z: Tensor) -> Tensor:
        return tdpo_ext.tdpo_loss(
            z,
            reference,
            labels,
            variant=variant,
            alpha=alpha,
            label_smoothing=0.2,
            average_log_prob=True,
            reduction="none",
            **options,
        ).loss

    # gradcheck asks for the gradient of each pair's loss by itself.
    assert gradcheck(losses, policy.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_in_place_the_gradient_is_the_same_and_lies_over_the_logits(backend, packed, dtype):
    policy, reference = pair_of_logits(4, 3, 1001, dtype=dtype)
    labels, options = labels_for(policy, 0.2), {}
    if packed:
        policy, reference, labels = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.tensor([0, 4, 5, 5, 12])
    _, wanted = loss_and_gradient(policy, reference, labels, **options)
    logits = policy.clone().requires_grad_() * 1
    loss = tdpo_ext.tdpo_loss(logits, reference, labels, inplace_backward=True, **options).loss
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(gradient, wanted)
    assert gradient.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["reference", "labels", "cu_seqlens"])
def test_a_constant_that_changes_before_backward_is_noticed(backend, which):
    policy, reference = pair_of_logits(12, 9)
    constants = reference, labels_for(policy), torch.tensor([0, 3, 6, 9, 12])
    policy.requires_grad_()
    loss = tdpo_ext.tdpo_loss(policy, *constants[:2], cu_seqlens=constants[2]).loss
    constants[which].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_bytes_that_are_kept_for_backward(compiled):
    """Beside the caller's own tensors: eight normalizers a token and a slope a sequence."""
    policy, reference = pair_of_logits(6, 7, 50)
    policy.requires_grad_()
    labels, kept = labels_for(policy), []
    own = {policy.data_ptr(), reference.data_ptr(), labels.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        tdpo_ext.tdpo_loss(policy, reference, labels, average_log_prob=True)
    sizes = [x.untyped_storage().nbytes() for x in kept if x.data_ptr() not in own]
    assert sorted(sizes) == [6 * 4, 6 * 7 * 8 * 4]
    assert own <= {x.data_ptr() for x in kept}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_opcheck(backend, packed, reduction):
    policy, reference = pair_of_logits(4, 3, 17)
    labels, bounds = labels_for(policy, 0.2), None
    if packed:
        policy, reference, labels = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        bounds = torch.tensor([0, 4, 5, 5, 12])
    batch = labels, True, bounds, -100
    arguments = (policy, reference, *batch, 0.1, 0.5, "tdpo2", 0.1, True, reduction)
    torch.library.opcheck(OPS.tdpo_loss.default, arguments)
    loss, _, slopes, normalizers = OPS.tdpo_loss(*arguments)
    rest = normalizers, slopes, torch.randn_like(loss), 0.5, "tdpo2"
    torch.library.opcheck(OPS.tdpo_loss_backward.default, (policy, reference, *batch, *rest))
    torch.library.opcheck(OPS.tdpo_loss_backward_.default, (policy, reference, *batch, *rest))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_from_statistics_it_is_the_same_loss(backend, variant, alpha, packed, reduction):
    """As the fused head and sharded vocabularies make it, with the same slopes."""
    policy, reference = pair_of_logits(4, 6, 17)
    labels, bounds = labels_for(policy, 0.2), None
    if packed:
        policy, reference, labels = policy.flatten(0, 1), reference.flatten(0, 1), labels.flatten()
        bounds = torch.tensor([0, 8, 9, 9, 24])
    batch = labels, False, bounds, -100
    options = 0.3, alpha, variant, 0.1, True, reduction
    loss, pairs, slopes, _ = OPS.tdpo_loss(policy, reference, *batch, *options)
    stats = tdpo_ext.token_stats(policy.requires_grad_(), reference, labels)
    arguments = (*(x.detach() for x in stats), *batch, *options)
    for ours, wanted in zip(OPS.tdpo_loss_of_stats(*arguments), (loss, pairs, slopes), strict=True):
        assert torch.equal(ours, wanted)
    torch.library.opcheck(OPS.tdpo_loss_of_stats.default, arguments)
    weights = torch.randn(loss.shape)
    rest = bounds, slopes, weights, alpha, variant
    torch.library.opcheck(OPS.tdpo_loss_of_stats_backward.default, (arguments[0], *rest))

    from_stats = loss_ops.tdpo_loss_of_stats(stats, Batch(*batch), LossOptions(*options)).loss
    (ours,) = torch.autograd.grad((from_stats * weights).sum(), policy)
    from_logits = loss_ops.tdpo_loss(
        policy, reference, Batch(*batch), LossOptions(*options), inplace_backward=False
    ).loss
    (wanted,) = torch.autograd.grad((from_logits * weights).sum(), policy)
    assert torch.equal(ours, wanted)


def test_a_second_derivative_of_the_loss_of_statistics_is_refused(backend):
    policy, reference = pair_of_logits(4, 6, 17)
    labels = labels_for(policy)
    stats = tdpo_ext.token_stats(policy.requires_grad_(), reference, labels)
    leaf = stats.policy_logps.detach().requires_grad_()
    options = LossOptions(0.3, 0.5, "tdpo2", 0.1, False, "mean")
    batch = Batch(labels, False, None, -100)
    loss = loss_ops.tdpo_loss_of_stats(stats._replace(policy_logps=leaf), batch, options).loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        gradient.square().sum().backward()


def test_in_place_a_second_derivative_of_the_loss_is_refused(backend):
    policy, reference = pair_of_logits(4, 6, 17)
    policy.requires_grad_()
    labels = labels_for(policy)
    loss = tdpo_ext.tdpo_loss(policy * 1, reference, labels, inplace_backward=True).loss
    with pytest.raises(RuntimeError, match=r"tdpo_ext\.reference"):
        torch.autograd.grad(loss, policy, create_graph=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(on_processor, threads):
    policy, reference = pair_of_logits(6, 50, 4000)
    labels, before = labels_for(policy, 0.2), torch.get_num_threads()
    found = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            output, gradient = loss_and_gradient(policy, reference, labels)
            found.append([*output, gradient])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- the CUDA kernels -----------------------------------------------------------------------------


def test_bits_do_not_depend_on_the_order_in_which_warps_run(emulated_core):
    policy, reference = pair_of_logits(4, 500, 9)
    labels, found = labels_for(policy, 0.2), []
    for backwards in (0, 1):
        emulated_core.run_warps_backwards(backwards)
        output, gradient = loss_and_gradient(policy, reference, labels)
        found.append([*output, gradient])
    emulated_core.run_warps_backwards(0)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_four_launches_forward_and_one_backward(emulated_core):
    policy, reference = pair_of_logits(4, 5, 9)
    logits, launches = policy.requires_grad_(), emulated.library().emulated_launches
    start = launches()
    loss = tdpo_ext.tdpo_loss(logits, reference, labels_for(policy)).loss
    forward = launches() - start
    loss.backward()
    assert (forward, launches() - start - forward) == (4, 1)


@pytest.mark.parametrize(
    "bounds",
    [[0, 5, 3, 8, 12], [1, 3, 6, 9, 12], [0, 3, 6, 9, 11], [0, 3, -5, 9, 10**12], [0]],
    ids=str,
)
def test_bounds_that_do_not_ascend_give_nan_where_nobody_looks(cuda_unchecked, bounds):
    """With one bound there is no sequence, and the tensor of slopes has no address."""
    policy, reference = pair_of_logits(12, 9)
    output, gradient = loss_and_gradient(
        policy, reference, labels_for(policy), cu_seqlens=torch.tensor(bounds)
    )
    assert all(value.isnan().all() for value in output)
    assert (gradient.isnan() | (gradient == 0)).all()  # 0 where the label is ignored
