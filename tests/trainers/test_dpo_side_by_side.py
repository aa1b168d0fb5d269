"""TRL's DPOTrainer and ours with alpha = 0, side by side: the same steps, and the same log.

One set-up of a preference trainer after the other, each run through both: losses, gradients and
logged metrics must agree. Where TRL logs more than we do, ``NOT_LOGGED`` says so.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from packaging.version import Version
from PIL import Image
from recording import record
from tiny_models import VOCABULARY, tiny_model
from trainer_checks import ARGUMENTS, as_text, examples, tokenizer

from tdpo_ext.integrations import trl as of_trl

NOT_LOGGED = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
CLOCKS = ("runtime", "per_second", "flos")
LOSS_BOUND, GRADIENT_BOUND, METRIC_BOUND = 1e-6, 1e-5, 1e-5


# --- data -----------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}"
    "{{ 'w04 ' if message.role == 'user' else 'w05 ' }}{{ message.content }}"
    "{{ '' if message.role == 'user' else 'w02 ' }}"
    "{% endfor %}{{ 'w05 ' if add_generation_prompt else '' }}"
)
"""A turn begins with w04 or w05; a response ends with the end-of-sequence token, w02."""


def conversational(rows: Any) -> Any:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return datasets.Dataset.from_list(
        [
            {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
            for row in rows
        ]
    )


def with_implicit_prompt(rows: Any) -> Any:
    """The prompt is what both responses begin with."""
    return datasets.Dataset.from_list(
        [{x: row["prompt"] + row[x] for x in ("chosen", "rejected")} for row in rows]
    )


def with_other_columns(rows: Any) -> Any:
    return rows.add_column("source", ["somewhere"] * len(rows))


def streamed(rows: Any) -> Any:
    return rows.to_iterable_dataset()


def with_images(rows: Any) -> Any:
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in rows]
    words = {x: [text.replace("w06", "w07") for text in rows[x]] for x in rows.column_names}
    listed = conversational(datasets.Dataset.from_dict(words)).to_list()
    return datasets.Dataset.from_list(
        [{**row, "images": [Image.fromarray(x)]} for row, x in zip(listed, images, strict=True)]
    )


def of_text() -> Any:
    processing = tokenizer()
    processing.chat_template = CHAT
    return processing


def of_images() -> Any:
    """An image is w06, of which the processor makes one for each of its four patches."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processing = tokenizer()
    processing.add_tokens([tokenizers.AddedToken("w06", special=True)], special_tokens=True)
    return transformers.LlavaProcessor(
        kind(do_resize=False, do_center_crop=False),
        processing,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="w06",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("message.content", PARTS),
    )


PARTS = "message.content | map(attribute='text', default='w06') | join(' ') + ' '"


# --- set-ups --------------------------------------------------------------------------------------


@functools.cache
def _cached(name: str, seed: int) -> Any:
    return tiny_model(name, seed)


def fresh(name: str = "llama-one-layer", seed: int = 0) -> Callable[[str], Any]:
    return lambda folder: copy.deepcopy(_cached(name, seed))


def seeing(seed: int) -> Callable[[str], Any]:
    """A vision-language model."""

    def made(folder: str) -> Any:
        torch.manual_seed(seed)
        layers = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config={
                    **layers,
                    "model_type": "clip_vision_model",
                    "num_hidden_layers": 2,
                    "image_size": 8,
                    "patch_size": 4,
                },
                text_config={
                    **layers,
                    "model_type": "llama",
                    "num_hidden_layers": 1,
                    "vocab_size": VOCABULARY,
                },
                image_token_index=6,
            )
        )

    return made


def loaded(folder: str) -> Any:
    """Knows where it came from, so that TRL can load its reference."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def by_path(folder: str) -> str:
    return folder


def with_trained_adapter(folder: str) -> Any:
    """TRL copies the adapter to one named "ref"."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh()(folder), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)


