"""TRL's trainer with our loss: its interface, what it writes, logs and hands to compute_metrics."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from packaging.version import Version
from tiny_models import VOCABULARY, tiny_model
from trainer_checks import ARGUMENTS, Recorder, as_text, examples, tokenizer, trl_trainer

from tdpo_ext import TDPOLoss, reference
from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl
from tdpo_ext.integrations.evaluation import GatheredPairs
from tdpo_ext.integrations.trl_options import RESTRICTED_OPTIONS

PAIRS = 5  # of two each: the last batch has one


def trainer(tmp_path: Any, **options: Any) -> Any:
    options = {"ref_model": tiny_model(seed=1), "per_device_eval_batch_size": 2, **options}
    return trl_trainer(tiny_model(), tmp_path, **options)


# --- the interface --------------------------------------------------------------------------------


def test_arguments_come_in_the_order_of_dpo_trainer(tmp_path: Any) -> None:
    """All of them by position, as a script may that was written for it."""
    policy, ref_model, processing = tiny_model(), tiny_model(seed=1), tokenizer()
    args = of_trl.TDPOConfig(str(tmp_path), **ARGUMENTS)
    callback = transformers.TrainerCallback()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    given = {
        "model": policy,
        "ref_model": ref_model,
        "args": args,
        "data_collator": None,
        "train_dataset": as_text(examples(2)),
        "eval_dataset": as_text(examples(3)),
        "processing_class": processing,
        "compute_metrics": None,
        "callbacks": [callback],
        "optimizers": (optimizer, None),
        "quantization_config": None,
        "peft_config": None,
    }
    names = list(inspect.signature(trl.DPOTrainer).parameters)
    made = of_trl.TDPOTrainer(*(given[name] for name in names))
    assert made.model is policy
    assert made.ref_model is ref_model
    assert made.args is args
    assert (len(made.train_dataset), len(made.eval_dataset)) == (2, 3)
    assert made.processing_class is processing
    assert callback in made.callback_handler.callbacks
    assert made.optimizer is optimizer
    with pytest.raises(TypeError, match="unheard_of"):
        of_trl.TDPOTrainer(policy, ref_model, args, unheard_of=1)


@dataclass
class OnTheProcessor(of_trl.TDPOConfig):
    use_cpu: bool = True
    bf16: bool = False


@pytest.mark.parametrize("named", [True, False])
def test_without_args_it_writes_to_a_folder_named_after_the_model(
    named: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(of_trl, "TDPOConfig", OnTheProcessor)
    policy = tiny_model()
    policy.config._name_or_path = "somebody/small-model" if named else ""
    made = of_trl.TDPOTrainer(
        policy,
        tiny_model(seed=1),
        train_dataset=as_text(examples(2)),
        processing_class=tokenizer(),
    )
    assert made.args.output_dir == ("small-model-TDPO" if named else "TDPO")


def test_the_folder_of_a_model_by_path() -> None:
    assert of_trl._output_folder("somebody/small-model") == "small-model-TDPO"
    assert of_trl._output_folder("/models/small-model/") == "small-model-TDPO"


def test_the_model_card_names_and_cites_tdpo(tmp_path: Any) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "trained with TDPO" in card
    assert (
        "[Token-level Direct Preference Optimization](https://huggingface.co/papers/2404.11999)"
        in card
    )
    assert "@inproceedings{zeng2024tokenlevel" in card
    assert "rafailov" not in card
    tags = card.split("tags:")[1].split("---")[0]
    assert "- tdpo" in tags
    assert "- trl" in tags
    assert "- dpo" not in tags
    assert set(made.model.model_tags) == {"trl", "tdpo"}


def test_every_option_of_the_loss_is_an_argument_of_a_script() -> None:
    (parsed,) = transformers.HfArgumentParser(of_trl.TDPOConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", "folder", "--use_cpu", "--bf16", "False", "--beta", "0.2"),
            *("--tdpo_variant", "tdpo1", "--tdpo_alpha", "0.3", "--tdpo_chunk_bytes", "5000"),
            *("--tdpo_average_log_prob", "--tdpo_fused_head", "False"),
            *("--tdpo_inplace_backward", "--tdpo_reference_cache", "cache"),
        ]
    )
    options = {name: x for name, x in vars(parsed).items() if name.startswith("tdpo_")}
    assert options == {
        "tdpo_variant": "tdpo1",
        "tdpo_alpha": 0.3,
        "tdpo_average_log_prob": True,
        "tdpo_fused_head": False,
        "tdpo_chunk_bytes": 5000,
        "tdpo_inplace_backward": True,
        "tdpo_reference_cache": "cache",
    }
    assert parsed.beta == 0.2


def test_options_that_change_no_number_reach_their_loss(tmp_path: Any) -> None:
    made = trainer(tmp_path, tdpo_chunk_bytes=4096)
    assert made.model._tdpo.loss.chunk_bytes == 4096
    made = trainer(tmp_path, tdpo_fused_head=False, tdpo_inplace_backward=True)
    assert made.logits_loss.inplace_backward


@pytest.mark.parametrize(
    "options",
    [{"tdpo_chunk_bytes": 4096}, {"tdpo_fused_head": False, "tdpo_inplace_backward": True}],
    ids=["fused", "logits"],
)
def test_means_over_tokens_and_where_the_gradient_goes(
    options: dict[str, Any], tmp_path: Any
) -> None:
    """Against the definition in float64, over whole steps."""
    loss = {"variant": "tdpo1", "beta": 3.0}
    made = trainer(tmp_path, max_steps=3, tdpo_average_log_prob=True, loss=loss, **options)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    errors = recorder.check(tiny_model(), tiny_model(seed=1), average_log_prob=True, **loss)
    assert errors["loss"] <= 2e-6
    assert errors["gradient"] <= 5e-5


def test_no_logits_are_rounded_to_those_of_the_other_model() -> None:
    """A policy in bfloat16 with a virtual token before each sequence; its reference in float32."""
    policy = torch.randn(4, 8, 40).bfloat16()
    ref_logits = policy[:, 1:].float() + 1e-3 * torch.randn(4, 7, 40)  # lost in bfloat16
    labels = torch.randint(0, 40, (4, 7))
    made = SimpleNamespace(logits_loss=TDPOLoss())
    found = of_trl.TDPOTrainer._from_logits(made, policy, ref_logits, labels)
    expected = reference.tdpo_loss(policy[:, 1:].double(), ref_logits.double(), labels)
    torch.testing.assert_close(found.chosen_kl.double(), expected.chosen_kl, rtol=1e-3, atol=0)
    assert expected.chosen_kl.max() < 1e-4


# --- what TRL decides, and what cannot be honoured ------------------------------------------------


def test_padding_free_is_left_to_trl(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Which says that it pads nevertheless, and does."""
    losses = []
    for padding_free in (False, True):
        made = trainer(tmp_path, max_steps=1, padding_free=padding_free)
        losses.append(made.train().training_loss)
    assert losses[0] == losses[1]
    assert not made.padding_free


