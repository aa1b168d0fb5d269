"""What tdpo_loss hands back where the numbers are infinite, ignored or only there to be logged."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import labels_for, numpy64, pair_of_logits
from test_tdpo_loss import METHODS, loss_and_gradient

import tdpo_ext


@pytest.mark.parametrize("response", ["chosen", "rejected"])
@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_a_word_that_the_policy_excludes_and_the_reference_does_not(
    backend, variant, alpha, response
):
    """The KL is infinite: so is the loss where it counts against the pair, and DPO has no KL."""
    policy, reference = pair_of_logits(2, 3, 9)
    labels = torch.randint(0, 4, (2, 3))
    policy[int(response == "rejected"), 1, 7] = -math.inf
    output, gradient = loss_and_gradient(
        policy, reference, shift_labels=labels, variant=variant, alpha=alpha
    )
    assert (output.chosen_kl if response == "chosen" else output.rejected_kl) == math.inf
    assert gradient.isfinite().all()
    if variant == "tdpo2" and alpha == 0:
        inputs = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
        truth = oracle.tdpo_loss(*inputs, weights=np.ones(1), alpha=0.0)
        assert output.loss.item() == pytest.approx(truth.losses[0], rel=1e-6)
    else:
        assert output.loss.item() == (0 if response == "chosen" else math.inf)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_what_stands_at_ignored_positions_changes_no_bit_of_the_loss(backend, packed, poison):
    """Prompts, padding and, with labels shifted inside, the last position of every sequence."""
    policy, reference = pair_of_logits(4, 6, 33)
    labels = labels_for(policy, 0.3)
    scored = torch.cat((labels[:, 1:], torch.full((4, 1), -100)), 1) != -100
    assert not scored[:, -1].any()
    options = {"average_log_prob": True, "variant": "tdpo1"}
    if packed:
        policy, reference = policy.flatten(0, 1), reference.flatten(0, 1)
        labels, scored = labels.flatten(), scored.flatten()
        options["cu_seqlens"] = torch.tensor([0, 6, 12, 18, 24])
    clean, clean_gradient = loss_and_gradient(policy, reference, labels, **options)
    policy[~scored] = poison
    reference[~scored] = poison
    dirty, dirty_gradient = loss_and_gradient(policy, reference, labels, **options)
    for ours, wanted in zip(dirty, clean, strict=True):
        assert torch.equal(ours, wanted)
    assert torch.equal(dirty_gradient, clean_gradient)
    assert not dirty_gradient[~scored].any()


@pytest.mark.parametrize(("variant", "alpha"), METHODS)
def test_metrics_against_the_oracle(backend, variant, alpha):
    policy, reference = pair_of_logits(16, 5, 40)
    labels, beta = labels_for(policy, 0.2), 0.3
    output = tdpo_ext.tdpo_loss(
        policy, reference, shift_labels=labels, variant=variant, alpha=alpha, beta=beta
    )
    inputs = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
    truth = oracle.tdpo_loss(*inputs, weights=np.ones(8), variant=variant, alpha=alpha, beta=beta)
    # Without alpha, for both variants: the accuracy is the sign of TDPO1's logit.
    reward = beta * (truth.margin + truth.seq_kl)
    assert 0 < (reward[:8] > reward[8:]).mean() < 1
    assert {name: value.item() for name, value in output.metrics().items()} == pytest.approx(
        {
            "rewards/chosen": reward[:8].mean(),
            "rewards/rejected": reward[8:].mean(),
            "rewards/accuracies": (reward[:8] > reward[8:]).mean(),
            "rewards/margins": (reward[:8] - reward[8:]).mean(),
            "logps/chosen": truth.logps[:8].mean(),
            "logps/rejected": truth.logps[8:].mean(),
            "kl/chosen": truth.seq_kl[:8].mean(),
            "kl/rejected": truth.seq_kl[8:].mean(),
            "kl/margin": (truth.seq_kl[:8] - truth.seq_kl[8:]).mean(),
        },
        rel=1e-5,
        # A margin is the difference of two means, which are right to 1e-5 each.
        abs=1e-5 * truth.seq_kl.mean(),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_is_kept_for_logging_holds_no_graph(backend, reduction):
    policy, reference = pair_of_logits(4, 6, 20)
    policy.requires_grad_()
    output = tdpo_ext.tdpo_loss(policy, reference, labels_for(policy), reduction=reduction)
    assert output.loss.requires_grad
    assert output.loss.shape == ((2,) if reduction == "none" else ())
    for name, value in output._asdict().items():
        assert name == "loss" or (value.grad_fn is None and value.shape == (2,)), name
    assert all(value.grad_fn is None for value in output.metrics().values())
