"""ZeRO-3 of DeepSpeed, against one process in float64 (``distributed_worker``)."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from distributed_worker import scenario
from model_scenarios import LEARNING_RATE, Engine, named, steps_of
from tiny_models import tiny_model
from torch import Tensor
from trainer_checks import transformers_trainer
from trainer_scenarios import trained
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    # Every parameter is freed between its uses, however small.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class ZeRO3(Engine):
    def __init__(self, model: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained, lr=LEARNING_RATE) if trained else None,
            config=ZERO,
        )

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        self.model.backward(loss)
        return {n: safe_get_full_grad(p) for n, p in self.model.module.named_parameters()}

    def step(self) -> None:
        self.model.step()


@scenario
def zero3_untied() -> dict[str, float]:
    return steps_of(named("llama"), ZeRO3)


@scenario
def zero3_tied() -> dict[str, float]:
    return steps_of(named("gpt2-tied"), ZeRO3)


class ZeRO3OfPartitioned(ZeRO3):
    """As ``from_pretrained`` makes models where DeepSpeed is configured: never whole."""

    @staticmethod
    def before_attach(model: Any) -> None:
        deepspeed.zero.Init(module=model, config_dict_or_path=ZERO)


@scenario
def zero3_of_a_partitioned_model() -> dict[str, float]:
    return steps_of(named("llama"), ZeRO3OfPartitioned)


@scenario
def zero3_reference_too() -> dict[str, float]:
    return steps_of(named("llama"), ZeRO3, shard_reference=True)


@scenario
def zero3_in_transformers_trainer() -> dict[str, float]:
    """Errors of the steps' losses only, since DeepSpeed keeps its gradients to itself."""
    model = tiny_model()
    errors = trained(
        transformers_trainer,
        model,
        copy.deepcopy(model),
        gradients=False,
        deepspeed={**ZERO, "gradient_accumulation_steps": "auto"},
    )
    return {"loss": errors["loss"], "gradient": 0.0}


@scenario
def deepspeed_in_bf16_starts_at_log_2() -> dict[str, float]:
    """DeepSpeed casts the policy's weights, and the reference's have to be the same."""
    errors = []
    for stage in (2, 3):
        unset_hf_deepspeed_config()  # an earlier trainer's, under which models are made in parts
        zero = {**ZERO, "zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            options = {"bf16": True, "deepspeed": zero, "max_steps": 1}
            options["per_device_train_batch_size"] = 1
            made = transformers_trainer(tiny_model(), folder, **options)
            made.train()
        first = made.state.log_history[0]
        errors += [abs(first["loss"] - torch.tensor(2.0).log().item()), first["kl/chosen"]]
    return {"loss": max(errors), "gradient": 0.0}