def test_liger_kernels_for_layers_are_left_to_trl_and_its_loss_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Version(trl.__version__) >= Version("1.15"):
        trainer(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(trl, "__version__", "1.14.0")
    with pytest.raises(ValueError, match=r"use_liger_kernel must be False.*1\.15"):
        trainer(tmp_path, use_liger_kernel=True)


def test_the_refusal_of_an_f_divergence_explains_the_forward_kl(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"f_divergence_type must be 'reverse_kl'.*forward KL"):
        trainer(tmp_path, f_divergence_type="forward_kl")


def larger(seed: int = 1) -> Any:
    model = tiny_model(seed=seed)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    return model


@pytest.mark.parametrize("fused", [True, False])
def test_a_reference_of_another_vocabulary_is_refused_before_the_data_is_read(
    fused: bool, tmp_path: Any
) -> None:
    args = of_trl.TDPOConfig(str(tmp_path), tdpo_fused_head=fused, **ARGUMENTS)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCABULARY}.*{VOCABULARY + 3}"):
        of_trl.TDPOTrainer(tiny_model(), larger(), args, train_dataset=None)


def test_a_reference_loaded_without_the_tokens_that_were_added(tmp_path: Any) -> None:
    """TRL loads it again from where the model came from."""
    tiny_model().save_pretrained(tmp_path / "model")
    policy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    policy.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCABULARY + 3}.*one of {VOCABULARY}:"):
        trl_trainer(policy, tmp_path)


