"""TDPO in other people's trainers: their steps, metrics, references, options; and the collator."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl
from attached_models import lora
from recording import record
from tiny_models import tiny_model
from trainer_checks import (
    ARGUMENTS,
    Recorder,
    as_text,
    examples,
    plain_loop,
    tokenizer,
    transformers_trainer,
    trl_trainer,
)

from tdpo_ext import reference
from tdpo_ext.integrations import attachment
from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl
from tdpo_ext.integrations.models import without_dropout
from tdpo_ext.integrations.steps import TDPOSteps

LOSS_BOUND, GRADIENT_BOUND = 2e-6, 5e-5


@pytest.fixture(autouse=True)
def precision_of_this_test_alone() -> Iterator[None]:
    """Transformers 4 leaves that of bf16=True to all trainers after it."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def check(recorder: Recorder, model: Any, reference_model: Any, **loss: Any) -> dict[str, float]:
    errors = recorder.check(model, reference_model, **loss)
    assert errors["loss"] <= LOSS_BOUND
    assert errors["gradient"] <= GRADIENT_BOUND
    return errors


def set_ups() -> Iterator[Any]:
    """Compiled ones take seconds each. Left to make test-all: those of one batch to a step, whose
    forward is the same, and those of logits, whose graph holds nothing of attach_tdpo."""
    trainers = ["plain", "plain-logits", "transformers", "trl", "trl-logits"]
    for trainer, adapters, accumulation, compiled in itertools.product(
        trainers, (False, True), (1, 4), (False, True)
    ):
        name = [trainer, "lora" if adapters else "full", str(accumulation)]
        name.append("compiled" if compiled else "eager")
        rare = compiled and (accumulation == 1 or "logits" in trainer)
        yield pytest.param(
            *(trainer, adapters, accumulation, compiled),
            id="-".join(name),
            marks=[pytest.mark.slow] if rare else [],
        )


