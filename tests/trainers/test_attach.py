"""attach_tdpo: the loss inside model.forward equals the loss of the model's own logits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import accelerate
import pytest
import torch
import transformers
from attached_models import assert_equal_gradients, gradients, lora, targets, truth
from recording import record
from tiny_models import CONFIGS, tiny_batch, tiny_model
from torch.distributed.utils import _apply_to_tensors
from torch.nn.functional import pad

from tdpo_ext import LinearTDPOLoss, pair_loss, reference
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo, detach_tdpo
from tdpo_ext.integrations.heads import head_of, weight_and_bias
from tdpo_ext.integrations.hidden import HeadInputs, LogitOptions
from tdpo_ext.integrations.probe import logit_options_of


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model, reference_model = tiny_model(name), tiny_model(name, seed=1)
    batch = tiny_batch(model)
    loss, expected = truth(model, reference_model, batch)
    for each in (model, reference_model):
        attach_tdpo(each)
    output = model(**batch["inputs"], tdpo=targets(model, reference_model, batch))
    torch.testing.assert_close(output.loss, loss.float(), rtol=1e-5, atol=1e-6)
    largest = assert_equal_gradients(gradients(model, output.loss), expected, 5e-5)
    error = abs(output.loss.item() - loss.item()) / max(1, loss.item())
    options = logit_options_of(model)
    record(
        "architectures",
        {
            "model": type(model).__name__,
            "tied": model.config.get_text_config().tie_word_embeddings,
            "scale, softcap": f"{options.scale:g}, {options.softcap or 'none'}",
            "loss": error,
            "gradient": largest,
        },
    )


def test_what_models_do_to_the_results_of_their_heads() -> None:
    read = {name: logit_options_of(tiny_model(name)) for name in CONFIGS}
    wanted = {
        "llama": (1.0, None),
        "gemma2-softcap": (1.0, 0.5),
        "cohere-scale": (0.25, None),
        "granite-scaling": (0.25, None),
        "falcon-h1-multiplier": (0.3, None),
        "hyperclovax-multiplies": (4.0, None),  # by what Granite divides by
        "minicpm3-before-the-head": (1.0, None),  # where Granite divides after it
    }
    assert {name: read[name] for name in wanted if name in CONFIGS} == {
        name: options for name, options in wanted.items() if name in CONFIGS
    }


def test_a_model_that_does_something_unknown_to_its_logits_is_refused() -> None:
    class Louder(type(tiny_model())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits * 1.01
            return outputs

    model = Louder(tiny_model().config).eval()
    with pytest.raises(ValueError, match=r"no known field.*linear_tdpo_loss"):
        attach_tdpo(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_the_probe_leaves_every_module_as_it_was() -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    attach_tdpo(model)
    assert [module.training for module in model.modules()] == before


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    class Direct(type(tiny_model())):  # type: ignore[misc]
        def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            outputs["logits"] = outputs.last_hidden_state @ self.lm_head.weight.T
            return outputs

    with pytest.raises(RuntimeError, match="did not call its head"):
        attach_tdpo(Direct(tiny_model().config).eval())


def test_models_that_are_no_language_models_are_refused() -> None:
    with pytest.raises(TypeError, match="Hugging Face language model"):
        attach_tdpo(torch.nn.Linear(2, 2))
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=4,
        )
    )
    with pytest.raises(ValueError, match="no output embeddings"):
        attach_tdpo(encoder)


def test_a_quantised_head_is_refused() -> None:
    model = tiny_model()
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="no floating matrix"):
        attach_tdpo(model)


def test_detach_restores_the_model_and_attach_is_idempotent() -> None:
    model = tiny_model()
    batch = tiny_batch(model)
    before = model(**batch["inputs"]).logits
    for _ in range(2):
        attach_tdpo(model)
    assert torch.equal(model(**batch["inputs"]).logits, before)
    detach_tdpo(model)
    for module in (model, model.lm_head):
        assert not {key for key in module.__dict__ if "tdpo" in key or key == "forward"}


def test_a_wrapper_put_on_top_survives_detach_and_attach() -> None:
    model = attach_tdpo(tiny_model())
    batch = tiny_batch(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    detach_tdpo(model)
    with pytest.raises(RuntimeError, match="detached"):
        model(**batch["inputs"], tdpo=HEAD_INPUTS)
    assert model(**batch["inputs"]).logits is not None
    attach_tdpo(model)
    assert model(**batch["inputs"], tdpo=HEAD_INPUTS).hidden.shape[:2] == (4, 7)


def test_a_copy_is_attached_to_itself() -> None:
    model = attach_tdpo(tiny_model())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    batch = tiny_batch(model)
    assert not copied(**batch["inputs"], tdpo=HEAD_INPUTS).weight.any()
    assert model(**batch["inputs"], tdpo=HEAD_INPUTS).weight is model.lm_head.weight


def test_saving_generating_and_checkpointing_keep_working(tmp_path: Any) -> None:
    model, plain = tiny_model(), tiny_model()
    reference_model = attach_tdpo(tiny_model(seed=1))
    attach_tdpo(model)
    batch = tiny_batch(model)
    prompt = batch["inputs"]["input_ids"][:, :3]
    arguments = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(prompt, **arguments), plain.generate(prompt, **arguments))
    model.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    asked = targets(model, reference_model, batch)
    expected = gradients(model, model(**batch["inputs"], tdpo=asked).loss)
    model.train()
    model.gradient_checkpointing_enable()
    assert_equal_gradients(
        gradients(model, model(**batch["inputs"], tdpo=asked).loss), expected, 1e-6
    )


def test_torch_compile_of_the_model() -> None:
    model, reference_model = attach_tdpo(tiny_model()), attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    asked = targets(model, reference_model, batch)
    expected = gradients(model, model(**batch["inputs"], tdpo=asked).loss)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_gradients(
        gradients(model, compiled(**batch["inputs"], tdpo=asked).loss), expected, 1e-5
    )


def test_statistics_for_a_loss_of_ones_own() -> None:
    model = attach_tdpo(tiny_model(), None)
    reference_model = attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    loss, expected = truth(model, reference_model, batch, variant="tdpo1")
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    asked = targets(model, reference_model, batch)._replace(labels=None, shift_labels=shifted)
    stats = model(**batch["inputs"], tdpo=asked).tdpo
    margin = (stats.policy_logps - stats.reference_logps).sum(-1)
    own = pair_loss(margin, stats.forward_kl.sum(-1), variant="tdpo1").mean()
    torch.testing.assert_close(own, loss.float(), rtol=1e-5, atol=1e-6)
    assert_equal_gradients(gradients(model, own), expected, 5e-5)


def test_the_router_of_a_mixture_of_experts_reports_its_loss() -> None:
    model, reference_model = attach_tdpo(tiny_model("mixtral")), attach_tdpo(tiny_model("mixtral"))
    batch = tiny_batch(model)
    asked = targets(model, reference_model, batch)
    output = model(**batch["inputs"], tdpo=asked, output_router_logits=True)
    expected = model(**batch["inputs"], output_router_logits=True).aux_loss
    torch.testing.assert_close(output.aux_loss, expected)
    assert output.aux_loss.requires_grad


def test_packed_sequences() -> None:
    model, reference_model = attach_tdpo(tiny_model()), attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    rows, tokens = batch["labels"].shape
    packed = {
        "input_ids": batch["inputs"]["input_ids"].view(1, -1),
        "position_ids": torch.arange(tokens).repeat(1, rows),
        "use_cache": False,
    }
    with torch.no_grad():
        of_reference = reference_model(**packed, tdpo=HEAD_INPUTS)
    bounds, flat = torch.arange(0, rows * tokens + 1, tokens), batch["labels"].flatten()
    got = model(**packed, tdpo=TDPOTargets(of_reference, flat, cu_seqlens=bounds)).loss
    with torch.no_grad():
        logits = [each(**packed).logits.view(rows, tokens, -1) for each in (model, reference_model)]
    expected = reference.tdpo_loss(*logits, batch["labels"]).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    row = flat.view(1, -1)  # as input_ids are
    assert torch.equal(
        model(**packed, tdpo=TDPOTargets(of_reference, row, cu_seqlens=bounds)).loss, got
    )
    shifted = pad(batch["labels"][:, 1:], (0, 1), value=-100)
    for labels in (shifted.flatten(), shifted.view(1, -1)):
        asked = TDPOTargets(of_reference, shift_labels=labels, cu_seqlens=bounds)
        torch.testing.assert_close(model(**packed, tdpo=asked).loss, got)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_on_the_meta_device_is_measured_as_any_other(name: str) -> None:
    if name.startswith("bart"):
        pytest.skip("it adds a buffer to its logits, which has no values there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = attach_tdpo(tiny_model(name).to("meta"))
    assert model.__dict__["_tdpo"].logit_options == logit_options_of(tiny_model(name))


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    model = attach_tdpo(tiny_model())
    batch = tiny_batch(model)
    asked = targets(model, model, batch)
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch["inputs"], tdpo=asked)
    attachment = model.__dict__["_tdpo"]
    assert attachment.request is attachment.result is attachment.numbers is None


@pytest.mark.parametrize("half", ["hidden", "weight"])
def test_the_reference_has_options_of_its_own(half: str) -> None:
    """And a bias, and one of its tensors in half width, as a cache has its hidden states."""
    model, reference_model = tiny_model("gemma2-softcap"), tiny_model(seed=1)
    batch = tiny_batch(model)
    for each in (model, reference_model):
        attach_tdpo(each)
    with torch.no_grad():
        policy = model(**batch["inputs"], tdpo=HEAD_INPUTS)
        given = reference_model(**batch["inputs"], tdpo=HEAD_INPUTS)
    vocabulary = policy.weight.shape[0]
    bias, options = torch.randn(vocabulary), LogitOptions(0.7, 3.0)
    given = HeadInputs(given.hidden, torch.randn_like(given.weight), bias, options)
    given = given.replace(**{half: getattr(given, half).bfloat16()})
    got = model(**batch["inputs"], tdpo=TDPOTargets(given, batch["labels"])).loss
    wanted = reference.linear_tdpo_loss(
        policy.hidden,
        policy.weight,
        given.hidden.to(given.weight.dtype).float(),  # what is small takes the weight's type
        given.weight.float(),
        batch["labels"],
        reference_bias=bias.to(given.weight.dtype).float(),
        logit_softcap=0.5,
        reference_logit_scale=0.7,
        reference_logit_softcap=3.0,
    )
    torch.testing.assert_close(got.detach(), wanted.loss, rtol=1e-5, atol=1e-6)
    given = given.replace(logit_options=LogitOptions())
    with pytest.raises(ValueError, match="the reference does not"):
        model(**batch["inputs"], tdpo=TDPOTargets(given, batch["labels"]))


def test_no_gradient_reaches_a_reference_that_was_asked_with_gradients_on() -> None:
    model, reference_model = attach_tdpo(tiny_model()), attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    given = reference_model(**batch["inputs"], tdpo=HEAD_INPUTS)
    assert given.hidden.requires_grad
    model(**batch["inputs"], tdpo=TDPOTargets(given, batch["labels"])).loss.backward()
    assert all(parameter.grad is None for parameter in reference_model.parameters())


def test_statistics_need_labels_that_are_aligned() -> None:
    model = attach_tdpo(tiny_model(), None)
    batch = tiny_batch(model)
    with pytest.raises(ValueError, match="need shift_labels"):
        model(**batch["inputs"], tdpo=targets(model, model, batch))


def test_wrong_requests_say_what_is_wrong() -> None:
    model = attach_tdpo(tiny_model())
    batch = tiny_batch(model)
    of_itself = targets(model, model, batch)
    with pytest.raises(TypeError, match="TDPOTargets"):
        model(**batch["inputs"], tdpo=batch["labels"])
    with pytest.raises(ValueError, match="labels go into TDPOTargets"):
        model(**batch["inputs"], labels=batch["labels"], tdpo=of_itself)
    model.set_output_embeddings(torch.nn.Linear(16, 61, bias=False))
    with pytest.raises(RuntimeError, match="head has changed"):
        model(**batch["inputs"], tdpo=of_itself)


# --- PEFT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["layers", "head", "modules_to_save"],
)
def test_lora_with_the_adapter_off_as_reference(options: dict[str, Any]) -> None:
    model = lora(tiny_model(), **options)
    batch = tiny_batch(model)
    with torch.no_grad():  # so that a saved copy of the head is not the original
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.2)
        with model.disable_adapter():
            reference_logits = model(**batch["inputs"]).logits
    logits = model(**batch["inputs"]).logits.double()
    output = reference.tdpo_loss(logits, reference_logits.double(), batch["labels"])
    expected = gradients(model, output.loss)
    attach_tdpo(model)
    with model.disable_adapter():
        asked = targets(model, model, batch)
    got = model(**batch["inputs"], tdpo=asked).loss
    torch.testing.assert_close(got, output.loss.detach().float(), rtol=1e-5, atol=1e-6)
    assert_equal_gradients(gradients(model, got), expected, 5e-5)


def test_a_merged_adapter_is_not_added_again() -> None:
    model = lora(tiny_model(), target_modules=["lm_head"])
    batch = tiny_batch(model)
    before = model(**batch["inputs"]).logits
    model.merge_adapter()
    attach_tdpo(model)
    with torch.no_grad():
        rebuilt = model(**batch["inputs"], tdpo=HEAD_INPUTS).logits()
    torch.testing.assert_close(rebuilt, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}],
)
def test_adapters_on_the_head_that_cannot_be_folded_are_refused(options: dict[str, Any]) -> None:
    model = lora(tiny_model(), target_modules=["lm_head"], **options).train()
    with pytest.raises(ValueError, match=r"cannot be fused.*modules_to_save"):
        weight_and_bias(head_of(model))


def test_loss_options_are_the_attached_ones() -> None:
    options = {"beta": 0.3, "variant": "tdpo1", "label_smoothing": 0.1, "reduction": "sum"}
    model = attach_tdpo(tiny_model(), LinearTDPOLoss(**options))
    reference_model = attach_tdpo(tiny_model(seed=1))
    batch = tiny_batch(model)
    loss, _ = truth(model, reference_model, batch, **options)
    got = model(**batch["inputs"], tdpo=targets(model, reference_model, batch)).loss
    torch.testing.assert_close(got, loss.float(), rtol=1e-5, atol=1e-6)
    attach_tdpo(model, LinearTDPOLoss(**options, ignore_index=0))
    labels = batch["labels"].where(batch["labels"] != -100, 0)
    marked = targets(model, reference_model, {**batch, "labels": labels})
    assert torch.equal(model(**batch["inputs"], tdpo=marked).loss, got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_prepared_reference_hands_over_its_head_as_it_is(dtype: torch.dtype) -> None:
    """Accelerate converts a model's outputs to float32; a head is no output."""
    model = attach_tdpo(tiny_model().to(dtype))
    accelerate.state.AcceleratorState._reset_state()  # of trainers that ran before
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    with torch.no_grad():
        given = prepared(**tiny_batch(model)["inputs"], tdpo=HEAD_INPUTS)
    assert given.weight is model.lm_head.weight
    assert given.autocast == torch.bfloat16