@dataclass(frozen=True)
class Setup:
    options: dict[str, Any] = field(default_factory=dict)
    """Options of both configs, beside ``ARGUMENTS``."""
    model: Callable[[str], Any] = fresh()  # noqa: RUF009
    reference: Callable[[str], Any] | None = fresh(seed=1)  # noqa: RUF009
    adapter: peft.PeftConfig | None = None
    data: tuple[Callable[[Any], Any], ...] = ()
    """What is done to the rows of text."""
    eval_sets: tuple[str, ...] | None = None
    """Names; of one without a name, ("",)."""
    of_dpo: dict[str, Any] = field(default_factory=dict)
    """What TRL calls by other names."""
    of_tdpo: dict[str, Any] = field(default_factory=dict)
    processing: Callable[[], Any] = of_text
    since: str = "1.0"
    """The version of TRL whose own trainer can do it."""


LOGITS = {"tdpo_fused_head": False}
ADAPTED: dict[str, Any] = {"reference": None}
PROMPTED: dict[str, Any] = {"reference": None, "since": "1.15"}
SEEING: dict[str, Any] = {
    "model": seeing(0),
    "reference": seeing(1),
    "data": (with_images,),
    "processing": of_images,
}
ROUTED: dict[str, Any] = {
    "model": fresh("mixtral"),
    "reference": fresh("mixtral", seed=1),
    "since": "1.10",
}

QUICK = {
    "reference given": Setup(),
    "from logits": Setup(of_tdpo=LOGITS),
    "model and reference by path": Setup(model=by_path, reference=None),
    "beta and accumulation": Setup({"beta": 0.5, "gradient_accumulation_steps": 2}),
    "label smoothing": Setup(
        {"label_smoothing": 0.1},
        # TRL's sigmoid loss ignores it, its robust loss subtracts what smoothing adds:
        # smoothed = 2 (1 - e) sigmoid - (1 - 2 e) robust.
        of_dpo={"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8]},
    ),
    "max_length": Setup({"max_length": 6}),
    "evaluation": Setup({"eval_strategy": "steps", "eval_steps": 2}, eval_sets=("",)),
    "several evaluation sets": Setup(
        {"eval_strategy": "steps", "eval_steps": 2}, eval_sets=("a", "b")
    ),
    "conversations": Setup(data=(conversational,)),
    "a stream": Setup({"max_steps": 3}, data=(streamed,)),
    "LoRA": Setup(adapter=lora(), **ADAPTED),
    "a trained adapter": Setup(model=with_trained_adapter, **ADAPTED),
    "prompt tuning from logits": Setup(
        adapter=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        of_tdpo=LOGITS,
        **PROMPTED,
    ),
    "mixture of experts": Setup(**ROUTED),
}

SLOW = {
    "reference loaded for a loaded model": Setup(model=loaded, reference=None),
    "keep_end": Setup({"max_length": 6, "truncation_mode": "keep_end"}),
    "padded to a multiple": Setup({"pad_to_multiple_of": 8}),
    "no truncation": Setup({"max_length": None}),
    "accumulation from logits": Setup({"gradient_accumulation_steps": 2}, of_tdpo=LOGITS),
    "checkpointing": Setup({"gradient_checkpointing": True}),
    "reentrant checkpointing": Setup(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "checkpointing with LoRA": Setup({"gradient_checkpointing": True}, adapter=lora(), **ADAPTED),
    "clipped gradients": Setup({"max_grad_norm": 0.01}),
    "a model with dropout": Setup(
        model=fresh("gpt2-tied"), reference=fresh("gpt2-tied", 1), options={"disable_dropout": True}
    ),
    "softcap": Setup(model=fresh("gemma2-softcap"), reference=fresh("gemma2-softcap", 1)),
    "logit scale": Setup(model=fresh("cohere-scale"), reference=fresh("cohere-scale", 1)),
    "an unweighted router": Setup({"router_aux_loss_coef": 0.0}, **ROUTED),
    "a weighted router": Setup(
        {"router_aux_loss_coef": 10.0, "eval_strategy": "steps", "eval_steps": 2},
        eval_sets=("",),
        **ROUTED,
    ),
    "a reference that follows": Setup({"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "implicit prompt": Setup(data=(with_implicit_prompt,)),
    "other columns": Setup(data=(with_other_columns,)),
    "conversations with implicit prompt": Setup(data=(conversational, with_implicit_prompt)),
    "images": Setup({"max_length": None}, **SEEING),
    "images from logits": Setup({"max_length": None}, of_tdpo=LOGITS, **SEEING),
    "a stream of conversations": Setup({"max_steps": 3}, data=(conversational, streamed)),
    "LoRA from logits": Setup(adapter=lora(), of_tdpo=LOGITS, **ADAPTED),
    "LoRA and a reference": Setup(adapter=lora()),
    "a trained adapter from logits": Setup(model=with_trained_adapter, of_tdpo=LOGITS, **ADAPTED),
    "LoRA on all layers": Setup(
        adapter=peft.LoraConfig(r=2, target_modules="all-linear"), **ADAPTED
    ),
    "rank-stabilised LoRA": Setup(adapter=lora(use_rslora=True), **ADAPTED),
    "LoRA with a bias": Setup(adapter=lora(lora_bias=True), **ADAPTED),
    "DoRA": Setup(adapter=lora(use_dora=True), **ADAPTED),
    "LoRA beside a trained head": Setup(adapter=lora(modules_to_save=["lm_head"]), **ADAPTED),
    "LoHa": Setup(adapter=peft.LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]), **ADAPTED),
    "LoKr": Setup(adapter=peft.LoKrConfig(r=2, target_modules=["q_proj", "v_proj"]), **ADAPTED),
    "IA3": Setup(
        adapter=peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        **ADAPTED,
    ),
    "prefix tuning": Setup(
        {"gradient_checkpointing": False},
        adapter=peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        **ADAPTED,
    ),
    "a prompt encoder from logits": Setup(
        adapter=peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
        ),
        of_tdpo=LOGITS,
        **PROMPTED,
    ),
    "prompt tuning": Setup(
        adapter=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), **PROMPTED
    ),
}


