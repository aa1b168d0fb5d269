"""Faults in other people's trainers: killed and resumed, interrupted, failing, not a number.

A resumed run is the run that was never killed, to the bit. After a fault nothing is left patched,
no adapter off, nothing frozen or thawed, and the same trainer trains on as a new one does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attached_models import lora
from tiny_models import tiny_model
from trainer_checks import Recorder, Stream, as_text, examples, transformers_trainer, trl_trainer

MAKERS = [transformers_trainer, trl_trainer]
STEPS = 4


def trainer(make: Any, folder: Any, *, adapters: bool = False, **options: Any) -> Any:
    model = lora(tiny_model(), target_modules=["q_proj", "v_proj"]) if adapters else tiny_model()
    if make is trl_trainer:
        options["gradient_checkpointing"] = False  # its hooks on the model are not ours
        if not adapters:
            options["ref_model"] = tiny_model()
    given = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    return make(model, folder, **{**given, **options})


# --- killed and resumed ---------------------------------------------------------------------------


class Killed(BaseException):
    pass


class KillAfter(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            raise Killed


TIMES = ("runtime", "per_second", "total_flos", "train_loss")


def logged(made: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}
        for entry in made.state.log_history
    ]


def recorded_run(made: Any, **options: Any) -> tuple[Recorder, dict[str, torch.Tensor]]:
    recorder = Recorder()
    recorder.watch(made)
    made.train(**options)
    return recorder, {name: p.detach().clone() for name, p in made.model.named_parameters()}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_resumed_run_is_the_run_that_was_never_killed(
    make: Any, adapters: bool, tmp_path: Path
) -> None:
    if adapters and make is trl_trainer and transformers.__version__ < "5":
        pytest.skip("a Trainer of version 4 does not load the adapter beside one named ref")
    options: dict[str, Any] = {
        "adapters": adapters,
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = trainer(make, tmp_path / "whole", **options)
    expected, parameters = recorded_run(whole)
    for step in torch.randint(1, STEPS, (1,)).tolist():
        folder = tmp_path / f"killed after {step}"
        with pytest.raises(Killed):
            trainer(make, folder, **options, callbacks=[KillAfter(step)]).train()
        torch.manual_seed(step)  # another process has another state of everything
        made = trainer(make, folder, **options)
        recorder, resumed = recorded_run(made, resume_from_checkpoint=True)
        assert made.state.global_step == STEPS
        assert logged(made) == logged(whole)
        assert recorder.losses == expected.losses[step:]
        for ours, theirs in zip(recorder.batches, expected.batches[step:], strict=True):
            for batch, other in zip(ours, theirs, strict=True):
                assert all(torch.equal(batch[name], other[name]) for name in other)
        assert all(torch.equal(resumed[name], parameters[name]) for name in parameters)


# --- errors in a step -----------------------------------------------------------------------------


def state_of(model: Any) -> dict[str, Any]:
    """What a fault could leave behind."""
    names = ("_active_adapter", "_disable_adapters", "merged_adapters")
    states: dict[str, Any] = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        attachment = vars(module).get("_tdpo")
        states[f"module {name}"] = (
            "forward" in vars(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            [repr(vars(module).get(each)) for each in names],
            attachment and (attachment.request, attachment.result, attachment.numbers),
        )
    return states


@contextmanager
def failing(made: Any, where: str, error: type[BaseException]) -> Iterator[None]:
    """Once, in the second micro-batch."""
    seen = []

    def fail(gradient: torch.Tensor | None = None) -> None:
        raise error("injected")

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() == (where == "reference"):
            return
        seen.append(where)
        if len(seen) == 2:
            output.register_hook(fail) if where == "backward" else fail()

    separate = getattr(made, "reference", None) or getattr(made, "ref_model", None)
    model = separate if where == "reference" and separate is not None else made.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.model.layers[0].self_attn.q_proj.register_forward_hook(hook)
    with pytest.raises(error, match="injected"):
        yield
    handle.remove()


@pytest.mark.parametrize("where", ["reference", "policy", "backward"])
@pytest.mark.parametrize(
    ("adapters", "error"), [(False, RuntimeError), (True, KeyboardInterrupt)], ids=["full", "lora"]
)
@pytest.mark.parametrize("make", MAKERS)
def test_after_an_error_in_a_step_the_trainer_is_as_new(
    make: Any, adapters: bool, where: str, error: type[BaseException], tmp_path: Path
) -> None:
    options = {"adapters": adapters, "max_steps": 2, "gradient_accumulation_steps": 2}
    new = trainer(make, tmp_path, **options)
    transformers.set_seed(0)
    new.train()
    made = trainer(make, tmp_path, **options)
    before = state_of(made.model)
    with failing(made, where, error):
        made.train()
    after = state_of(made.model)
    assert after == before
    transformers.set_seed(0)
    made.train()
    assert logged(made) == logged(new)


@pytest.mark.parametrize("make", MAKERS)
def test_after_an_error_in_evaluation_the_trainer_is_as_new(make: Any, tmp_path: Path) -> None:
    rows = examples(5, seed=1)
    options = {"eval_dataset": as_text(rows) if make is trl_trainer else rows}
    made = trainer(make, tmp_path, per_device_eval_batch_size=2, adapters=True, **options)
    expected = made.evaluate()
    before = state_of(made.model)
    seen = []

    def fail(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 4:  # reference and policy of a first batch; the reference of a second
            raise KeyboardInterrupt("injected")

    handle = made.model.get_base_model().model.norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt, match="injected"):
        made.evaluate()
    handle.remove()
    assert state_of(made.model) == before
    again = made.evaluate()
    assert {k: v for k, v in again.items() if "kl" in k or "loss" in k} == {
        k: v for k, v in expected.items() if "kl" in k or "loss" in k
    }


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_not_a_number_is_logged_as_such(make: Any, tmp_path: Path) -> None:
    made = trainer(
        make, tmp_path, adapters=True, max_steps=1, logging_nan_inf_filter=False, learning_rate=0.0
    )
    before = state_of(made.model)

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output * math.nan if torch.is_grad_enabled() else None

    handle = made.model.get_base_model().model.norm.register_forward_hook(spoil)
    made.train()
    handle.remove()
    assert math.isnan(made.state.log_history[0]["loss"])
    assert math.isnan(made.state.log_history[0]["kl/chosen"])
    assert state_of(made.model) == before


class Dying(Stream):
    def __iter__(self) -> Iterator[Any]:
        yield self.rows[0]
        os._exit(1)


def test_a_worker_that_dies_is_reported_and_the_trainer_goes_on(tmp_path: Path) -> None:
    options = {"dataloader_num_workers": 1, "train_dataset": Dying(examples(4)), "max_steps": 2}
    made = trainer(transformers_trainer, tmp_path, adapters=True, **options)
    before = state_of(made.model)
    with pytest.raises(RuntimeError, match="worker"):
        made.train()
    assert state_of(made.model) == before
    made.train_dataset = Stream(examples(11))
    made.train()
    assert made.state.global_step == 2