@pytest.mark.parametrize(("trainer", "adapters", "accumulation", "compiled"), [*set_ups()])
def test_every_step_is_that_of_the_definition(
    trainer: str, adapters: bool, accumulation: int, compiled: bool, tmp_path: Any
) -> None:
    model = tiny_model("llama-one-layer")  # graphs of more take longer to compile
    if adapters:
        model = lora(model, target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(model)
    loss = {"beta": 0.3, "alpha": 0.7, "label_smoothing": 0.1}
    recorder = Recorder()
    if trainer.startswith("plain"):
        plain_loop(
            model,
            recorder,
            reference_model=None if adapters else copy.deepcopy(model),
            fused=trainer == "plain",
            accumulation=accumulation,
            compiled=compiled,
            loss=loss,
        )
    else:
        options: dict[str, Any] = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 1 if accumulation == 1 else 2,
        }
        if compiled:  # the graphs that any backend gets; to machine code they take minutes
            options["torch_compile_backend"] = "aot_eager"
        if trainer != "transformers":
            options["tdpo_fused_head"] = trainer == "trl"
            options["gradient_checkpointing"] = False
            if not adapters:
                options["ref_model"] = copy.deepcopy(model)
        make = transformers_trainer if trainer == "transformers" else trl_trainer
        made = make(model, tmp_path, loss=loss, **options)
        recorder.watch(made)
        made.train()
        names = {"rewards/margins", "logps/chosen", "kl/chosen", "kl/rejected", "kl/margin"}
        assert names <= set(recorder.logs[0])
    reference_model = None if adapters else copy.deepcopy(before)
    if "ref" in getattr(model, "peft_config", {}):  # TRL's copy of the adapter as it was
        reference_model = copy.deepcopy(before).merge_and_unload()
    errors = check(recorder, before, reference_model, **loss)
    trained = "LoRA" if adapters else "full"
    name, route = trainer.removesuffix("-logits"), "logits" if "-" in trainer else "fused head"
    record(
        "steps",
        {
            "loop": {"plain": "plain loop", "transformers": "transformers", "trl": "TRL"}[name],
            "route": route,
            "trained": trained,
            "accumulation": accumulation,
            "torch.compile": "on" if compiled else "off",
            **errors,
        },
    )


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
def test_evaluation_and_metrics(make: Any, tmp_path: Any) -> None:
    model = tiny_model()
    rows = examples(5, seed=1)
    # The Trainer would drop all columns of such a dataset, which no forward takes.
    options: dict[str, Any] = {"eval_dataset": datasets.Dataset.from_list(rows)}
    if make is trl_trainer:
        options = {
            "eval_dataset": as_text(rows),
            "ref_model": tiny_model(seed=1),
        }
    else:
        options["reference"] = tiny_model(seed=1)
    made = make(model, tmp_path, per_device_eval_batch_size=2, loss={"variant": "tdpo1"}, **options)
    recorder = Recorder()
    made.add_callback(recorder)
    metrics = made.evaluate()
    batch = of_transformers.PreferenceCollator(0)(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [each(**inputs).logits for each in (tiny_model(), tiny_model(seed=1))]
        expected = reference.tdpo_loss(*logits, batch["labels"], variant="tdpo1")
    logged = recorder.logs[0]
    for name, value in expected.metrics().items():
        assert logged[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
    assert "eval_loss" in metrics


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
def test_evaluations_do_not_touch_each_other(make: Any, tmp_path: Any) -> None:
    given = as_text if make is trl_trainer else list
    sets = {"a": given(examples(3, seed=1)), "b": given(examples(4, seed=2))}
    options = {"ref_model" if make is trl_trainer else "reference": tiny_model(seed=1)}
    made = make(tiny_model(), tmp_path, eval_dataset=sets, **options)
    metrics = made.evaluate()
    made.evaluation_metrics.add(["left"] * 9, torch.ones(2, 9))  # by one that an error has ended
    alone = made.evaluate(made.eval_dataset["b"], metric_key_prefix="test")
    assert metrics["eval_a_kl/chosen"] != metrics["eval_b_kl/chosen"]
    assert alone["test_kl/chosen"] == pytest.approx(metrics["eval_b_kl/chosen"], rel=1e-6)


def test_what_was_frozen_stays_frozen(tmp_path: Any) -> None:
    """PEFT lets every adapter be trained that it switches on again."""
    model = lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    made = transformers_trainer(model, tmp_path, max_steps=2)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    assert all("lora_B" in name for name in recorder.gradients[-1])
    assert all(p.requires_grad == ("lora_B" in n) for n, p in model.named_parameters())


def test_a_merged_model_does_not_move_its_reference(tmp_path: Any) -> None:
    """PEFT 0.18 leaves the adapters' configs in it."""
    wrapped = lora(tiny_model(), target_modules=["q_proj"])
    configs = dict(wrapped.peft_config)
    model = wrapped.merge_and_unload().requires_grad_(True)
    model.peft_config = configs
    made = transformers_trainer(model, tmp_path, max_steps=3)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert made.state.log_history[2]["kl/chosen"] > 1e-4


def test_no_reference_is_copied_from_partitioned_parameters(tmp_path: Any) -> None:
    model = tiny_model()
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it partitions
    with pytest.raises(ValueError, match=r"partitioned.*pass it as reference="):
        transformers_trainer(model, tmp_path)


def test_cached_hidden_states_serve_as_reference(tmp_path: Any) -> None:
    model = tiny_model()
    before = copy.deepcopy(model)
    cached = of_transformers.CachedReference.of(model)
    rows = examples()
    for row in rows:
        for kind in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{kind}_ids"]])
            with torch.no_grad():
                row[f"{kind}_hidden"] = before.model(ids).last_hidden_state[0]
    made = transformers_trainer(
        model, tmp_path, per_device_train_batch_size=2, num_train_epochs=1, reference=cached
    )
    made.train_dataset = rows
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    check(recorder, before, copy.deepcopy(before))


def test_a_cached_reference_without_hidden_states_says_so(tmp_path: Any) -> None:
    model = tiny_model()
    cached = of_transformers.CachedReference.of(model)
    made = transformers_trainer(model, tmp_path, reference=cached)
    with pytest.raises(ValueError, match="chosen_hidden"):
        made.train()


def test_an_encoder_decoder_trains(tmp_path: Any) -> None:
    model = tiny_model("t5-scaled-tied")
    made = transformers_trainer(model, tmp_path, max_steps=2)
    made.data_collator = of_transformers.PreferenceCollator(0, encoder_decoder=True)
    assert made.train().training_loss > 0


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path: Any) -> None:
    losses = []
    for coefficient in (0.0, 10.0):
        model = tiny_model("mixtral")
        options: dict[str, Any] = {}
        if hasattr(trl.DPOConfig, "router_aux_loss_coef"):  # older versions read the model's config
            options["router_aux_loss_coef"] = coefficient
        else:
            model.config.router_aux_loss_coef = coefficient
        made = trl_trainer(model, tmp_path, ref_model=tiny_model("mixtral"), max_steps=1, **options)
        recorder = Recorder()
        recorder.watch(made)
        made.train()
        losses.append(recorder.losses[0])
        gate = [n for n in recorder.gradients[0] if "gate" in n and "proj" not in n]
        assert gate
        assert ("aux_loss" in recorder.logs[0]) == (coefficient > 0)
    assert losses[1] > losses[0] + 1


def test_transformers_adds_the_router_loss_that_the_config_asks_for(tmp_path: Any) -> None:
    losses, logged = [], []
    for coefficient in (0.0, 10.0):
        model = tiny_model("mixtral")
        model.config.output_router_logits = True
        model.config.router_aux_loss_coef = coefficient
        made = transformers_trainer(model, tmp_path, max_steps=1)
        recorder = Recorder()
        recorder.watch(made)
        made.train()
        losses.append(recorder.losses[0])
        logged.append(recorder.logs[0]["aux_loss"])
    assert logged[0] == logged[1] > 1  # without the coefficient
    assert losses[1] == pytest.approx(losses[0] + 10 * logged[0], rel=1e-6)


def test_the_adapter_named_ref_is_the_reference(tmp_path: Any) -> None:
    """TRL makes it for a model that comes with a trained adapter."""
    model = lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    before = copy.deepcopy(model)
    made = trl_trainer(model, tmp_path, per_device_train_batch_size=2, max_steps=3)
    assert "ref" in model.peft_config
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    merged = copy.deepcopy(before).merge_and_unload()
    check(recorder, before, merged)


def test_dropout_is_off_everywhere(tmp_path: Any) -> None:
    model = tiny_model("gpt2-tied")
    assert model.transformer.h[0].attn.attn_dropout.p > 0
    reference_model = tiny_model("gpt2-tied").train()
    made = transformers_trainer(model, tmp_path, reference=reference_model)
    assert not any(module.training for module in reference_model.modules())
    assert not any(parameter.requires_grad for parameter in made.reference.parameters())
    model.train()
    for module in (*model.modules(), *reference_model.modules()):
        assert getattr(module, "p", 0) == 0
        assert not getattr(module, "attention_dropout", 0)


def test_dropout_of_adapters_is_off() -> None:
    """LoHa keeps the numbers of its dropout in a dictionary."""
    config = peft.LoHaConfig(r=2, rank_dropout=0.4, module_dropout=0.4, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    tokens = torch.arange(8).view(1, 8)
    first, *others = (without_dropout(model).train()(tokens).logits for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


# --- at the first step the policy is its reference ------------------------------------------------

LOG_2 = torch.tensor(2.0).log().item()
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bf16=True": (torch.float32, {"bf16": True}),
    "bfloat16 weights": (torch.bfloat16, {}),
    "bfloat16 weights, bf16=True": (torch.bfloat16, {"bf16": True}),
    "float16 weights": (torch.float16, {}),
}


def check_same(logs: dict[str, float], prefix: str = "") -> None:
    """Not nearly: to the bit."""
    assert logs[f"{prefix}loss"] == LOG_2
    for name in ("kl/chosen", "kl/rejected", "kl/margin", "rewards/chosen", "rewards/rejected"):
        assert logs[prefix + name] == 0, name
    assert logs[f"{prefix}rewards/margins"] == 0


def long_rows(tokens: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 61, (3, tokens)).tolist()
    return [{"prompt_ids": ids[0][:9], "chosen_ids": ids[1][9:], "rejected_ids": ids[2][20:]}]


@pytest.mark.parametrize("tokens", [0, 512])
@pytest.mark.parametrize("of", ["copy", "separate", "adapters off", "adapter ref"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_policy_that_is_its_reference_starts_at_log_2(
    precision: str, of: str, tokens: int, tmp_path: Any
) -> None:
    dtype, options = PRECISIONS[precision]
    model = tiny_model().to(dtype)
    if of == "separate":
        options = {**options, "reference": copy.deepcopy(model)}
    if of.startswith("adapter"):
        config = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(model, config)
    if of == "adapter ref":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 if "lora_B" in name else 0)
        model.add_adapter("ref", config)
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                same = model.get_parameter(name.replace(".ref.", ".default."))
                parameter.data = same.data.clone()  # PEFT 0.18 makes it in another type
    if tokens:
        options = {**options, "train_dataset": long_rows(tokens)}
    made = transformers_trainer(
        model,
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        eval_dataset=examples(3),
        **options,
    )
    check_same(made.evaluate(), "eval_")  # of a model that no step has prepared
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    check_same({**recorder.logs[0], "loss": recorder.losses[0]})
    assert recorder.gradients[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2-tied", {}),
        ("opt-projection", {"layerdrop": 0.5, "dropout": 0.3}),
        ("mixtral", {"router_jitter_noise": 0.3, "attention_dropout": 0.3}),
        ("bart-encoder-decoder", {"encoder_layerdrop": 0.5, "decoder_layerdrop": 0.5}),
    ],
)
def test_nothing_random_is_left_in_training(name: str, changes: Any, tmp_path: Any) -> None:
    config = copy.deepcopy(tiny_model(name).config)
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    kind = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    made = transformers_trainer(model, tmp_path, data_collator=None, max_steps=1)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    check_same({**recorder.logs[0], "loss": recorder.losses[0]})


def test_a_trained_bias_of_attention_costs_a_rounding(tmp_path: Any) -> None:
    """T5's: with its gradient PyTorch takes another kernel for attention than without."""
    made = transformers_trainer(tiny_model("t5-untied"), tmp_path, data_collator=None, max_steps=1)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    assert recorder.losses[0] == pytest.approx(LOG_2, abs=1e-6)
    assert made.state.log_history[0]["kl/chosen"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_reference_is_cast_for_an_evaluation_as_the_policy_is(
    dtype: str, tmp_path: Any
) -> None:
    made = transformers_trainer(
        tiny_model(), tmp_path, eval_dataset=examples(3), **{f"{dtype}_full_eval": True}
    )
    check_same(made.evaluate(), "eval_")
    assert made.reference.dtype == made.model.dtype != torch.float32


def test_a_step_by_hand_runs_in_the_trainers_precision(tmp_path: Any) -> None:
    made = transformers_trainer(tiny_model(), tmp_path, bf16=True)
    batch = of_transformers.PreferenceCollator(0)(examples(3))
    loss, logits, labels = made.prediction_step(made.model.eval(), batch, True)
    assert (loss.item(), logits, labels) == (LOG_2, None, None)
    with made.reference_precision():  # as whoever computes a reference beforehand
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


def test_trained_weights_that_policy_and_reference_share_keep_their_gradients(
    tmp_path: Any,
) -> None:
    """Autocast keeps casts of trained weights; those of the reference have no gradients."""
    model = lora(tiny_model(), target_modules=["q_proj"])
    shared = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    model.get_parameter(shared).requires_grad_(True)
    made = transformers_trainer(model, tmp_path, max_steps=1, bf16=True)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    assert recorder.gradients[0][shared].abs().max() > 0


# --- what is logged -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
def test_tokens_are_counted_from_the_first_step_on(make: Any, tmp_path: Any) -> None:
    options = {"ref_model": tiny_model()} if make is trl_trainer else {}
    made = make(
        tiny_model(),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        num_train_epochs=1,
        **options,
    )
    for _ in range(2):  # a second run counts anew
        recorder = Recorder()
        recorder.watch(made)
        made.train()
        steps = [
            [int(batch["attention_mask"].sum()) for batch in step] for step in recorder.batches
        ]
        logged = [entry["num_tokens"] for entry in recorder.logs if "num_tokens" in entry]
        assert logged == [
            sum(sum(step) for step in steps[:2]),
            sum(sum(step) for step in steps[:3]),
        ]
        made.remove_callback(recorder)


def test_the_best_model_is_that_of_the_exact_loss(tmp_path: Any) -> None:
    rows = examples(5, seed=1)  # in batches of 2 the last pair is alone
    made = transformers_trainer(
        tiny_model(),
        tmp_path,
        eval_dataset=rows,
        per_device_eval_batch_size=2,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        callbacks=[transformers.EarlyStoppingCallback(2)],
    )
    made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert made.state.best_metric == min(losses)
    batch = of_transformers.PreferenceCollator(0)(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [each.double()(**inputs).logits for each in (made.model, tiny_model())]
    loss = reference.tdpo_loss(*logits, batch["labels"]).loss.item()
    assert loss == pytest.approx(min(losses), rel=1e-5)


def test_the_loss_of_a_router_is_part_of_the_evaluated_loss(tmp_path: Any) -> None:
    model = tiny_model("mixtral")
    model.config.output_router_logits = True
    made = transformers_trainer(model, tmp_path, eval_dataset=examples(3))
    metrics = made.evaluate()
    assert metrics["eval_aux_loss"] > 0
    of_router = model.config.router_aux_loss_coef * metrics["eval_aux_loss"]
    assert metrics["eval_loss"] == pytest.approx(LOG_2 + of_router, rel=1e-6)


@pytest.mark.parametrize("route", ["use_legacy_prediction_loop", None])
def test_prediction_has_the_same_loss(route: str | None, tmp_path: Any) -> None:
    rows = examples(5, seed=1)
    options = {} if route is None else {route: True}
    if route and not hasattr(transformers.TrainingArguments, route):
        pytest.skip("a version without it")
    made = transformers_trainer(
        tiny_model(),
        tmp_path,
        reference=tiny_model(seed=1),
        per_device_eval_batch_size=2,
        **options,
    )
    evaluated, predicted = made.evaluate(rows), made.predict(rows).metrics
    assert predicted["test_loss"] == evaluated["eval_loss"]
    whole = of_transformers.PreferenceCollator(0)(rows)
    made.model.eval()
    assert made.prediction_step(made.model, whole, True)[0] == pytest.approx(evaluated["eval_loss"])


def test_every_option_of_the_loss_reaches_it(tmp_path: Any, monkeypatch: Any) -> None:
    given = {
        "beta": 0.3,
        "alpha": 0.7,
        "variant": "tdpo1",
        "label_smoothing": 0.1,
        "average_log_prob": True,
        "chunk_bytes": 4096,
    }
    asked: list[dict[str, Any]] = []
    function = attachment.linear_tdpo_loss

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return function(*arguments, **options)

    monkeypatch.setattr(attachment, "linear_tdpo_loss", spy)
    transformers_trainer(tiny_model(), tmp_path, loss=given, max_steps=1).train()
    assert given.items() <= asked[0].items()


# --- what cannot be honoured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, "loss_type"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"use_weighting": True}, "use_weighting"),
        ({"loss_weights": [2.0]}, "loss_weights"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"tdpo_fused_head": False, "tdpo_chunk_bytes": 1000}, "tdpo_chunk_bytes"),
        ({"tdpo_inplace_backward": True}, "tdpo_inplace_backward"),
        ({"tdpo_reference_cache": "folder"}, "tdpo_reference_cache must be None, got 'folder'"),
        ({"tdpo_chunk_bytes": 0}, "chunk_bytes"),
        ({"tdpo_variant": "tdpo3"}, "variant"),
        ({"tdpo_alpha": -1.0}, "alpha"),
        ({"label_smoothing": 0.7}, "label_smoothing"),
    ],
)
def test_options_of_dpo_that_tdpo_has_not_raise(
    options: dict[str, Any], name: str, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=name):
        trl_trainer(tiny_model(), tmp_path, ref_model=tiny_model(), **options)


def test_a_config_of_dpo_raises(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="TDPOConfig"):
        of_trl.TDPOTrainer(tiny_model(), args=trl.DPOConfig(str(tmp_path), bf16=False))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"loss": {"reduction": "sum"}}, "reduction"),
        ({"loss": {"ignore_index": 0}}, "ignore_index"),
    ],
)
def test_options_of_transformers_that_tdpo_has_not_raise(
    options: dict[str, Any], name: str, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=name):
        transformers_trainer(tiny_model(), tmp_path, **options)