def test_image_tokens_cut_off_by_max_length_are_explained(tmp_path: Any) -> None:
    said = "Image features and image tokens do not match, tokens: 3, features: 4"

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(said)

    for max_length, expected in ((7, r"max_length=7.*image tokens"), (None, said)):
        made = trainer(tmp_path, max_steps=1, max_length=max_length)
        made.model.model.forward = forward
        with pytest.raises(ValueError, match=expected) as raised:
            made.train()
        assert said in str(raised.value.__cause__ or raised.value)


def test_every_option_that_is_refused_stands_in_the_documentation() -> None:
    """With what is allowed and why not more, in the code's own words."""
    page = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    for option in RESTRICTED_OPTIONS:
        assert f"| `{option.name}` | {option.shown()} | {option.why} |" in page


def test_every_option_of_tdpo_stands_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    own = set(of_trl.TDPOConfig.__dataclass_fields__) - set(trl.DPOConfig.__dataclass_fields__)
    for name in own:
        default = of_trl.TDPOConfig.__dataclass_fields__[name].default
        shown = f'`"{default}"`' if isinstance(default, str) else str(default)
        assert f"| `{name}` | {shown} |" in page


# --- what is logged -------------------------------------------------------------------------------


def test_num_tokens_counts_what_the_model_has_seen(tmp_path: Any) -> None:
    made = trainer(tmp_path, max_steps=3, eval_dataset=as_text(examples(PAIRS)))
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    counts = [
        sum(int(batch["attention_mask"].sum()) for batch in step) for step in recorder.batches
    ]
    logged = [entry["num_tokens"] for entry in recorder.logs if "loss" in entry]
    assert logged == [sum(counts[:1]), sum(counts[:2]), sum(counts[:3])]
    assert made.evaluate()["eval_num_tokens"] == sum(counts)  # evaluation adds nothing


def test_several_evaluation_sets_are_logged_under_the_names_of_trl_as_well(tmp_path: Any) -> None:
    sets = {name: as_text(examples(3, seed)) for seed, name in enumerate("ab", 1)}
    made = trainer(tmp_path, eval_dataset=sets)
    recorder = Recorder()
    made.add_callback(recorder)
    metrics = made.evaluate()
    logs = [entry for entry in recorder.logs if "eval_rewards/chosen" in entry]
    names = ["rewards/chosen", "tdpo_rewards/margins", "logps/rejected", "kl/chosen", "num_tokens"]
    assert len(logs) == 2
    for name in names:
        of_a, of_b = metrics[f"eval_a_{name}"], metrics[f"eval_b_{name}"]
        assert [entry[f"eval_{name}"] for entry in logs] == [of_a, of_b]
        assert (of_a == of_b) == (name == "num_tokens")


def test_a_prediction_leaves_nothing_for_the_next_log(tmp_path: Any) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.predict(made.train_dataset)
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    assert not any(name.startswith("eval_") for entry in recorder.logs for name in entry)


# --- compute_metrics ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compute_metrics", "preprocess_logits_for_metrics"])
def test_functions_of_logits_need_the_route_that_makes_them(name: str, tmp_path: Any) -> None:
    args = of_trl.TDPOConfig(str(tmp_path), **ARGUMENTS)
    with pytest.raises(ValueError, match=f"{name} needs logits.*tdpo_fused_head=False"):
        of_trl.TDPOTrainer(tiny_model(), args=args, **{name: print})


