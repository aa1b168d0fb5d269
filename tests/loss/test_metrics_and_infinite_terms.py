"""What tdpo_loss hands back where the numbers are infinite, ignored or only there to be logged."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from inputs import labels_for, numpy64, pair_of_logits
from logit_checks import METHODS, loss_and_gradient

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
    """Rewards as DPO has them, without the KL, and as the paper's code has them, with it."""
    policy, reference = pair_of_logits(16, 5, 40)
    labels, beta = labels_for(policy, 0.2), 0.3
    output = tdpo_ext.tdpo_loss(
        policy, reference, shift_labels=labels, variant=variant, alpha=alpha, beta=beta
    )
    inputs = (numpy64(policy), numpy64(reference), labels.cpu().numpy())
    truth = oracle.tdpo_loss(*inputs, weights=np.ones(8), variant=variant, alpha=alpha, beta=beta)
    logps, kl = truth.logps, truth.seq_kl
    # Every metric, and the sum of the sizes of what it is a sum or a difference of.
    with_reference = abs(logps) + abs(logps - truth.margin)
    expected = {
        **rewards("rewards", beta * truth.margin, beta * with_reference),
        # Without alpha, for both variants: the accuracy is the sign of TDPO1's logit.
        **rewards("tdpo_rewards", beta * (truth.margin + kl), beta * (with_reference + kl)),
        "logps/chosen": (logps[:8], abs(logps[:8])),
        "logps/rejected": (logps[8:], abs(logps[8:])),
        "kl/chosen": (kl[:8], kl[:8]),
        "kl/rejected": (kl[8:], kl[8:]),
        "kl/margin": (kl[:8] - kl[8:], kl[:8] + kl[8:]),
    }
    found = output.metrics()
    assert list(found) == list(expected)
    for name, (values, sizes) in expected.items():
        # A token's statistics are within 1e-6 (test_token_stats); float32 sums of 5 tokens and of 8
        # pairs add 13 roundings of 6e-8; together less than 2e-6 of the sizes, and as much again.
        assert abs(found[name].item() - values.mean()) <= 4e-6 * sizes.mean(), name
        pairs = output.metrics_of_pairs()[name]
        assert pairs.shape == (8,)
        assert np.all(abs(numpy64(pairs) - values) <= 4e-6 * sizes), name


def rewards(prefix, values, sizes):
    """The metrics of sixteen sequences, in which no rounding can turn the sign of a margin."""
    (chosen, rejected), both = np.split(values, 2), np.add(*np.split(sizes, 2))
    assert np.all(abs(chosen - rejected) > 4e-6 * both)
    accuracies = (chosen > rejected).astype(float)
    assert 0 < accuracies.mean() < 1
    return {
        f"{prefix}/chosen": (chosen, sizes[:8]),
        f"{prefix}/rejected": (rejected, sizes[8:]),
        f"{prefix}/accuracies": (accuracies, np.zeros(8)),
        f"{prefix}/margins": (chosen - rejected, both),
    }


def test_the_fields_keep_their_places(backend):
    """Whoever unpacks the tuple finds new fields at its end."""
    names = [
        *("loss", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps"),
        *("rejected_logps", "chosen_kl", "rejected_kl"),
        *("chosen_dpo_rewards", "rejected_dpo_rewards"),
    ]
    policy, reference = pair_of_logits(4, 6, 20)
    output = tdpo_ext.tdpo_loss(policy, reference, labels_for(policy))
    assert list(output._asdict()) == names


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


# --- saved programs -------------------------------------------------------------------------------


class Statistics(torch.nn.Module):
    def forward(self, policy, reference, labels):
        return tdpo_ext.token_stats(policy, reference, labels)


@pytest.mark.parametrize("module", [tdpo_ext.TDPOLoss(), Statistics()], ids=["loss", "statistics"])
def test_an_exported_module_is_saved_and_loaded(module, tmp_path):
    """With the named tuple that it returns, for other shapes than it was traced with."""
    pairs = torch.export.Dim("pairs", min=1, max=16)
    shape = {0: 2 * pairs, 1: torch.export.Dim("tokens", min=3, max=64)}
    policy, reference = pair_of_logits(4, 6, 20)
    arguments = (policy, reference, labels_for(policy))
    program = torch.export.export(module, arguments, dynamic_shapes=(shape, shape, shape))
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    policy, reference = pair_of_logits(6, 9, 20)
    labels = labels_for(policy, 0.2)
    found, wanted = loaded(policy, reference, labels), module(policy, reference, labels)
    assert type(found) is type(wanted)
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_an_exported_module_is_compiled_ahead_of_time(tmp_path):
    policy, reference = pair_of_logits(4, 6, 20)
    arguments = (policy, reference, labels_for(policy, 0.2))
    module = tdpo_ext.TDPOLoss()
    path = str(tmp_path / "program.pt2")
    program = torch.export.export(module, arguments)
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    found = torch._inductor.aoti_load_package(path)(*arguments)
    assert type(found) is tdpo_ext.TDPOOutput
    for ours, expected in zip(found, module(*arguments), strict=True):
        torch.testing.assert_close(ours, expected)