@pytest.mark.parametrize(
    "name",
    ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "model_init"],
)
def test_functions_that_cannot_be_called_are_refused(name: str, tmp_path: Any) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match=name) as raised:
        of_transformers.TDPOTrainer(tiny_model(), arguments, **{name: print})
    if "metrics" in name:
        assert "call the model without tdpo= in a callback" in str(raised.value)
    if name == "compute_metrics":
        config = of_trl.TDPOConfig(str(tmp_path), **ARGUMENTS)
        with pytest.raises(ValueError, match=name):
            of_trl.TDPOTrainer(tiny_model(), args=config, compute_metrics=print)


@pytest.mark.parametrize("make", [transformers_trainer, trl_trainer])
def test_batches_that_one_process_would_cut_for_all_are_refused(make: Any, tmp_path: Any) -> None:
    options = {"ref_model": tiny_model()} if make is trl_trainer else {}
    dispatched = {"accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError, match=r"dispatch_batches=True.*leave it unset"):
        make(tiny_model(), tmp_path, **dispatched, **options)
    made = make(tiny_model(), tmp_path, **options)
    assert made.accelerator.dispatch_batches is False
    made.create_accelerator_and_postprocess()  # as a search for hyperparameters does
    assert made.accelerator.dispatch_batches is False


def test_without_a_collator_one_is_made(tmp_path: Any) -> None:
    made = transformers_trainer(tiny_model(), tmp_path, data_collator=None, max_steps=1)
    assert made.data_collator.pad_token_id == 0
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(LOG_2, abs=1e-4)
    assert not made.data_collator.encoder_decoder
    made = transformers_trainer(tiny_model("t5-untied"), tmp_path, data_collator=None)
    assert made.data_collator.encoder_decoder


@pytest.mark.parametrize(
    ("rows", "collator", "message"),
    [
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            None,
            r"one has prompt, chosen.*Tokenize",
        ),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], None, "one has input_ids, labels"),
        ([{"input_ids": [1, 2]}], transformers.default_data_collator, r"got 1 rows.*PreferenceCo"),
        ([{"ids": [1]}] * 2, transformers.default_data_collator, r"fields \['ids'\].*PreferenceCo"),
        ([{"input_ids": [1]}] * 2, transformers.default_data_collator, "input_ids but no labels"),
    ],
)
def test_examples_or_batches_of_something_else_name_the_collator(
    rows: Any, collator: Any, message: str, tmp_path: Any
) -> None:
    made = transformers_trainer(
        tiny_model(),
        tmp_path,
        train_dataset=rows,
        data_collator=collator,
        per_device_train_batch_size=2,
        max_steps=1,
    )
    with pytest.raises(ValueError, match=message):
        made.train()


