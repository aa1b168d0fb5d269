"""Every kind of adapter of PEFT, against the logits of the same model."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from attached_models import assert_equal_gradients, gradients, targets
from tiny_models import tiny_batch, tiny_model

from tdpo_ext import reference
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo, detach_tdpo

TASK: Any = {"task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=8, **TASK
    ),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **TASK),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], **TASK),
    "modules_to_save": lambda: peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **TASK
    ),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"], **TASK),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], **TASK),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm"], **TASK),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4, 5], **TASK),
}
VIRTUAL = ("prompt tuning", "p-tuning")


def adapted(name: str) -> Any:
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny_model(), ADAPTERS[name]())
    with torch.no_grad():  # many adapters do nothing at first
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def logits_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Those of the last positions, as TRL takes them: virtual tokens come first."""
    return model(**batch["inputs"]).logits[:, -batch["labels"].shape[1] :]


@pytest.mark.parametrize("off", [True, False], ids=["adapter off", "another model"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients_are_those_of_the_logits(name: str, off: bool) -> None:
    model, other = adapted(name), tiny_model(seed=1)
    batch = tiny_batch(model)
    with torch.no_grad():
        if off:
            with model.disable_adapter():
                reference_logits = logits_of(model, batch)
        else:
            reference_logits = logits_of(other, batch)
    policy_logits = logits_of(model, batch)
    wanted = reference.tdpo_loss(policy_logits.double(), reference_logits.double(), batch["labels"])
    expected = gradients(model, wanted.loss)
    assert expected
    attach_tdpo(model)
    if off:
        with model.disable_adapter():
            asked = targets(model, model, batch)
    else:
        asked = targets(model, attach_tdpo(other), batch)
    for _ in range(2):  # PEFT has put its forward back after the first
        output = model(**batch["inputs"], tdpo=asked)
        torch.testing.assert_close(output.loss, wanted.loss.float(), rtol=1e-5, atol=1e-6)
    assert_equal_gradients(gradients(model, output.loss), expected, 5e-5)
    detach_tdpo(model)
    assert torch.equal(logits_of(model, batch), policy_logits)
    assert type(model) is peft.PeftModelForCausalLM


def test_no_head_of_an_adapter_is_copied() -> None:
    model = adapted("modules_to_save")
    model.add_adapter("ref", ADAPTERS["modules_to_save"]())
    attach_tdpo(model)
    batch = tiny_batch(model)
    for each in (model, copy.deepcopy(model)):
        head = each.get_base_model().lm_head
        for adapter in ("default", "ref"):
            each.set_adapter(adapter)
            given = each(**batch["inputs"], tdpo=HEAD_INPUTS)
            assert given.weight is head.modules_to_save[adapter].weight
        with each.disable_adapter():
            given = each(**batch["inputs"], tdpo=HEAD_INPUTS)
        assert given.weight is head.original_module.weight


@pytest.mark.parametrize("name", VIRTUAL)
def test_a_prompted_reference_leaves_its_virtual_tokens_out(name: str) -> None:
    model, prompted = attach_tdpo(tiny_model()), adapted(name)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = logits_of(prompted, batch)
        given = attach_tdpo(prompted)(**batch["inputs"], tdpo=HEAD_INPUTS)
        torch.testing.assert_close(given.logits(), expected)
        model(**batch["inputs"], tdpo=TDPOTargets(given, batch["labels"]))


def test_prompts_of_an_encoder_are_not_cut_from_its_decoder() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(tiny_model("t5-untied"), config).eval()
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch["inputs"]).logits
        given = attach_tdpo(model)(**batch["inputs"], tdpo=HEAD_INPUTS)
    torch.testing.assert_close(given.logits(), expected)


def test_attaching_before_the_prompt_says_what_to_do() -> None:
    model = peft.get_peft_model(attach_tdpo(tiny_model()), ADAPTERS["prompt tuning"]()).eval()
    batch = tiny_batch(model)
    asked = targets(attach_tdpo(tiny_model(seed=1)), attach_tdpo(tiny_model(seed=1)), batch)
    with pytest.raises(ValueError, match=r"virtual tokens .* call attach_tdpo on the PEFT model"):
        model(**batch["inputs"], tdpo=asked)


def test_an_error_leaves_no_virtual_tokens_behind() -> None:
    model = attach_tdpo(adapted("prompt tuning"))
    batch = tiny_batch(model)
    with pytest.raises(TypeError, match="tdpo must be"):
        model(**batch["inputs"], tdpo=True)
    with model.disable_adapter():
        assert model(**batch["inputs"], tdpo=HEAD_INPUTS).hidden.shape[1] == 7