# --- runs -----------------------------------------------------------------------------------------


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """A training run: each step's loss and gradients, and what was logged."""

    def __init__(self, trainer: Any) -> None:
        self.losses = [0.0]
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []
        step = trainer.training_step

        def watched(*args: Any, **kwargs: Any) -> Any:
            loss = step(*args, **kwargs)
            self.losses[-1] += loss.item()
            return loss

        trainer.training_step = watched
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, *args: Any, **others: Any) -> None:
        named = others["model"].named_parameters()
        self.gradients.append(
            {n: p.grad.double().clone() for n, p in named if p.grad is not None and p.grad.any()}
        )

    def on_optimizer_step(self, *args: Any, **others: Any) -> None:
        self.losses.append(0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        self.logs.append(dict(logs))


def run(trainer: Any, config: Any, setup: Setup, folder: str, output: Any, **own: Any) -> Watch:
    def prepared(count: int, seed: int) -> Any:
        return functools.reduce(lambda rows, f: f(rows), setup.data, as_text(examples(count, seed)))

    options = {
        **ARGUMENTS,
        "gradient_checkpointing": False,
        "learning_rate": 0.05,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        **setup.options,
        **own,
    }
    eval_set: Any = None
    if setup.eval_sets is not None:
        sets = {name: prepared(4, seed) for seed, name in enumerate(setup.eval_sets, 1)}
        eval_set = sets.get("", sets)
    torch.manual_seed(0)  # of adapters, which older versions of TRL make before they set it
    made = trainer(
        setup.model(folder),
        None if setup.reference is None else setup.reference(folder),
        config(str(output), **options),
        train_dataset=prepared(8, 0),
        eval_dataset=eval_set,
        processing_class=setup.processing(),
        peft_config=copy.deepcopy(setup.adapter),
    )
    watch = Watch(made)
    made.train()
    return watch


def compare(theirs: Watch, ours: Watch) -> dict[str, float]:
    """The largest differences; names must be the same."""
    assert len(theirs.losses) == len(ours.losses) > 2
    differences = {"loss": 0.0, "gradient": 0.0, "logged": 0.0}
    for a, b in zip(theirs.losses, ours.losses, strict=True):
        differences["loss"] = max(differences["loss"], abs(a - b) / max(1, abs(a)))
    for wanted, found in zip(theirs.gradients, ours.gradients, strict=True):
        assert wanted.keys() == found.keys()
        difference = sum((wanted[n] - found[n]).square().sum() for n in wanted)
        size = sum(x.square().sum() for x in wanted.values())
        assert size > 0
        differences["gradient"] = max(differences["gradient"], float((difference / size).sqrt()))
    for wanted_log, found_log in zip(theirs.logs, ours.logs, strict=True):
        for name, value in wanted_log.items():
            short = name.removeprefix("eval_")
            if short in NOT_LOGGED or name.endswith(CLOCKS):
                continue
            assert name in found_log
            if name not in ("loss", "train_loss"):  # rounded there, compared above
                difference = abs(found_log[name] - value) / max(1, abs(value))
                differences["logged"] = max(differences["logged"], difference)
    return differences


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model and its tokenizer on disk."""
    path = str(tmp_path_factory.mktemp("model"))
    tiny_model("llama-one-layer").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


ALL = [
    *(pytest.param(name, id=name) for name in QUICK),
    *(pytest.param(name, id=name, marks=pytest.mark.slow) for name in SLOW),
]


@pytest.mark.parametrize("name", ALL)
def test_a_dpo_trainer_and_ours(name: str, folder: str, tmp_path: Any) -> None:
    setup = {**QUICK, **SLOW}[name]
    if Version(trl.__version__) < Version(setup.since):
        pytest.skip(f"TRL's own trainer has it since {setup.since}")
    theirs = run(trl.DPOTrainer, trl.DPOConfig, setup, folder, tmp_path / "dpo", **setup.of_dpo)
    own = {"tdpo_alpha": 0.0, **setup.of_tdpo}
    ours = run(of_trl.TDPOTrainer, of_trl.TDPOConfig, setup, folder, tmp_path / "tdpo", **own)
    differences = compare(theirs, ours)
    assert differences["loss"] <= LOSS_BOUND
    assert differences["gradient"] <= GRADIENT_BOUND
    assert differences["logged"] <= METRIC_BOUND
    record("side_by_side", {"set-up": name, **differences})


@pytest.mark.slow
def test_images_whose_tokens_max_length_cuts_off(folder: str, tmp_path: Any) -> None:
    setup = Setup({"max_length": 4}, **SEEING)
    with pytest.raises(ValueError, match="max_length=4 has cut image tokens off"):
        run(of_trl.TDPOTrainer, of_trl.TDPOConfig, setup, folder, tmp_path)


# --- in mixed precision, TRL's default ------------------------------------------------------------


def defaults(trainer: Any, config: Any, folder: str, output: Any) -> tuple[Any, Watch]:
    """The shortest script: a model by path, and nothing set but where to write (and the CPU)."""
    rows = as_text(examples(8))
    made = trainer(folder, args=config(str(output), use_cpu=True), train_dataset=rows)
    watch = Watch(made)
    made.train()
    return made, watch


def test_a_script_that_sets_nothing(folder: str, tmp_path: Any) -> None:
    _, theirs = defaults(trl.DPOTrainer, trl.DPOConfig, folder, tmp_path / "dpo")
    made, ours = defaults(of_trl.TDPOTrainer, of_trl.TDPOConfig, folder, tmp_path / "tdpo")
    assert made.args.bf16
    assert made.model.dtype == torch.float32
    assert made.args.gradient_checkpointing
    assert theirs.losses[0] == ours.losses[0] == pytest.approx(math.log(2), rel=1e-7)
    # 1e-6 is the learning rate: nothing has moved that bfloat16 would see much of.
    assert len(theirs.losses) == len(ours.losses) == 4
    assert ours.losses[1:3] == pytest.approx(theirs.losses[1:3], abs=1e-3)
    logged = ours.logs[0]
    assert logged["rewards/margins"] == pytest.approx(0, abs=1e-2)


def in_bfloat16(folder: str) -> Any:
    return fresh()(folder).bfloat16()


def in_float16(folder: str) -> Any:
    return fresh()(folder).half()


def in_float32(setup: Setup) -> Setup:
    """The same weights, and the same everything."""

    def widened(make: Any) -> Any:
        return (lambda folder: make(folder).float()) if make in (in_bfloat16, in_float16) else make

    return replace(
        setup,
        options={**setup.options, "bf16": False},
        model=widened(setup.model),
        reference=widened(setup.reference),
    )


HALF: dict[str, Any] = {"model": in_bfloat16, "reference": in_bfloat16}
IN_BFLOAT16 = {
    "full": Setup({"bf16": True}, reference=fresh()),
    "full from logits": Setup({"bf16": True}, reference=fresh(), of_tdpo=LOGITS),
    "by path": Setup({"bf16": True}, model=by_path, reference=None),
    "LoRA": Setup({"bf16": True}, adapter=lora(), **ADAPTED),
    "LoRA from logits": Setup({"bf16": True}, adapter=lora(), of_tdpo=LOGITS, **ADAPTED),
    "a trained adapter": Setup({"bf16": True}, model=with_trained_adapter, **ADAPTED),
    "bfloat16 weights": Setup({"bf16": True}, **HALF),
    "bfloat16 weights without autocast": Setup({"bf16": False}, **HALF),
    "bfloat16 weights without autocast, from logits": Setup(
        {"bf16": False}, of_tdpo=LOGITS, **HALF
    ),
    "float16 weights": Setup({"bf16": True}, model=in_float16, reference=in_float16),
    "float16 weights from logits": Setup(
        {"bf16": True}, model=in_float16, reference=in_float16, of_tdpo=LOGITS
    ),
    "LoRA on bfloat16 weights": Setup({"bf16": True}, model=in_bfloat16, adapter=lora(), **ADAPTED),
}
QUICK_IN_BFLOAT16 = {"full", "LoRA"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, id=x, marks=() if x in QUICK_IN_BFLOAT16 else pytest.mark.slow)
        for x in IN_BFLOAT16
    ],
)
def test_in_bfloat16(name: str, folder: str, tmp_path: Any) -> None:
    """The policy is its reference at first: log 2, no KL, no margin, to the last bit.

    Gradients are rounded here and there on the way, by each trainer in other places: both are held
    to be near those in float32, by a few roundings of 2^-9 each.
    """
    setup = IN_BFLOAT16[name]
    truth = run(trl.DPOTrainer, trl.DPOConfig, in_float32(setup), folder, tmp_path / "truth")
    theirs = run(trl.DPOTrainer, trl.DPOConfig, setup, folder, tmp_path / "dpo")
    # alpha is no matter at first: there is no KL, and it has no gradient.
    own = {"tdpo_alpha": 0.0, **setup.of_tdpo}
    ours = run(of_trl.TDPOTrainer, of_trl.TDPOConfig, setup, folder, tmp_path / "tdpo", **own)
    assert ours.losses[0] == torch.tensor(2.0).log().item()
    first = ours.logs[0]
    for metric in ("rewards/margins", "rewards/chosen", "kl/chosen", "kl/rejected"):
        assert first[metric] == 0, metric
    assert first["logps/chosen"] == pytest.approx(truth.logs[0]["logps/chosen"], rel=2.0**-8)

    def distance(of: Watch) -> float:
        found, wanted = of.gradients[0], truth.gradients[0]
        assert found.keys() == wanted.keys()
        difference = sum((wanted[n] - found[n]).square().sum() for n in wanted)
        return float((difference / sum(x.square().sum() for x in wanted.values())).sqrt())

    record("bfloat16", {"set-up": name, "ours": distance(ours), "TRL": distance(theirs)})
    assert distance(theirs) <= 2.0**-6
    assert distance(ours) <= 2.0**-6
    for step, (a, b) in enumerate(zip(theirs.losses[:3], ours.losses[:3], strict=True)):
        assert abs(a - b) <= 2.0**-8 * max(1, abs(a)), step
