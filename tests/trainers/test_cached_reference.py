"""Training against a reference that ran once: the same steps as against the model itself."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from attached_models import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import tiny_model
from trainer_checks import (
    ARGUMENTS,
    Recorder,
    as_text,
    examples,
    tokenizer,
)

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl
from tdpo_ext.integrations.attach import HEAD_INPUTS, attach_tdpo
from tdpo_ext.integrations.cached_reference import (
    CachedReference,
    CachedReferenceCollator,
    cache_reference_of_trainer,
    precompute,
    precompute_reference,
    reference_fingerprint,
)

LOSS = {"beta": 0.3, "alpha": 0.7}
OF_TRL = {"beta": 0.3, "tdpo_alpha": 0.7}


def trainer(
    kind: str, model: Any, folder: Path, *, cache: Path | None = None, **options: Any
) -> Any:
    """A trainer with a separate reference unless the model has adapters; cached in a folder."""
    others = {
        key: options.pop(key)
        for key in ("eval_dataset", "train_dataset", "reference", "data_collator")
        if key in options
    }
    rows = others.pop("train_dataset", examples())
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1, **ARGUMENTS, **options}
    reference = others.pop("reference", None)
    if kind == "transformers":
        return of_transformers.TDPOTrainer(
            model,
            transformers.TrainingArguments(str(folder), **options),
            loss=LinearTDPOLoss(**LOSS),
            reference=reference,
            precompute_reference=cache,
            train_dataset=rows,
            **{"data_collator": of_transformers.PreferenceCollator(0), **others},
        )
    options["tdpo_fused_head"] = kind == "trl"
    options["gradient_checkpointing"] = False
    if cache is not None:
        options["precompute_ref_log_probs"] = True
        options["tdpo_reference_cache"] = str(cache)
    elif not hasattr(model, "peft_config"):
        reference = copy.deepcopy(model) if reference is None else reference
    evaluated = others.pop("eval_dataset", None)
    return of_trl.TDPOTrainer(
        model,
        reference,
        of_trl.TDPOConfig(str(folder), **OF_TRL, **options),
        train_dataset=as_text(rows),
        eval_dataset=None if evaluated is None else as_text(evaluated),
        processing_class=tokenizer(),
        **others,
    )


def steps(made: Any) -> Recorder:
    recorder = Recorder()
    recorder.watch(made)
    made.train()
    return recorder


def model_of(trained: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model().to(dtype)
    return lora(model, target_modules=["q_proj", "v_proj"]) if trained == "lora" else model


PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bf16=True": (torch.float32, {"bf16": True}),
}
# Bounds of losses, and of gradients over the largest of their parameter: a batch of another shape
# rounds otherwise.
ROUNDING = {"float32": (1e-6, 1e-5), "bfloat16": (2e-3, 2e-2), "bf16=True": (2e-3, 2e-2)}


QUICK = {
    ("transformers", "full", "float32"),
    ("transformers", "lora", "bfloat16"),
    ("transformers", "full", "bf16=True"),
    ("trl", "full", "float32"),
    ("trl", "lora", "bf16=True"),
    ("trl-logits", "full", "bf16=True"),
}
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(
        ("transformers", "trl", "trl-logits"), ("full", "lora"), PRECISIONS
    )
]


@pytest.mark.parametrize(("kind", "trained", "precision"), CASES)
def test_training_is_that_with_the_live_reference(
    kind: str, trained: str, precision: str, tmp_path: Path
) -> None:
    dtype, options = PRECISIONS[precision]
    recorders = []
    for cache in (None, tmp_path / "cache"):
        model = model_of(trained, dtype)
        recorders.append(steps(trainer(kind, model, tmp_path, cache=cache, **options)))
    live, cached = recorders
    errors = {"loss": 0.0, "gradient": 0.0}
    for one, other in zip(live.losses, cached.losses, strict=True):
        errors["loss"] = max(errors["loss"], abs(one - other))
    for of_live, of_cached in zip(live.gradients, cached.gradients, strict=True):
        assert of_live.keys() == of_cached.keys()
        for name, gradient in of_live.items():
            scale = gradient.abs().max().clamp(min=1e-5)
            error = ((of_cached[name] - gradient).abs().max() / scale).item()
            errors["gradient"] = max(errors["gradient"], error)
    if kind != "transformers" or trained == "full":  # else the adapters differ from the start
        first = cached.logs[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(first["kl/chosen"]) + abs(first["rewards/margins"]) <= 1e-6
    assert errors["loss"] <= ROUNDING[precision][0]
    assert errors["gradient"] <= ROUNDING[precision][1]


@pytest.mark.parametrize("kind", ["transformers", "trl"])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_is_that_with_the_live_reference(
    kind: str, workers: int, tmp_path: Path
) -> None:
    metrics = []
    for cache in (None, tmp_path / "cache"):
        model, reference = tiny_model(), tiny_model(seed=1)
        made = trainer(
            kind,
            model,
            tmp_path,
            cache=cache,
            reference=reference,
            eval_dataset=examples(5, seed=3),
            dataloader_num_workers=workers,
        )
        metrics.append(made.evaluate())
    live, cached = metrics
    for name in ("eval_loss", "eval_kl/chosen", "eval_rewards/margins"):
        assert cached[name] == pytest.approx(live[name], rel=1e-5, abs=1e-6)


def test_data_sets_for_evaluation_may_have_names(tmp_path: Path) -> None:
    sets = {"a": examples(3, seed=1), "b": examples(4, seed=2)}
    made = trainer("transformers", tiny_model(), tmp_path, cache=tmp_path / "c", eval_dataset=sets)
    assert {"eval_a_loss", "eval_b_loss"} <= {*made.evaluate()}
    with pytest.raises(ValueError, match=r"a sequence of \d+ tokens, is not among the \d+ of"):
        made.evaluate(examples(2, seed=9))


def test_an_adapter_off_is_the_reference_of_a_peft_config(tmp_path: Path) -> None:
    """Where TRL makes no adapter "ref"."""
    import peft

    losses = []
    for options in ({}, {"precompute_ref_log_probs": True}):
        made = of_trl.TDPOTrainer(
            tiny_model(),
            args=of_trl.TDPOConfig(str(tmp_path), max_steps=3, **ARGUMENTS, **options),
            train_dataset=as_text(examples()),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
        )
        losses.append(steps(made).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0][0] - math.log(2)) > 1e-4  # the adapters do something
    assert (tmp_path / "_reference_cache" / "description.json").exists()


def test_an_encoder_decoder_is_cached_by_both_sides(tmp_path: Path) -> None:
    losses = []
    for cache in (None, tmp_path / "cache"):
        made = trainer(
            "transformers",
            tiny_model("t5-scaled-tied"),
            tmp_path,
            cache=cache,
            data_collator=of_transformers.PreferenceCollator(0, encoder_decoder=True),
        )
        losses.append(steps(made).losses)
    # T5's attention takes another kernel with gradients than without: a rounding of 1e-6 at first,
    # which steps of a learning rate of 0.5 make larger.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[1][0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_mixture_of_experts_is_cached(tmp_path: Path) -> None:
    losses = []
    for cache in (None, tmp_path / "cache"):
        made = trainer("trl", tiny_model("mixtral"), tmp_path, cache=cache, max_steps=2)
        losses.append(steps(made).losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# --- the model that is let go ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_the_reference_is_freed(kind: str, tmp_path: Path) -> None:
    reference = tiny_model(seed=1)
    gone = weakref.ref(reference.model.layers[0].mlp.up_proj.weight)
    head = reference.lm_head.weight
    given = {"reference": reference}
    del reference
    made = trainer(kind, tiny_model(), tmp_path, cache=tmp_path / "cache", **given)
    given.clear()
    gc.collect()
    assert gone() is None
    cached = made.reference if kind == "transformers" else made.cached_reference
    assert cached.head.weight.data_ptr() == head.data_ptr()  # the head alone, and no copy of it


def test_a_head_that_is_trained_is_copied(tmp_path: Path) -> None:
    model = tiny_model()
    cached = CachedReference.of(model)
    before = cached.head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert torch.equal(cached.head.weight, before)


# --- what is done, and how often ------------------------------------------------------------------


def batches(count: int = 11, size: int = 2, seed: int = 0, left: bool = False) -> list[Any]:
    rows, collate = examples(count, seed), of_transformers.PreferenceCollator(0)
    given = [dict(collate(rows[start : start + size])) for start in range(0, count, size)]
    return [flipped(batch) for batch in given] if left else given


def flipped(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Padded on the left."""
    result = {name: tensor.clone() for name, tensor in batch.items()}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name in batch:
            result[name][row] = batch[name][row].roll(batch[name].shape[1] - length)
    return result