def evaluated(tmp_path: Any, **functions: Any) -> dict[str, float]:
    options = {"tdpo_fused_head": False, "per_device_eval_batch_size": 2, **ARGUMENTS}
    made = of_trl.TDPOTrainer(
        tiny_model(),
        tiny_model(seed=1),
        of_trl.TDPOConfig(str(tmp_path), **options),
        train_dataset=as_text(examples()),
        eval_dataset=as_text(examples(PAIRS)),
        processing_class=tokenizer(),
        **functions,
    )
    metrics: dict[str, float] = made.evaluate()
    return metrics


def test_compute_metrics_sees_the_logits_of_every_pair(tmp_path: Any) -> None:
    """In each batch the chosen, then the rejected, as TRL passes them; also of the short last."""
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {"mine": 7.0}

    metrics = evaluated(tmp_path, compute_metrics=compute_metrics)
    assert metrics["eval_mine"] == 7.0
    rows, collate = examples(PAIRS), of_transformers.PreferenceCollator(0)
    batches = [collate(rows[start : start + 2]) for start in range(0, PAIRS, 2)]
    (prediction,) = seen
    assert len(prediction.predictions) == len(prediction.label_ids) == 2 * PAIRS
    first = 0
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            logits = tiny_model()(input_ids=ids, attention_mask=mask).logits
        these = slice(first, first + len(ids))
        found = torch.tensor(prediction.label_ids[these, : ids.shape[1]])
        assert torch.equal(found, ids)
        found = torch.tensor(prediction.predictions[these, : ids.shape[1]])
        torch.testing.assert_close(found, logits)
        first += len(ids)
    # The metrics of TDPO stand beside: of all pairs, whatever the batches.
    batch = collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        both = [tiny_model(seed=seed)(**inputs).logits for seed in (0, 1)]
    expected = reference.tdpo_loss(*both, batch["labels"]).metrics()
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6)


def test_logits_are_reduced_before_they_are_kept(tmp_path: Any) -> None:
    shapes: list[Any] = []

    def best(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        assert logits.shape == (*labels.shape, VOCABULARY)
        chosen = logits.chunk(2)[0]
        return logits.argmax(-1), chosen.mean((1, 2))  # one of each sequence, one of each pair

    def compute_metrics(prediction: Any) -> dict[str, float]:
        shapes.extend(np.shape(x) for x in (*prediction.predictions, prediction.label_ids))
        return {}

    evaluated(tmp_path, compute_metrics=compute_metrics, preprocess_logits_for_metrics=best)
    assert shapes[0] == shapes[2]
    assert (shapes[0][0], shapes[1]) == (2 * PAIRS, (PAIRS,))


def test_prediction_returns_the_logits_where_there_are_any(tmp_path: Any) -> None:
    for fused in (True, False):
        made = trainer(tmp_path, tdpo_fused_head=fused)
        predictions = made.predict(made.train_dataset).predictions
        assert predictions is None if fused else len(predictions) == 2 * len(made.train_dataset)


def test_what_other_processes_have_repeated_is_dropped_by_pairs() -> None:
    """Two processes, two pairs each, of which the last is one too many."""
    mine, theirs = torch.tensor([[1], [2], [-1], [-2]]), torch.tensor([[3], [4], [-3], [-4]])

    def gather_for_metrics(values: torch.Tensor) -> torch.Tensor:
        others = theirs if len(values) == 4 else torch.stack(theirs.chunk(2), dim=1)
        return torch.cat([values, others])[:3]

    gather = GatheredPairs(SimpleNamespace(gather_for_metrics=gather_for_metrics), 4)
    assert gather(torch.zeros(4, 1)).shape == (3, 1)  # the loss
    assert gather(mine).flatten().tolist() == [1, 2, 3, -1, -2, -3]
