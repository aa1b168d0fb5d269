"""A PEFT model as its own reference: the right model inside, and afterwards all as before."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from tdpo_ext.integrations.adapters import ReferenceAdapter, has_adapters
from tdpo_ext.integrations.cached_reference.trainers import separate_reference_of_trl


def lora(**options: Any) -> peft.LoraConfig:
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**given, **options})


def adapted(*names: str, config: Callable[..., Any] = lora, **options: Any) -> Any:
    """A tiny Llama with adapters of these names, of which the first is active."""
    model = peft.get_peft_model(tiny_model(), config(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**options))
    with torch.no_grad():  # whole modules start as copies, which nobody could tell from the base
        for name, parameter in model.named_parameters():
            if any(f".{adapter}." in f"{name}." for adapter in names):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def two_active(*names: str) -> Any:
    model = adapted("default", "second", *names)
    model.base_model.set_adapter(["default", "second"])
    return model


def none_active(*names: str) -> Any:
    model = adapted("default", *names)
    model.base_model.set_adapter([])
    return model


def merged(*names: str, **options: Any) -> Any:
    model = adapted("default", *names, **options)
    model.merge_adapter(["default"])
    return model


def two_merged(*names: str) -> Any:
    model = two_active(*names)
    model.merge_adapter(["default", "second"])
    return model


def disabled(*names: str) -> Any:
    model = adapted("default", *names)
    model.base_model.disable_adapter_layers()
    return model


def partly_frozen(*names: str) -> Any:
    model = adapted("default", *names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # those of every adapter, active or not
    return model


def whole_modules(*names: str) -> Any:
    return adapted("default", *names, modules_to_save=["lm_head"])


def whole_modules_of_one(*names: str) -> Any:
    model = adapted("default", modules_to_save=["lm_head"])
    for name in names:
        model.add_adapter(name, lora(target_modules=["k_proj"]))
    return model.eval()


def trained_tokens(*names: str) -> Any:
    return adapted("default", *names, trainable_token_indices=[3, 5])


def merged_dora(*names: str) -> Any:
    return merged(*names, use_dora=True)


def layer_norms(*names: str) -> Any:
    def config() -> Any:
        return peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])

    model = adapted("default", *names, config=config)
    model.merge_adapter()
    return model


def prompt_tuning(*names: str) -> Any:
    def config() -> Any:
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    return adapted("default", *names, config=config)


def prefix_tuning(*names: str) -> Any:
    def config() -> Any:
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)

    return adapted("default", *names, config=config)


def ia3(*names: str) -> Any:
    def config() -> Any:
        modules = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
        return peft.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False, **modules)

    return adapted("default", *names, config=config)


STATES = [
    adapted,
    two_active,
    none_active,
    merged,
    two_merged,
    disabled,
    partly_frozen,
    whole_modules,
    whole_modules_of_one,
    trained_tokens,
    merged_dora,
    layer_norms,
    prompt_tuning,
    prefix_tuning,
    ia3,
]


def made(state: Callable[..., Any], *names: str) -> Any:
    return state("default", *names) if state is adapted else state(*names)


def snapshot(model: Any) -> dict[str, Any]:
    """All that somebody could look at, with the memory it lies in."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {
            key: copy.copy(value)
            for key, value in vars(module).items()
            if not key.startswith("_forward") and not isinstance(value, torch.nn.Module)
        }
        for key in ("_parameters", "_buffers", "_modules"):
            plain[key] = {k: id(v) for k, v in plain[key].items()}
        kept[name] = {key: repr(value) for key, value in plain.items()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    flags = {name: (t.requires_grad, t.data_ptr(), t.grad is None) for name, t in tensors}
    return {"modules": kept, "flags": flags}


def bits(model: Any) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def inputs() -> dict[str, torch.Tensor]:
    return tiny_batch(tiny_model(), pairs=1)["inputs"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def check_as_before(model: Any, state: Any, tensors: Any, results: torch.Tensor) -> None:
    after = snapshot(model)
    assert after["modules"] == state["modules"]
    assert after["flags"] == state["flags"]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in bits(model).items())
    assert torch.equal(logits(model), results)


@pytest.mark.parametrize("names", [(), ("ref",)], ids=["adapters-off", "adapter-ref"])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_every_state_comes_out_as_it_went_in(state: Any, names: tuple[str, ...]) -> None:
    model = made(state, *names)
    results, before, tensors = logits(model), snapshot(model), bits(model)
    with ReferenceAdapter(model):
        as_reference = logits(model)
    check_as_before(model, before, tensors, results)

    # What the reference is, from a model of its own to which nothing else was ever done.
    if names:
        alone = made(state, *names)
        if state in (merged, two_merged, merged_dora, layer_norms):
            alone.unmerge_adapter()
        if state is disabled:
            alone.base_model.enable_adapter_layers()
        alone.set_adapter("ref")
        expected = logits(alone)
        assert not torch.equal(expected, logits(tiny_model()))
    else:
        expected = logits(tiny_model())
    if state in (merged, two_merged, merged_dora):  # PEFT subtracts what it has added
        torch.testing.assert_close(as_reference, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(as_reference, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_also_after_an_error_in_forward(state: Any, error: type[BaseException]) -> None:
    model = made(state, "ref")
    results, before, tensors = logits(model), snapshot(model), bits(model)

    def fail(*_: Any) -> None:
        raise error("in forward")

    handle = model.get_base_model().model.norm.register_forward_hook(fail)
    with pytest.raises(error, match="in forward"), ReferenceAdapter(model):
        logits(model)
    handle.remove()
    check_as_before(model, before, tensors, results)


def test_also_after_an_error_while_switching(monkeypatch: Any) -> None:
    model = two_merged("ref")
    results, before, tensors = logits(model), snapshot(model), bits(model)
    last = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)][-1]
    with monkeypatch.context() as patch:
        patch.setattr(type(last), "unmerge", lambda layer: 1 / (layer is not last))
        with pytest.raises(ZeroDivisionError), ReferenceAdapter(model):
            pass
    check_as_before(model, before, tensors, results)


def test_within_a_reference_and_within_disabled_adapters() -> None:
    model = two_active("ref")
    results, before, tensors = logits(model), snapshot(model), bits(model)
    with ReferenceAdapter(model):
        once = logits(model)
        with ReferenceAdapter(model):
            assert torch.equal(logits(model), once)
        assert torch.equal(logits(model), once)
    check_as_before(model, before, tensors, results)
    with model.disable_adapter():
        off = logits(model)
        with ReferenceAdapter(model):
            assert torch.equal(logits(model), once)
        assert torch.equal(logits(model), off)


def test_adapters_that_transformers_holds_itself() -> None:
    model = tiny_model()
    base = logits(model)
    model.add_adapter(lora())
    model.eval()
    results, before, tensors = logits(model), snapshot(model), bits(model)
    assert not torch.equal(results, base)
    with ReferenceAdapter(model):
        assert torch.equal(logits(model), base)
    check_as_before(model, before, tensors, results)


def test_a_model_without_adapters_is_not_its_own_reference() -> None:
    """Nor one that a merge has rid of them: PEFT 0.18 leaves their configs in it."""
    wrapped = adapted("default")
    configs = dict(wrapped.peft_config)
    merged = wrapped.merge_and_unload()
    merged.peft_config = configs
    args = SimpleNamespace(precompute_ref_log_probs=True, sync_ref_model=False)
    for model in (tiny_model(), merged, wrapped):
        assert not has_adapters(model)
        refused = pytest.raises(ValueError, match=r"no adapters.*pass a reference model")
        with refused, ReferenceAdapter(model):
            pass
        assert type(separate_reference_of_trl(model, None, args, None)) is type(model)
    for model in (adapted("default"), prompt_tuning(), whole_modules()):
        assert has_adapters(model)
        assert separate_reference_of_trl(model, None, args, None) is None


def test_biases_that_are_trained_with_the_adapter_are_pointed_out() -> None:
    model = peft.get_peft_model(tiny_model("phi-bias"), lora(bias="lora_only"))
    said = r"trains biases of the base model.*bias=\"none\""
    with pytest.warns(UserWarning, match=said), ReferenceAdapter(model):
        pass
    model = adapted("default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ReferenceAdapter(model):
            pass
