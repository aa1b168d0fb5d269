"""What a model does after its head, measured without the model's numbers and without traces."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from attached_models import lora
from tiny_models import CONFIGS, tiny_batch, tiny_model

from tdpo_ext.integrations.attach import HEAD_INPUTS, attach_tdpo
from tdpo_ext.integrations.hidden import LogitOptions
from tdpo_ext.integrations.probe import logit_options_of, options_named

Llama: Any = type(tiny_model())
Gemma2: Any = type(tiny_model("gemma2-softcap"))


def changed(model_class: Any, change: Any, name: str = "llama") -> Any:
    """A model whose class changes its outputs' logits."""

    class Changed(model_class):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    return Changed(tiny_model(name).config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.001,
        lambda logits: logits + 1e-4,
        lambda logits: 1e4 * torch.tanh(logits / 1e4),
        lambda logits: logits.roll(1, dims=-1),
        lambda logits: logits.flip(1),
        lambda logits: logits.flip(0),
        lambda logits: logits.clamp(min=-100),
        lambda logits: logits.log_softmax(-1),
        lambda logits: logits * torch.nan,
    ],
    ids=["scale", "shift", "wide cap", "vocabulary", "tokens", "rows", "clamp", "softmax", "nan"],
)
def test_what_is_small_is_seen_in_every_precision(change: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="no known field"):
        attach_tdpo(changed(Llama, change).to(dtype))


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of Changed have shape \(2, 2, 60\)"):
        attach_tdpo(changed(Llama, lambda logits: logits[..., :-1]))


@pytest.mark.parametrize("softcap", [0.5, 30.0, 50.0])
def test_a_softcap_is_taken_from_the_config_only_where_it_is_applied(softcap: float) -> None:
    config = tiny_model("gemma2-softcap").config
    config.final_logit_softcapping = softcap
    assert logit_options_of(Gemma2(config)) == (1.0, softcap)
    config = tiny_model().config
    config.final_logit_softcapping = softcap  # Llama does not look at it
    assert logit_options_of(Llama(config)) == (1.0, None)


def test_all_that_a_config_can_mean() -> None:
    config = tiny_model().config
    assert options_named(config) == [LogitOptions()]
    config.logit_scale, config.logits_scaling, config.final_logit_softcapping = 0.5, 8.0, 30.0
    named = options_named(config)
    assert len(named) == 2 * 3 * 2
    assert {*named[:2]} == {LogitOptions(1 / 16, 30.0), LogitOptions(4.0, 30.0)}
    assert named[-1] == LogitOptions()
    config.logit_scale, config.logits_scaling, config.final_logit_softcapping = None, True, 0
    assert options_named(config) == [LogitOptions()]


@pytest.mark.parametrize("name", CONFIGS)
def test_under_a_trainers_autocast_the_measure_is_the_same(name: str) -> None:
    """As accelerate's prepared forward: it runs under autocast and converts to float32."""
    expected = logit_options_of(tiny_model(name))
    with torch.autocast("cpu", torch.bfloat16):
        model = attach_tdpo(tiny_model(name))
    assert model.__dict__["_tdpo"].logit_options == expected


def counting(model: Any) -> list[str]:
    """Names of the modules that are called, from now on."""
    called: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


@pytest.mark.parametrize("name", CONFIGS)
def test_no_module_runs(name: str) -> None:
    """A forward of a 4-bit module in evaluation mode packs its weights for good; other modules
    count, or gather their weights from all processes."""
    model = tiny_model(name).train()
    model.get_output_embeddings().eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    modules = dict(model.named_modules())
    called, state = counting(model), torch.random.get_rng_state()
    attach_tdpo(model)
    assert called == []
    assert torch.equal(torch.random.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert modules == dict(model.named_modules())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    class Failing(Llama):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            super().forward(*args, **kwargs)
            raise ZeroDivisionError

    model = Failing(tiny_model().config)
    modules = dict(model.named_modules())
    with pytest.warns(UserWarning, match=r"could not be measured \(ZeroDivisionError"):
        attach_tdpo(model)
    assert modules == dict(model.named_modules())
    assert model.training
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"names LogitOptions\(scale=0.5.*could not be measured"):
        attach_tdpo(model)
    assert modules == dict(model.named_modules())


class Backbone(torch.nn.Module):
    """No model of transformers, and its result is used as none would be."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        self.calls += 1
        return self.embedding(ids), {"scale": 0.5}


class Unusual(Llama):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Backbone(config)

    def get_input_embeddings(self) -> Any:
        return self.model.embedding

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        hidden, more = self.model(input_ids)
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=self.lm_head(hidden) * more["scale"])


def test_a_model_that_stubs_do_not_suit_runs_as_it_is() -> None:
    config = tiny_model().config
    config.logit_scale = 0.5
    model = Unusual(config)
    assert logit_options_of(model) == (0.5, None)
    assert model.model.calls == 1
    with pytest.raises(ValueError, match="could not be measured"):
        logit_options_of(model, run_backbone=False)
    with pytest.raises(ValueError, match="parameters are on the meta device"):
        logit_options_of(copy.deepcopy(model).to("meta"))
    model.model.embedding.weight.quant_state = "as bitsandbytes marks it"
    with pytest.raises(ValueError, match="quantised to 4 bit"):
        logit_options_of(model)
    assert model.model.calls == 1


@pytest.mark.parametrize("calls", [0, 2])
def test_a_model_calls_its_head_once(calls: int) -> None:
    class Calling(Llama):
        def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
            outputs = self.model(input_ids=input_ids, attention_mask=attention_mask)
            for _ in range(calls):
                logits = self.lm_head(outputs[0])
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(logits=logits if calls else outputs[0] @ self.lm_head.weight.T)

    with pytest.raises(RuntimeError, match=r"did not call its head .* once: (not|2 times)"):
        attach_tdpo(Calling(tiny_model().config))


class Noisy(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) * 1.02


class Normalised(torch.nn.Linear):
    """As in Baichuan 2."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ torch.nn.functional.normalize(self.weight).T


class Failing(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        raise TypeError("no such thing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [Noisy, Normalised, Failing, torch.nn.Embedding])
def test_a_head_that_does_more_than_multiply_is_refused(head: Any, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    if head is torch.nn.Embedding:
        model.lm_head = head(61, 16, dtype=dtype)
    else:
        model.lm_head = head(16, 61, bias=False, dtype=dtype)
    with pytest.raises(ValueError, match=f"{head.__name__}.*does not multiply its input"):
        attach_tdpo(model)
    assert "_tdpo" not in model.__dict__


def test_a_head_without_values_is_taken_for_what_its_class_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_tdpo(tiny_model().to("meta"))
    model = tiny_model()
    model.lm_head = Noisy(16, 61, bias=False)
    with pytest.warns(UserWarning, match="head of LlamaForCausalLM is a Noisy.*on the meta device"):
        attach_tdpo(model.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_on_the_head_is_a_head(dtype: torch.dtype) -> None:
    model = attach_tdpo(lora(tiny_model(), target_modules=["lm_head"]).to(dtype))
    batch = tiny_batch(model)
    with torch.no_grad():
        given = model(**batch["inputs"], tdpo=HEAD_INPUTS)
        expected = model(**batch["inputs"]).logits
    error = (given.logits() - expected).abs().max() / expected.abs().max()
    assert error <= 4 * torch.finfo(dtype).eps