def test_what_looks_for_tensors_finds_none_in_head_inputs() -> None:
    """FSDP2's mixed precision and accelerate cast and copy those that they find."""
    given = HeadInputs(torch.randn(2, 3), torch.randn(5, 3), torch.randn(5), LogitOptions())
    targets = TDPOTargets(given, torch.zeros(2, 3, dtype=torch.int64))
    assert _apply_to_tensors(torch.Tensor.half, {"tdpo": targets})["tdpo"].reference is given
    assert accelerate.utils.convert_to_fp32({"tdpo": given})["tdpo"] is given
    moved = accelerate.utils.send_to_device({"tdpo": targets}, "cpu")["tdpo"].reference
    assert moved.weight is given.weight


@pytest.mark.parametrize("of_reference", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_policy", [torch.float32, torch.bfloat16, torch.float64])
def test_each_head_is_read_in_its_own_type(
    of_policy: torch.dtype, of_reference: torch.dtype
) -> None:
    """A float32 reference of a bfloat16 policy is not rounded to bfloat16."""
    model = attach_tdpo(tiny_model().to(of_policy))
    reference_model = attach_tdpo(tiny_model(seed=1).to(of_reference))
    batch = tiny_batch(model)
    asked = targets(model, reference_model, batch)
    with torch.no_grad():
        own = model(**batch["inputs"], tdpo=HEAD_INPUTS).to(torch.float64)
        got = model(**batch["inputs"], tdpo=asked).loss
        given = asked.reference.to(torch.float64)
        wanted = reference.tdpo_loss(own.logits(), given.logits(), batch["labels"]).loss
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
