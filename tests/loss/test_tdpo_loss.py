"""tdpo_loss and its gradient against the oracle, and the ways to say the same batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from inputs import DTYPES, labels_for, pair_of_logits, relative_error
from logit_checks import METHODS, loss_and_gradient, loss_beside_oracle

import tdpo_ext


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_against_the_oracle(backend, variant, alpha, dtype, smoothing, average):
    policy, reference = pair_of_logits(6, 9, 211, gap=0.5, dtype=dtype)
    labels = labels_for(policy, 0.3)
    labels[1] = -100  # a response without a kept token counts as 0 margin and 0 KL
    weights = torch.randn(3)
    options = {
        "beta": 0.2,
        "alpha": alpha,
        "variant": variant,
        "label_smoothing": smoothing,
        "average_log_prob": average,
    }
    output, gradient, truth = loss_beside_oracle(policy, reference, labels, weights, **options)
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert relative_error(output.losses, truth.losses) <= bound
    assert relative_error(torch.cat((output.chosen_kl, output.rejected_kl)), truth.seq_kl) <= bound
    logps = torch.cat((output.chosen_logps, output.rejected_logps))
    assert relative_error(logps, truth.logps) <= bound
    rewards = torch.cat((output.chosen_rewards, output.rejected_rewards))
    assert relative_error(rewards, 0.2 * (truth.margin + truth.seq_kl)) <= 2 * bound
    stored = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, bound)
    assert relative_error(gradient, truth.gradient) <= stored
    assert output.chosen_kl[1] == 0
    assert output.chosen_logps[1] == 0
    assert not gradient[1].any()


@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_reductions(backend, variant, alpha):
    policy, reference = pair_of_logits(8, 5, 50)
    labels = labels_for(policy, 0.2)
    options = {"variant": variant, "alpha": alpha}
    per_pair, none = loss_and_gradient(
        policy, reference, labels, reduction="none", weights=torch.ones(4), **options
    )
    total, sums = loss_and_gradient(policy, reference, labels, reduction="sum", **options)
    average, means = loss_and_gradient(policy, reference, labels, **options)
    assert per_pair.loss.shape == (4,)
    torch.testing.assert_close(per_pair.loss.detach(), per_pair.losses, rtol=0, atol=0)
    torch.testing.assert_close(total.loss, per_pair.loss.sum())
    torch.testing.assert_close(average.loss, per_pair.loss.mean())
    torch.testing.assert_close(none, sums)
    torch.testing.assert_close(sums, 4 * means)


def shifted_by_hand(labels):
    aligned = torch.full_like(labels, -100)
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            aligned[row, t] = labels[row, t + 1]
    return aligned


def test_labels_are_shifted_and_shift_labels_are_not(backend):
    policy, reference = pair_of_logits(4, 7, 33)
    labels = labels_for(policy, 0.3)
    ours = loss_and_gradient(policy, reference, labels)
    aligned = loss_and_gradient(policy, reference, shift_labels=shifted_by_hand(labels))
    sliced = loss_and_gradient(policy[:, :-1], reference[:, :-1], shift_labels=labels[:, 1:])
    assert ours[0].loss == aligned[0].loss == sliced[0].loss
    assert torch.equal(ours[1], aligned[1])
    assert torch.equal(ours[1][:, :-1], sliced[1])
    assert not ours[1][:, -1].any()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_packed_sequences_are_padded_ones_without_the_padding(backend, dtype, average):
    lengths = [5, 0, 3, 7, 1, 4]
    policy, reference = pair_of_logits(6, 7, 33)
    labels = labels_for(policy, 0.2)
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    kept = [(row, slice(0, length)) for row, length in enumerate(lengths)]
    pack = lambda tensor: torch.cat([tensor[index] for index in kept])  # noqa: E731
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=dtype)
    padded, gradient = loss_and_gradient(policy, reference, labels, average_log_prob=average)
    options = {"cu_seqlens": cu_seqlens, "average_log_prob": average}
    packed, packed_gradient = loss_and_gradient(
        pack(policy), pack(reference), pack(labels).to(dtype), **options
    )
    for ours, wanted in zip(packed, padded, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_gradient, pack(gradient), rtol=2e-6, atol=1e-8)
    aligned = pack(shifted_by_hand(labels).masked_fill(last_tokens(lengths, 7), -100))
    again, _ = loss_and_gradient(pack(policy), pack(reference), shift_labels=aligned, **options)
    assert again.loss == packed.loss


def last_tokens(lengths, width):
    position = torch.arange(width)
    return torch.stack([position >= length - 1 for length in lengths])


def test_ignore_index_may_be_a_vocabulary_entry(backend):
    """As with padding token 0: those labels are ignored, not scored."""
    policy, reference = pair_of_logits(4, 6, 20)
    labels = torch.randint(1, 20, (4, 6))
    labels[:, 3:] = 0
    ours, gradient = loss_and_gradient(policy, reference, labels, ignore_index=0)
    wanted, wanted_gradient = loss_and_gradient(
        policy, reference, labels.masked_fill(labels == 0, -100)
    )
    assert ours.loss == wanted.loss
    assert torch.equal(gradient, wanted_gradient)


@pytest.mark.parametrize("bounds", [None, [0, 5, 9, 17, 24]], ids=["", "packed"])
def test_the_module_is_the_function(backend, bounds):
    policy, reference = pair_of_logits(*((4, 6) if bounds is None else (24,)), 20)
    bounds = None if bounds is None else torch.tensor(bounds)
    labels = labels_for(policy, 0.2)
    options = {
        "beta": 0.3,
        "alpha": 0.7,
        "variant": "tdpo1",
        "label_smoothing": 0.1,
        "average_log_prob": True,
        "reduction": "sum",
        "ignore_index": -1,
    }
    labels[labels == -100] = -1
    module = tdpo_ext.TDPOLoss(**options)
    for ours, wanted in zip(
        module(policy, reference, labels, cu_seqlens=bounds),
        tdpo_ext.tdpo_loss(policy, reference, labels, cu_seqlens=bounds, **options),
        strict=True,
    ):
        assert torch.equal(ours, wanted)
    assert all(f"{name}=" in repr(module) for name in options)
    assert "process_group" not in repr(module)  # there is none


def test_only_the_loss_carries_a_gradient_and_metrics_are_named_as_trl_names_them(backend):
    policy, reference = pair_of_logits(4, 6, 20)
    policy.requires_grad_()
    output = tdpo_ext.tdpo_loss(policy, reference, labels_for(policy))
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output[1:])
    metrics = output.metrics()
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            **rewards("rewards", output.chosen_dpo_rewards, output.rejected_dpo_rewards),
            **rewards("tdpo_rewards", output.chosen_rewards, output.rejected_rewards),
            "logps/chosen": float(output.chosen_logps.mean()),
            "logps/rejected": float(output.rejected_logps.mean()),
            "kl/chosen": float(output.chosen_kl.mean()),
            "kl/rejected": float(output.rejected_kl.mean()),
            "kl/margin": float((output.chosen_kl - output.rejected_kl).mean()),
        }
    )


def rewards(prefix, chosen, rejected):
    return {
        f"{prefix}/chosen": float(chosen.mean()),
        f"{prefix}/rejected": float(rejected.mean()),
        f"{prefix}/accuracies": float((chosen > rejected).float().mean()),
        f"{prefix}/margins": float((chosen - rejected).mean()),
    }
