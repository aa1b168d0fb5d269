"""Every trainer x precision x what is trained x reference, from a script with next to nothing set.

Policy and reference are the same model before the first step. So there the loss is log 2 and every
KL and margin is 0, exactly, in every precision, if both go through the same operations in the same
types. (A cached reference has met its tokens in another batch, whose products may round in another
order.)

The steps after that are compared with the same trainer's own DPO at alpha = 0 (TRL), or with the
loss of the models' own logits in the same precision.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
import trl
from recording import record
from tiny_models import tiny_model
from trainer_checks import as_text, examples, tokenizer

from tdpo_ext import LinearTDPOLoss, tdpo_loss
from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl
from tdpo_ext.integrations.adapters import ReferenceAdapter
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets, attach_tdpo

PAIRS, STEPS, LEARNING_RATE = 4, 3, 1e-2
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
PRECISIONS = {
    # What autocasts, and the type of the weights.
    "float32": (None, torch.float32),
    "bf16=True": (torch.bfloat16, torch.float32),
    "fp16=True": (torch.float16, torch.float32),
    "bfloat16 weights": (None, torch.bfloat16),
}
# Bounds of a loss and of a gradient's norm after steps that round in other places.
BOUNDS = {"float32": 2e-6, "bf16=True": 1e-2, "fp16=True": 4e-3, "bfloat16 weights": 1e-2}
REFERENCES = [
    ("full", "separate"),
    ("full", "cached"),
    ("LoRA", "separate"),
    ("LoRA", "adapter off"),
    ("LoRA", 'adapter "ref"'),
    ("LoRA", "cached"),
]


@dataclass(frozen=True)
class Setup:
    precision: str
    trained: str
    reference: str

    @property
    def autocast(self) -> torch.dtype | None:
        return PRECISIONS[self.precision][0]

    @property
    def weights(self) -> torch.dtype:
        return PRECISIONS[self.precision][1]

    def policy(self) -> Any:
        model = tiny_model().to(self.weights)
        if self.trained == "full":
            return model
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        if self.reference == 'adapter "ref"':  # a copy: what PEFT initialises is random
            model.add_adapter("ref", peft.LoraConfig(**LORA))
            values = dict(model.named_parameters())
            for name, value in values.items():
                if ".ref." in name:
                    value.data.copy_(values[name.replace(".ref.", ".default.")].data)
            model.set_adapter("default")
        return model

    def separate(self) -> Any:
        return tiny_model().to(self.weights)


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    start: dict[str, float] = field(default_factory=dict)
    """KL and margin before the first step."""

    def step(self, loss: float, norm: float, metrics: dict[str, float]) -> None:
        if not self.losses:
            self.start = {name: metrics[name] for name in STARTS if name in metrics}
        self.losses.append(loss)
        self.norms.append(norm)


STARTS = ("kl/chosen", "kl/rejected", "rewards/margins")


# --- the trainers ---------------------------------------------------------------------------------


def of_logs(trainer: Any) -> Run:
    trainer.train()
    run = Run()
    for logs in trainer.state.log_history:
        if "loss" in logs:
            run.step(logs["loss"], logs["grad_norm"], logs)
    return run


SHORT: dict[str, Any] = {
    "use_cpu": True,
    "max_steps": STEPS,
    "per_device_train_batch_size": PAIRS,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def with_trl(setup: Setup, folder: Path, *, dpo: bool = False) -> Run:
    """A model by its path and a data set of strings; bf16=True is TRL's default."""
    tiny_model().to(setup.weights).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    options = dict(SHORT)
    if setup.precision != "bf16=True":
        options["bf16"] = False
    if setup.precision == "fp16=True":
        options["fp16"] = True
    options["model_init_kwargs"] = {"dtype": str(setup.weights).removeprefix("torch.")}
    options["precompute_ref_log_probs"] = setup.reference == "cached"
    others: dict[str, Any] = {}
    model: Any = str(folder / "model")
    if setup.reference == 'adapter "ref"':
        del options["model_init_kwargs"]
        model = Setup(setup.precision, "LoRA", "adapter off").policy()  # TRL makes "ref"
    elif setup.trained == "LoRA":
        torch.manual_seed(1)
        others["peft_config"] = peft.LoraConfig(**LORA)
    if (setup.trained, setup.reference) == ("LoRA", "separate"):
        model_class = type(setup.separate())
        others["ref_model"] = model_class.from_pretrained(folder / "model", dtype=setup.weights)
    trainer = trl.DPOTrainer if dpo else of_trl.TDPOTrainer
    config = trl.DPOConfig if dpo else of_trl.TDPOConfig
    alpha = {} if dpo else {"tdpo_alpha": 0.0}
    return of_logs(
        trainer(
            model,
            args=config(str(folder / "out"), **options, **alpha),
            train_dataset=as_text(examples(PAIRS)),
            processing_class=tokenizer(),
            **others,
        )
    )


def with_transformers(setup: Setup, folder: Path) -> Run:
    options = dict(SHORT)
    if setup.autocast is not None:
        options["bf16" if setup.autocast == torch.bfloat16 else "fp16"] = True
    others: dict[str, Any] = {}
    if setup.reference == "separate" and setup.trained == "LoRA":
        others["reference"] = setup.separate()  # of a model without adapters it is a copy
    if setup.reference == "cached":
        others["precompute_reference"] = str(folder / "cache")
    return of_logs(
        of_transformers.TDPOTrainer(
            setup.policy(),
            transformers.TrainingArguments(str(folder), **options),
            train_dataset=examples(PAIRS),
            data_collator=of_transformers.PreferenceCollator(0),
            **others,
        )
    )


