"""Trainers on several processes, against one in float64 (``distributed_worker``)."""

from __future__ import annotations

import contextlib
import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from attached_models import lora
from distributed_worker import scenario, unwrapped_name, whole
from model_scenarios import LEARNING_RATE, Engine, named, steps_of
from tiny_models import tiny_model
from torch import Tensor
from trainer_checks import (
    ARGUMENTS,
    Recorder,
    Stream,
    as_text,
    check_against_float64,
    examples,
    pairs_in,
    tokenizer,
    transformers_trainer,
    trl_trainer,
)

from tdpo_ext.integrations import transformers as of_transformers
from tdpo_ext.integrations import trl as of_trl


def trained(
    make: Any, model: Any, reference_model: Any, *, gradients: bool = True, **options: Any
) -> dict[str, float]:
    """Whole steps of a trainer on all processes; 11 examples do not divide evenly."""
    before = copy.deepcopy(model)
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1, **options}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        made = make(model, folder, **options)
        recorder = Recorder()
        recorder.watch(made)
        made.train()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (recorder.batches, recorder.losses))
    of_processes = zip(*(recorded[0] for recorded in everywhere), strict=True)
    steps = [[batch for part in step for batch in part] for step in of_processes]
    whole_pairs = [(r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]) for r in examples()]
    seen = [pair for step in steps for batch in step for pair in pairs_in(batch)]
    assert seen
    assert all(pair in whole_pairs for pair in seen)
    # Gradients are averaged over processes, and so is the loss.
    of_processes = zip(*(recorded[1] for recorded in everywhere), strict=True)
    losses = [sum(parts) / len(parts) for parts in of_processes]
    recorded = [
        {unwrapped_name(n): whole(g) for n, g in each.items()} for each in recorder.gradients
    ]
    if not gradients:
        recorded = [{} for _ in losses if _]
    return check_against_float64(steps, losses, recorded, before, reference_model)


class Accelerated(Engine):
    """A loop of one's own with ``accelerator.prepare``."""

    def __init__(self, model: Any) -> None:
        self.accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        return {unwrapped_name(n): p.grad for n, p in self.model.named_parameters()}


@scenario
def accelerate_loop() -> dict[str, float]:
    return steps_of(named("llama"), Accelerated)


@scenario
def transformers_trainer_full() -> dict[str, float]:
    model = tiny_model()
    return trained(transformers_trainer, model, copy.deepcopy(model), gradient_accumulation_steps=2)


@scenario
def transformers_trainer_lora() -> dict[str, float]:
    model = lora(tiny_model(), target_modules=["q_proj", "v_proj"])
    return trained(transformers_trainer, model, None)


@scenario
def trl_trainer_full() -> dict[str, float]:
    model = tiny_model()
    return trained(
        trl_trainer,
        model,
        copy.deepcopy(model),
        ref_model=copy.deepcopy(model),
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
    )


def cached(make: Any, reference_model: Any, **options: Any) -> dict[str, float]:
    """Each process has run the reference on its share, and reads what all have written."""
    folders: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    try:
        trained_steps = trained(make, tiny_model(), reference_model, **options, cache=folders[0])
        sizes = [path.stat().st_size // 32 for path in sorted(Path(folders[0]).glob("*.index"))]
        assert sizes == [12, 10]  # of 22 sequences; the batches have two each
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folders[0])
    return trained_steps


@scenario
def transformers_trainer_cached_reference() -> dict[str, float]:
    def make(model: Any, folder: Any, *, cache: str, **options: Any) -> Any:
        return transformers_trainer(model, folder, precompute_reference=cache, **options)

    return cached(make, tiny_model(seed=1), reference=tiny_model(seed=1))


@scenario
def trl_trainer_cached_reference() -> dict[str, float]:
    def make(model: Any, folder: Any, *, cache: str, **options: Any) -> Any:
        cache_options = {"precompute_ref_log_probs": True, "tdpo_reference_cache": cache}
        return trl_trainer(model, folder, **cache_options, **options)

    return cached(
        make, tiny_model(seed=1), ref_model=tiny_model(seed=1), gradient_checkpointing=False
    )


@scenario
def transformers_trainer_stream() -> dict[str, float]:
    """accelerate would have one process cut batches for all."""
    model = tiny_model()
    stream = Stream(examples(7))
    options = {"train_dataset": stream, "max_steps": 3, "gradient_accumulation_steps": 2}
    return trained(transformers_trainer, model, copy.deepcopy(model), **options)


@scenario
def transformers_trainer_split_batches() -> dict[str, float]:
    model = tiny_model()
    options: dict[str, Any] = {"accelerator_config": {"split_batches": True}, "max_steps": 3}
    options |= {"train_dataset": Stream(examples(7)), "per_device_train_batch_size": 4}
    return trained(transformers_trainer, model, copy.deepcopy(model), **options)


@scenario
def transformers_trainer_drop_last() -> dict[str, float]:
    model = tiny_model()
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 2}
    return trained(transformers_trainer, model, copy.deepcopy(model), **options)


@scenario
def trl_trainer_stream() -> dict[str, float]:
    model = tiny_model()
    options = {"ref_model": copy.deepcopy(model), "gradient_checkpointing": False, "max_steps": 3}
    stream = as_text(examples(7)).to_iterable_dataset()
    return trained(trl_trainer, model, copy.deepcopy(model), train_dataset=stream, **options)


@scenario
def trl_counts_tokens_and_gathers_logits_of_all() -> dict[str, float]:
    """Five pairs on two processes; the sixth is a repeated one, and is no pair of the set."""
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    rows = examples(5, seed=1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        made = of_trl.TDPOTrainer(
            tiny_model(),
            tiny_model(seed=1),
            of_trl.TDPOConfig(
                folder,
                tdpo_fused_head=False,
                max_steps=2,
                per_device_train_batch_size=1,
                per_device_eval_batch_size=1,
                **{**ARGUMENTS, "learning_rate": 0.0},
            ),
            train_dataset=as_text(examples()),
            eval_dataset=as_text(rows),
            processing_class=tokenizer(),
            compute_metrics=compute_metrics,
        )
        recorder = Recorder()
        recorder.watch(made)
        made.train()
        metrics = made.evaluate()
    own = sum(int(batch["attention_mask"].sum()) for step in recorder.batches for batch in step)
    counts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(counts, own)
    assert metrics["eval_num_tokens"] == recorder.logs[1]["num_tokens"] == sum(counts)

    batch = of_transformers.PreferenceCollator(0)(rows)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = tiny_model()(**inputs).logits
    (prediction,) = seen
    # A row of each process in a step: two pairs at once, the last by itself.
    order = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]
    found = torch.from_numpy(prediction.predictions)
    assert len(found) == len(order)
    errors = [
        (found[place, :length] - wanted[row, :length]).abs().max().item()
        for place, row in enumerate(order)
        if (length := int(batch["attention_mask"][row].sum()))
    ]
    return {"loss": max(errors), "gradient": 0.0}
