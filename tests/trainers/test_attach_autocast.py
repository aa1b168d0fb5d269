"""Policy and reference under autocast, whatever the types of their weights."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import accelerate
import pytest
import torch
from attached_models import targets
from tiny_models import CONFIGS, tiny_batch, tiny_model

from tdpo_ext import reference
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo
from tdpo_ext.integrations.hidden import HeadInputs

HALF = [torch.bfloat16, torch.float16]


def under(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


@pytest.mark.parametrize("autocast", [None, *HALF])
@pytest.mark.parametrize("weights", [torch.float32, *HALF])
def test_the_same_model_twice_starts_at_exactly_log_2(
    weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    """Float16 weights under bfloat16 autocast among them."""
    policy, frozen = (attach_tdpo(tiny_model().to(weights)) for _ in range(2))
    batch = tiny_batch(policy)
    with under(autocast):
        output = policy(**batch["inputs"], tdpo=targets(policy, frozen, batch)).tdpo
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert not output.chosen_kl.any()
    assert not output.rejected_kl.any()
    assert torch.equal(output.chosen_rewards, torch.zeros(2))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("of_reference", [torch.float32, *HALF])
@pytest.mark.parametrize("of_policy", [torch.float32, *HALF])
def test_the_loss_is_that_of_the_logits_under_the_same_autocast(
    of_policy: torch.dtype, of_reference: torch.dtype
) -> None:
    policy = attach_tdpo(tiny_model().to(of_policy))
    frozen = attach_tdpo(tiny_model(seed=1).to(of_reference))
    batch = tiny_batch(policy)
    with torch.no_grad(), under(torch.bfloat16):
        logits = [model(**batch["inputs"]).logits for model in (policy, frozen)]
        given = [model(**batch["inputs"], tdpo=HEAD_INPUTS) for model in (policy, frozen)]
        got = policy(**batch["inputs"], tdpo=TDPOTargets(given[1], batch["labels"])).loss
    for own, inputs in zip(logits, given, strict=True):
        assert torch.equal(inputs.logits(), own)
        assert inputs.autocast == torch.bfloat16
    # The fused head rounds operands as autocast does, but not their products.
    operands = [
        each.hidden.bfloat16().double() @ each.weight.detach().bfloat16().double().T
        for each in given
    ]
    wanted = reference.tdpo_loss(*operands, batch["labels"]).loss
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own_to_the_bit(name: str) -> None:
    model = attach_tdpo(tiny_model(name))
    batch = tiny_batch(model)
    with torch.no_grad(), under(torch.bfloat16):
        own = model(**batch["inputs"], use_cache=False).logits
        given = model(**batch["inputs"], tdpo=HEAD_INPUTS)
    rebuilt = given.logits()
    error = (rebuilt.float() - own.float()).abs().max() / own.float().abs().max()
    assert error <= (0 if given.logit_options == (1.0, None) else 2**-7)


def test_another_autocast_for_the_reference_is_said_once() -> None:
    policy, frozen = attach_tdpo(tiny_model()), attach_tdpo(tiny_model())
    batch = tiny_batch(policy)
    asked = targets(policy, frozen, batch)
    with (
        under(torch.bfloat16),
        pytest.warns(
            UserWarning,
            match=r"policy runs under autocast to torch.bfloat16, the reference "
            r"\(LlamaForCausalLM\) ran under no autocast.*accelerator.prepare_model",
        ),
    ):
        policy(**batch["inputs"], tdpo=asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with under(torch.bfloat16):
            policy(**batch["inputs"], tdpo=asked)  # once
        policy, half = attach_tdpo(tiny_model()), asked.reference.to(torch.bfloat16)
        with under(torch.bfloat16):
            # Nobody knows under which autocast a cache was made.
            cached = HeadInputs(half.hidden, half.weight, None, half.logit_options)
            policy(**batch["inputs"], tdpo=TDPOTargets(cached, batch["labels"]))
            policy(**batch["inputs"], tdpo=targets(policy, frozen, batch))


@pytest.mark.parametrize("weights", [torch.float32, *HALF])
def test_attach_after_accelerates_prepare(weights: torch.dtype) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    models = [tiny_model().to(weights) for _ in range(2)]
    policy, frozen = (attach_tdpo(accelerator.prepare_model(each)) for each in models)
    batch = tiny_batch(models[0])
    output = policy(**batch["inputs"], tdpo=targets(policy, frozen, batch)).tdpo
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert not output.rejected_kl.any()
