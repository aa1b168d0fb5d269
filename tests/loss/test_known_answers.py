"""Cases whose answer is known without computing it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import DTYPES, labels_for, pair_of_logits
from logit_checks import loss_and_gradient

import tdpo_ext


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 7, 300, 5000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_policy_that_is_its_reference(backend, dtype, vocabulary, masked):
    logits, _ = pair_of_logits(4, 3, vocabulary, scale=6.0, dtype=dtype)
    labels = labels_for(logits)
    if masked and vocabulary > 1:
        # -inf everywhere but at the label and its neighbour
        logits[..., ::2] = -math.inf
        logits.scatter_(-1, labels[..., None], 0.5)
    output, _ = loss_and_gradient(logits, logits.clone(), shift_labels=labels)
    assert not output.chosen_kl.any()
    assert not output.rejected_kl.any()
    assert torch.equal(output.losses, torch.full_like(output.losses, math.log(2)))


def test_tdpo1_moves_along_onehot_minus_reference(backend):
    policy, reference = pair_of_logits(2, 4, 50)
    labels = labels_for(policy)
    output, gradient = loss_and_gradient(
        policy, reference, shift_labels=labels, variant="tdpo1", beta=0.3
    )
    direction = F.one_hot(labels, 50) - reference.softmax(-1)
    # -log sigmoid(h) has slope -sigmoid(-h) = e^-loss - 1
    slope = 0.3 * torch.expm1(-output.losses)
    torch.testing.assert_close(gradient[0], slope * direction[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient[1], -slope * direction[1], rtol=1e-5, atol=1e-7)


def test_alpha_0_is_dpo(backend):
    policy, reference = pair_of_logits(6, 5, 40)
    labels = labels_for(policy, 0.2)
    ours, gradient = loss_and_gradient(policy, reference, shift_labels=labels, alpha=0.0, beta=0.2)

    def sums(logits):
        logps = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
        return (logps.squeeze(-1) * (labels != -100)).sum(-1)

    policy = policy.double().requires_grad_()
    chosen, rejected = (sums(policy) - sums(reference)).chunk(2)
    dpo = -F.logsigmoid(0.2 * (chosen - rejected)).mean()
    (dpo_gradient,) = torch.autograd.grad(dpo, policy)
    assert ours.loss.item() == pytest.approx(dpo.item(), rel=1e-6)
    torch.testing.assert_close(gradient, dpo_gradient.float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_swapping_chosen_and_rejected_flips_the_reward_margin(backend, variant):
    policy, reference = pair_of_logits(6, 5, 40)
    labels = labels_for(policy, 0.2)
    swap = torch.tensor([3, 4, 5, 0, 1, 2])
    one = tdpo_ext.tdpo_loss(policy, reference, labels, variant=variant)
    other = tdpo_ext.tdpo_loss(policy[swap], reference[swap], labels[swap], variant=variant)
    margin = one.metrics()["rewards/margins"]
    assert margin != 0
    torch.testing.assert_close(other.metrics()["rewards/margins"], -margin)


def test_the_kl_is_of_the_reference_against_the_policy(backend):
    """KL(q || p) = 1/2 log(4/3) for q = (1/2, 1/2), p = (3/4, 1/4); KL(p || q) is not."""
    policy, reference = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    stats = tdpo_ext.token_stats(policy, reference, torch.tensor([0]))
    assert stats.forward_kl.item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert stats.policy_logps.item() == pytest.approx(math.log(3 / 4), rel=1e-6)
    assert stats.reference_logps.item() == pytest.approx(-math.log(2), rel=1e-6)
    swapped = tdpo_ext.token_stats(reference, policy, torch.tensor([0]))
    assert swapped.forward_kl.item() == pytest.approx(
        0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2), rel=1e-5
    )


def test_kl_and_margin_are_masked_at_the_same_positions(backend):
    """Keep one position at a time: both come from it, and from no neighbour."""
    policy, reference = pair_of_logits(2, 5, 30)
    tokens = torch.randint(0, 30, (2, 5))
    log_p, log_q = policy.double().log_softmax(-1), reference.double().log_softmax(-1)
    for position in range(1, 5):
        labels = torch.full((2, 5), -100)
        labels[0, position] = tokens[0, position]
        output = tdpo_ext.tdpo_loss(policy, reference, labels)
        at = (0, position - 1)  # the logits that predict it
        kl = (log_q[at].exp() * (log_q[at] - log_p[at])).sum()
        label = tokens[0, position]
        margin = log_p[at][label] - log_q[at][label]
        assert output.chosen_kl.item() == pytest.approx(kl.item(), rel=1e-5)
        assert output.chosen_rewards.item() == pytest.approx(0.1 * (margin + kl).item(), rel=1e-5)
        assert output.rejected_kl.item() == 0


def test_the_rejected_kl_is_pushed_down_and_the_chosen_kl_left_alone_in_tdpo2(backend):
    """Away from the labels TDPO2 moves the chosen row as DPO does, the rejected one otherwise."""
    policy, reference = pair_of_logits(2, 1, 30)
    labels = torch.tensor([[3], [4]])
    tdpo2, gradient = loss_and_gradient(policy, reference, shift_labels=labels, alpha=0.5)
    dpo, dpo_gradient = loss_and_gradient(policy, reference, shift_labels=labels, alpha=0.0)
    scale = torch.expm1(-tdpo2.losses) / torch.expm1(-dpo.losses)
    torch.testing.assert_close(gradient[0], scale * dpo_gradient[0], rtol=1e-5, atol=1e-7)
    p, q = policy[1, 0].softmax(-1), reference[1, 0].softmax(-1)
    direction = F.one_hot(labels[1, 0], 30) - p + 0.5 * (p - q)
    slope = -0.1 * torch.expm1(-tdpo2.losses)
    torch.testing.assert_close(gradient[1, 0], slope * direction, rtol=1e-5, atol=1e-7)


def test_a_sequence_without_kept_labels_counts_as_nothing(backend):
    policy, reference = pair_of_logits(4, 5, 30)
    labels = labels_for(policy)
    labels[2:] = -100
    for average in (False, True):
        output, gradient = loss_and_gradient(
            policy, reference, shift_labels=labels, average_log_prob=average
        )
        assert not output.rejected_kl.any()
        assert not output.rejected_rewards.any()
        assert not output.rejected_logps.any()
        assert not gradient[2:].any()
        assert output.loss.isfinite()