def attached(name: str = "llama", seed: int = 0) -> Any:
    return attach_tdpo(tiny_model(name, seed)).requires_grad_(False)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Counted:
    """How often a model is asked for its head's inputs; it may fail then."""

    def __init__(self, model: Any, fail_at: int | None = None) -> None:
        self.calls = 0

        def count(module: Any, args: Any, kwargs: Any) -> None:
            self.calls += kwargs["input_ids"].shape[1] > 2  # attach_tdpo's probe has no more
            if self.calls == fail_at:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(count, with_kwargs=True)


def test_its_size_is_told_before_it_starts(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = batches()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in loader)
    size = tokens * 16 * 4

    class Full:
        free = size - 1

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: Full)
        with pytest.raises(OSError, match=rf"{tokens} tokens x 16 x float32 = .*, but only"):
            precompute_reference(attached(), loader, tmp_path / "cache")
    assert files(tmp_path / "cache") == {}
    capsys.readouterr()
    precompute_reference(attached(), loader, tmp_path / "cache")
    said = capsys.readouterr().err
    told = f"0 sequences are there, 22 are missing; {tokens} tokens x 16 x float32 = "
    assert told + f"{size / 1000:.3g} kB" in said
    assert said.index(told) < said.index("Computing the reference's hidden states")
    assert (tmp_path / "cache" / "part-00000.hidden").stat().st_size == size


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_it_goes_on_where_it_was_interrupted(stop: int, tmp_path: Path) -> None:
    precompute_reference(attached(), batches(), tmp_path / "undisturbed", progress=False)
    model = attached()
    Counted(model, fail_at=stop)
    training = model.train().training
    with pytest.raises(KeyboardInterrupt):
        precompute_reference(model, batches(), tmp_path / "cache", progress=False)
    assert model.training == training
    model = attached()
    counted = Counted(model)
    precompute_reference(model, batches(), tmp_path / "cache", progress=False)
    # Two calls before anything is written; batches that are complete are not run again.
    assert counted.calls == 2 + 6 - (stop - 3)
    assert files(tmp_path / "cache") == files(tmp_path / "undisturbed")
    counted.calls = 0
    precompute_reference(model, batches(), tmp_path / "cache", progress=False)
    assert counted.calls == 2


