"""Trainers on several processes, against one in float64 (``distributed_worker``)."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from typing import Any

import torch.distributed as dist
from distributed_worker import scenario, unwrapped_name, whole
from test_attach import lora
from tiny_models import tiny_model
from trainer_checks import Recorder, check_against_float64, transformers_trainer, trl_trainer


def trained(
    make: Any, model: Any, reference_model: Any, *, gradients: bool = True, **options: Any
) -> dict[str, float]:
    """Whole steps of a trainer on all processes; 11 examples do not divide evenly."""
    before = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        made = make(model, folder, per_device_train_batch_size=1, num_train_epochs=1, **options)
        recorder = Recorder()
        recorder.watch(made)
        made.train()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (recorder.batches, recorder.losses))
    of_processes = zip(*(recorded[0] for recorded in everywhere), strict=True)
    steps = [[batch for part in step for batch in part] for step in of_processes]
    # Gradients are averaged over processes, and so is the loss.
    of_processes = zip(*(recorded[1] for recorded in everywhere), strict=True)
    losses = [sum(parts) / len(parts) for parts in of_processes]
    recorded = [
        {unwrapped_name(n): whole(g) for n, g in each.items()} for each in recorder.gradients
    ]
    if not gradients:
        recorded = [{} for _ in losses if _]
    return check_against_float64(steps, losses, recorded, before, reference_model)


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