@dataclass
class Loop:
    """A loop of one's own, with or without accelerate.

    ``fused``: through ``attach_tdpo``; else from the models' own logits.
    """

    setup: Setup
    fused: bool = True
    accelerator: Any = None

    def run(self) -> Run:
        policy, reference, cached = self.setup.policy(), None, None
        if self.setup.reference in ("separate", "cached"):
            reference = self.setup.separate()
        if self.fused:
            attach_tdpo(policy, LinearTDPOLoss())
            attach_tdpo(reference) if reference is not None else None
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        if self.accelerator is not None:
            policy, optimizer = self.accelerator.prepare(policy, optimizer)
            if reference is not None:
                reference = self.accelerator.prepare_model(reference, evaluation_mode=True)
        half = self.setup.autocast == torch.float16 and self.accelerator is None
        scaler = torch.amp.GradScaler("cpu", enabled=half)
        batch = of_transformers.PreferenceCollator(0)(examples(PAIRS))
        labels = batch.pop("labels")
        if self.setup.reference == "cached":  # one batch: the cache is what it gave
            cached = self.of_reference(policy, reference, batch)
        result = Run()
        for _ in range(STEPS):
            given = self.of_reference(policy, reference, batch) if cached is None else cached
            with self.precision():
                if self.fused:
                    output = policy(**batch, tdpo=TDPOTargets(given, labels)).tdpo
                else:
                    output = tdpo_loss(policy(**batch).logits, given, labels)
            if self.accelerator is None:
                scaler.scale(output.loss).backward()
                scaler.unscale_(optimizer)
            else:
                self.accelerator.backward(output.loss)
                self.accelerator.unscale_gradients()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
            metrics = {name: value.item() for name, value in output.metrics().items()}
            result.step(output.loss.item(), norm, metrics)
            scaler.step(optimizer) if self.accelerator is None else optimizer.step()
            scaler.update()
            optimizer.zero_grad()
        return result

    def precision(self) -> Any:
        """accelerate's is in the models that it has prepared."""
        if self.accelerator is not None or self.setup.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", self.setup.autocast)

    @torch.no_grad()
    def of_reference(self, policy: Any, reference: Any, batch: dict[str, Any]) -> Any:
        off: Any = nullcontext()
        inner = policy.module if hasattr(policy, "module") else policy
        if reference is None:
            off = ReferenceAdapter(inner)
        with off, self.precision():
            model = policy if reference is None else reference
            return model(**batch, tdpo=HEAD_INPUTS) if self.fused else model(**batch).logits


def with_accelerate(setup: Setup, folder: Path) -> Run:
    mixed = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[setup.autocast]
    return Loop(setup, accelerator=accelerate.Accelerator(cpu=True, mixed_precision=mixed)).run()


def with_a_plain_loop(setup: Setup, folder: Path) -> Run:
    return Loop(setup).run()


TRAINERS = {
    "TRL": with_trl,
    "transformers": with_transformers,
    "accelerate loop": with_accelerate,
    "plain loop": with_a_plain_loop,
}


# --- the cells ------------------------------------------------------------------------------------


def cells() -> list[Any]:
    """bf16=True, TRL's default, in make test; the rest in make test-all."""
    return [
        pytest.param(
            trainer,
            Setup(precision, *reference),
            marks=[] if precision == "bf16=True" else pytest.mark.slow,
            id="-".join((trainer, precision, *reference)),
        )
        for trainer in TRAINERS
        for precision in PRECISIONS
        for reference in REFERENCES
    ]


def of_dpo(trainer: str, setup: Setup, folder: Path) -> Run:
    """The same steps without tdpo_ext's seams: TRL's DPO, else the loss of the models' logits."""
    if trainer == "TRL":
        return with_trl(setup, folder, dpo=True)
    return Loop(setup, fused=False).run()


def largest_error(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / max(1e-3, abs(b)) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(autouse=True)
def precision_as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """accelerate keeps one precision a process, and takes float16 on a CPU for float32."""
    made = accelerate.Accelerator.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu")

    monkeypatch.setattr(accelerate.Accelerator, "__init__", make)
    reset = accelerate.state.AcceleratorState._reset_state
    reset(reset_partial_state=True)
    yield
    reset(reset_partial_state=True)


@pytest.mark.parametrize(("trainer", "setup"), cells())
def test_policy_and_reference_start_equal_and_steps_are_those_of_dpo(
    trainer: str, setup: Setup, tmp_path: Path
) -> None:
    ours = TRAINERS[trainer](setup, tmp_path / "ours")
    theirs = of_dpo(trainer, setup, tmp_path / "theirs")
    start = abs(ours.losses[0] - math.log(2))
    loss = largest_error(ours.losses, theirs.losses)
    norm = largest_error(ours.norms, theirs.norms)
    row = {"start": start, "kl": max(ours.start.values(), key=abs), "loss": loss, "norm": norm}
    record(
        "precisions",
        {
            "trainer": trainer,
            "precision": setup.precision,
            "trained": setup.trained,
            "reference": setup.reference,
            **row,
        },
    )
    exact = setup.reference != "cached"
    assert start <= (6e-8 if exact else 1e-3)  # log 2 in float32
    for value in ours.start.values():
        assert value == 0 if exact else abs(value) <= 1e-2
    assert loss <= BOUNDS[setup.precision]
    assert norm <= BOUNDS[setup.precision]
    assert ours.losses[-1] < ours.losses[0]