def test_several_cards_in_one_process_are_refused(tmp_path: Any) -> None:
    class OfTwoCards(transformers.TrainingArguments):
        n_gpu = property(lambda self: 2)

    with pytest.raises(ValueError, match="2 cards in one process"):
        of_transformers.TDPOTrainer(tiny_model(), OfTwoCards(str(tmp_path), **ARGUMENTS))


@pytest.mark.parametrize("name", ["cp_enabled", "sp_enabled"])
def test_sequences_that_the_trainer_would_split_are_refused(name: str) -> None:
    made = TDPOSteps()
    made.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**{name: True}))
    with pytest.raises(ValueError, match=name):
        made.begin()


def test_a_trainer_that_does_not_ask_for_our_loss_is_found_out(tmp_path: Any) -> None:
    class Changed(of_trl.TDPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return trl.DPOTrainer.compute_loss(self, model, inputs)

    made = Changed(
        tiny_model(),
        ref_model=tiny_model(),
        args=of_trl.TDPOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=as_text(examples()),
        processing_class=tokenizer(),
    )
    with pytest.raises(RuntimeError, match="another loss than TDPO"):
        made.train()


def test_peft_config_given_to_the_trainer(tmp_path: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    made = of_trl.TDPOTrainer(
        tiny_model(),
        args=of_trl.TDPOConfig(str(tmp_path), max_steps=3, **ARGUMENTS),
        train_dataset=as_text(examples()),
        processing_class=tokenizer(),
        peft_config=config,
    )
    before = peft.get_peft_model(tiny_model(), copy.deepcopy(config))
    before.load_state_dict(made.model.state_dict())
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    check(recorder, before, None)


# --- the collator ---------------------------------------------------------------------------------


def test_what_the_collator_makes() -> None:
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
    ]
    batch = of_transformers.PreferenceCollator(0, max_length=4, pad_to_multiple_of=3)(rows)
    ids = [[1, 2, 3, 4, 0, 0], [7, 8, 9, 0, 0, 0], [1, 2, 3, 6, 0, 0], [7, 8, 10, 11, 0, 0]]
    assert batch["input_ids"].tolist() == ids
    assert batch["attention_mask"].sum(1).tolist() == [4, 3, 4, 4]
    x = -100
    assert batch["labels"].tolist() == [
        [x, x, x, 4, x, x],
        [x, x, 9, x, x, x],
        [x, x, x, 6, x, x],
        [x, x, 10, 11, x, x],
    ]


def test_the_collator_cuts_hidden_states_as_it_cuts_tokens() -> None:
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    hidden = {"chosen_hidden": torch.ones(5, 2), "rejected_hidden": torch.ones(3, 2)}
    batch = of_transformers.PreferenceCollator(0, max_length=4)([row | hidden])
    assert batch["reference_hidden"][..., 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_collator_cuts_prompt_and_response_of_an_encoder_decoder() -> None:
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [7]}
    batch = of_transformers.PreferenceCollator(0, max_length=2, encoder_decoder=True)([row])
    assert batch["input_ids"].tolist() == [[1, 2], [1, 2]]
    assert batch["labels"].tolist() == [[4, 5], [7, -100]]