def test_an_interrupted_trainer_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    model = model_of("lora")
    active, trained = model.active_adapter, [p.requires_grad for p in model.parameters()]
    Counted(model.base_model.model, fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        trainer("transformers", model, tmp_path, cache=tmp_path / "cache")
    assert model.active_adapter == active
    assert [p.requires_grad for p in model.parameters()] == trained
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    assert "part-00000.index" in files(tmp_path / "cache")
    recorder = steps(trainer("transformers", model_of("lora"), tmp_path, cache=tmp_path / "cache"))
    assert len(recorder.gradients) == 6


def test_the_order_of_training_is_left_alone(tmp_path: Path) -> None:
    made = trainer("transformers", tiny_model(), tmp_path)
    before = torch.get_rng_state()
    cache_reference_of_trainer(made, made.reference, tmp_path / "cache")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_cache_serves_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So several runs can share it, at the same time and from a folder to read alone."""
    precompute_reference(attached(), batches(), tmp_path, progress=False)
    monkeypatch.setattr(precompute, "ReferenceCacheWriter", None)
    cache, _ = precompute_reference(attached(), batches(7), tmp_path, progress=False)
    assert len(cache) == 22


def test_sequences_that_come_twice_are_kept_once(tmp_path: Path) -> None:
    loader = batches()
    cache, _ = precompute_reference(attached(), loader + loader, tmp_path, progress=False)
    assert len(cache) == 22


def test_a_loader_that_shuffles_is_refused(tmp_path: Path) -> None:
    class Shuffling:
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return iter(batches(seed=self.times))

    with pytest.raises(ValueError, match=r"22 sequences did not come again .* without shuffling"):
        precompute_reference(attached(), Shuffling(), tmp_path, progress=False)
    with pytest.raises(ValueError, match="gave no batch"):
        precompute_reference(attached(), [], tmp_path)


# --- whose it is ----------------------------------------------------------------------------------


def changed(what: str) -> tuple[Any, dict[str, Any]]:
    model = tiny_model()
    if what == "parameters":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    elif what == "order":
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.flip(0))
    elif what == "config":
        model.config.rms_norm_eps *= 2
    elif what == "dtype":
        model.bfloat16()
    elif what == "attention":
        model.set_attn_implementation("eager")
    return model, {"bf16": True} if what == "autocast" else {}


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("parameters", "parameters"),
        ("order", "parameters"),
        ("config", "config"),
        ("dtype", "dtype"),
        ("attention", "attention"),
        ("autocast", "autocast: cached 'off', asked 'bfloat16'"),
    ],
)
def test_another_reference_does_not_share_a_cache(what: str, named: str, tmp_path: Path) -> None:
    trainer("transformers", tiny_model(), tmp_path, cache=tmp_path / "cache")
    trainer("transformers", tiny_model(), tmp_path, cache=tmp_path / "cache")
    model, options = changed(what)
    with pytest.raises(ValueError, match=f"of something else .*{named}"):
        trainer("transformers", model, tmp_path, cache=tmp_path / "cache", **options)


def test_the_adapters_that_a_reference_does_not_use_do_not_matter(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint has other adapters than the one that wrote the cache."""
    base = reference_fingerprint(tiny_model())
    model = model_of("lora")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert reference_fingerprint(model, of_policy=True) == base
    assert reference_fingerprint(model) != base
    model.add_adapter("ref", model.peft_config["default"])
    of_ref = reference_fingerprint(model, of_policy=True)
    assert of_ref["parameters"] != base["parameters"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(1)
        assert reference_fingerprint(model, of_policy=True) == of_ref
        model.get_parameter(name.replace(".default.", ".ref.")).add_(1)
    assert reference_fingerprint(model, of_policy=True) != of_ref


def test_what_adapters_do_beside_their_tensors_is_in_the_fingerprint() -> None:
    """Which are active, and how much they weigh."""
    model = model_of("lora").requires_grad_(False)
    model.add_adapter("ref", model.peft_config["default"])
    layer = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    of_policy, active = [], []

    def take() -> None:
        of_policy.append(str(reference_fingerprint(model, of_policy=True)))
        active.append(str(reference_fingerprint(model)))

    take()
    layer.scaling["default"] *= 2  # in use if not of_policy
    take()
    model.set_adapter("ref")
    take()
    layer.scaling["ref"] *= 2  # in use in both cases
    take()
    model.base_model.disable_adapter_layers()
    take()
    assert [of_policy.index(x) for x in of_policy] == [0, 0, 0, 3, 3]
    assert [active.index(x) for x in active] == [0, 1, 2, 3, 4]
    model.base_model.enable_adapter_layers()
    model.peft_config["ref"].lora_alpha += 1
    take()
    assert of_policy[5] != of_policy[4]
    assert active[5] not in active[:5]


def test_a_checkpoint_has_the_fingerprint_of_the_model_it_was_saved_from(tmp_path: Path) -> None:
    for name in ("llama", "gpt2-tied", "t5-scaled-tied"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        loaded = type(model).from_pretrained(tmp_path / name)
        assert reference_fingerprint(loaded) == reference_fingerprint(model)


def test_a_fingerprint_may_say_more(tmp_path: Path) -> None:
    precompute_reference(attached(), batches(), tmp_path, fingerprint={"tokenizer": "a"})
    with pytest.raises(ValueError, match="tokenizer: cached 'a', asked 'b'"):
        precompute_reference(attached(), batches(), tmp_path, fingerprint={"tokenizer": "b"})


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_collator_adds_the_states_of_any_batch(left: bool, tmp_path: Path) -> None:
    """In any order, with any padding, on either side."""
    model = attached()
    loader = batches(left=left)
    cache, cached = precompute_reference(model, loader, tmp_path, progress=False)
    rows = examples()[::-1]
    for side in (False, True):
        collate = of_transformers.PreferenceCollator(0, pad_to_multiple_of=32)
        inner = (lambda x, c=collate: flipped(dict(c(x)))) if side else collate
        batch = CachedReferenceCollator(inner, cache)(rows[2:7])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        live = model(**inputs, tdpo=HEAD_INPUTS)
        given = cached.with_hidden(batch["reference_hidden"])
        on = batch["attention_mask"] != 0
        assert given.hidden.shape == live.hidden.shape
        assert torch.allclose(given.hidden[on], live.hidden[on], atol=2e-6)
        assert given.hidden[~on].eq(0).all()
        assert torch.equal(given.weight, live.weight)
        assert given.logit_options == live.logit_options
        assert given.autocast == live.autocast


def test_trl_s_collator_is_served(tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    loader = batches()
    cache, _ = precompute_reference(attached(), loader, tmp_path, progress=False)
    collate = CachedReferenceCollator(DataCollatorForPreference(0), cache)
    batch = pickle.loads(pickle.dumps(collate))(examples()[:2])
    assert torch.equal(batch["input_ids"], loader[0]["input_ids"])
    wanted = CachedReferenceCollator(of_transformers.PreferenceCollator(0), cache)(examples()[:2])
    assert torch.equal(batch["reference_hidden"], wanted["reference_hidden"])


@pytest.mark.slow  # a process that imports all of transformers
def test_workers_that_are_spawned_read_it(tmp_path: Path) -> None:
    cache, _ = precompute_reference(attached(), batches(), tmp_path, progress=False)
    collate = CachedReferenceCollator(of_transformers.PreferenceCollator(0), cache)
    loader = torch.utils.data.DataLoader(
        examples(), 2, collate_fn=collate, num_workers=1, multiprocessing_context="spawn"
    )
    wanted = collate(examples()[:2])["reference_hidden"]
    assert torch.equal(next(iter(loader))["reference_hidden"], wanted)


def test_states_that_depend_on_padding_are_refused(tmp_path: Path) -> None:
    model = attached("gpt2-tied")
    precompute_reference(model, batches(), tmp_path / "right", progress=False)
    with pytest.raises(ValueError, match=r"depend on its padding.*pad on the right"):
        precompute_reference(model, batches(left=True), tmp_path / "left", progress=False)
    later = batches(left=True)
    equally_long = {name: tensor[:1].repeat(2, 1) for name, tensor in later[0].items()}
    on = equally_long["attention_mask"][0] != 0
    later.insert(0, {name: tensor[:, on] for name, tensor in equally_long.items()})
    with pytest.raises(ValueError, match=r"depend on its padding.*pad on the right"):
        precompute_reference(model, later, tmp_path / "later", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: batch.update(pixel_values=torch.zeros(4)), "pixel_values.*images"),
        (lambda batch: batch.update(token_type_ids=batch["labels"]), "token_type_ids"),
        (lambda batch: batch.pop("attention_mask"), "needs batches with .*attention_mask"),
        (lambda batch: batch["attention_mask"][:, 1].zero_(), "attention_mask has gaps"),
    ],
)
def test_batches_that_tokens_do_not_determine_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    loader = batches()
    change(loader[-1])
    with pytest.raises(ValueError, match=message):
        precompute_reference(attached(), loader, tmp_path)


def test_a_batch_without_states_says_what_to_do(tmp_path: Path) -> None:
    cached = CachedReference.of(tiny_model())
    with pytest.raises(ValueError, match=r"no reference_hidden; wrap the collator"):
        cached.with_hidden(None)


# --- what trainers refuse -------------------------------------------------------------------------


def test_a_cached_reference_is_not_precomputed_once_more(tmp_path: Path) -> None:
    cached = CachedReference.of(tiny_model())
    with pytest.raises(ValueError, match="were both given"):
        trainer("transformers", tiny_model(), tmp_path, cache=tmp_path, reference=cached)


def test_a_reference_that_is_synchronised_is_not_cached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        trainer("trl", tiny_model(), tmp_path, cache=tmp_path, sync_ref_model=True)


def test_a_stream_is_not_cached(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_list(examples()).to_iterable_dataset()
    with pytest.raises(ValueError, match="without a length"):
        trainer(
            "transformers",
            tiny_model(),
            tmp_path,
            cache=tmp_path,
            train_dataset=stream,
            max_steps=2,
        )


@pytest.mark.parametrize("sharded", ["FSDP", "ZeRO-3"])
def test_a_policy_that_is_sharded_later_is_not_its_own_cached_reference(
    sharded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("transformers", model_of("lora"), tmp_path)
    if sharded == "FSDP":
        made.is_fsdp_enabled = True
    else:
        plugin = type("Plugin", (), {"zero_stage": 3})
        state = type("State", (), {"deepspeed_plugin": plugin})
        monkeypatch.setattr(type(made.accelerator), "state", state, raising=False)
        monkeypatch.setitem(vars(made.accelerator), "state", state)
    with pytest.raises(ValueError, match="FSDP or ZeRO-3 shards it only when training starts"):
        cache_reference_of_trainer(made, None, tmp_path)
