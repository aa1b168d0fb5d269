"""Copies and pickles of an attached model, and what other libraries wrap around its forward."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from attached_models import gradients, targets, truth
from tiny_models import tiny_batch, tiny_model

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.attach import HEAD_INPUTS, attach_tdpo, detach_tdpo

LOSS = LinearTDPOLoss(beta=0.3, variant="tdpo1")


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle, protocol 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "torch.save": saved_and_loaded,
    "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


def prompted(model: Any) -> Any:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_loss_and_its_own_gradients(how: str) -> None:
    model, reference_model = tiny_model(), attach_tdpo(tiny_model(seed=1))
    attach_tdpo(model, LOSS)
    batch = tiny_batch(model)
    asked = targets(model, reference_model, batch)
    expected = model(**batch["inputs"], tdpo=asked).loss
    wanted = gradients(model, expected)
    copied = COPIES[how](model)
    assert type(copied) is type(model)
    loss = copied(**batch["inputs"], tdpo=asked).loss
    assert torch.equal(loss, expected)
    got = gradients(copied, loss)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    # Without a copy of the head at each call, and with nothing of the original's.
    given = copied(**batch["inputs"], tdpo=HEAD_INPUTS)
    assert given.weight is copied.lm_head.weight
    assert (given.weight is model.lm_head.weight) == (how == "copy")


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_model_that_was_detached_is_plain(how: str) -> None:
    model = detach_tdpo(attach_tdpo(tiny_model()))
    copied = COPIES[how](model)
    assert type(copied) is type(model) is type(tiny_model())
    assert type(copied.lm_head) is torch.nn.Linear
    assert copied.forward.__func__ is type(copied).forward


def test_a_copy_is_detached_by_itself() -> None:
    model = attach_tdpo(tiny_model())
    copied = detach_tdpo(copy.deepcopy(model))
    batch = tiny_batch(model)
    assert type(copied) is type(tiny_model())
    assert model(**batch["inputs"], tdpo=HEAD_INPUTS).weight is model.lm_head.weight


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_peft_model(how: str) -> None:
    model = attach_tdpo(prompted(tiny_model()))
    batch = tiny_batch(model)
    copied = COPIES[how](model)
    asked = targets(model, attach_tdpo(tiny_model(seed=1)), batch)
    loss, expected = (each(**batch["inputs"], tdpo=asked).loss for each in (copied, model))
    assert torch.equal(loss, expected)


def answer_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch["inputs"], tdpo=targets(model, model, batch)).loss


def in_another_process(model: Any, batch: dict[str, Any], results: Any) -> None:
    results.put(answer_of(model, batch).item())


@pytest.mark.slow
def test_an_attached_model_goes_to_a_spawned_process() -> None:
    model = attach_tdpo(tiny_model(), LOSS)
    batch = tiny_batch(model)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=in_another_process, args=(model, batch, results))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert results.get() == answer_of(model, batch).item()


def test_an_attached_model_is_freed_as_soon_as_nobody_has_it() -> None:
    """No cycle through its forward: the memory of a model does not wait for the collector."""
    model = attach_tdpo(tiny_model())
    weight = weakref.ref(model.lm_head.weight)
    gc.disable()
    try:
        detach_tdpo(model)
        attach_tdpo(model)
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_it_looks_like_the_class_that_it_was() -> None:
    model, plain = attach_tdpo(tiny_model()), tiny_model()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert isinstance(model, type(plain))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(type(plain), name)
    assert repr(model) == repr(plain)
    assert {*vars(model)} - {*vars(plain)} == {"_tdpo"}


# --- accelerate -----------------------------------------------------------------------------------


def mixed() -> accelerate.Accelerator:
    return accelerate.Accelerator(cpu=True, mixed_precision="bf16")


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
def test_unwrapping_a_prepared_model_leaves_it_attached(order: str) -> None:
    """accelerate follows ``__wrapped__`` as far as it leads, so ours must have none."""
    model = tiny_model()
    if order == "attach first":
        prepared = mixed().prepare_model(attach_tdpo(model))
    else:
        prepared = attach_tdpo(mixed().prepare_model(model))
    batch = tiny_batch(model)
    before = answer_of(prepared, batch)
    assert prepared(**batch["inputs"], tdpo=HEAD_INPUTS).autocast == torch.bfloat16
    unwrapped = accelerate.Accelerator().unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    assert answer_of(unwrapped, batch).item() == pytest.approx(before.item(), abs=1e-6)
    if order == "attach first":
        assert unwrapped(**batch["inputs"], tdpo=HEAD_INPUTS).autocast is None
        again = pickle.loads(pickle.dumps(unwrapped))
        assert torch.equal(answer_of(again, batch), answer_of(unwrapped, batch))
    logits = unwrapped(**batch["inputs"]).logits
    torch.testing.assert_close(logits, tiny_model()(**batch["inputs"]).logits, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("order", ["attach first", "prepare first"])
def test_policy_and_reference_prepared_for_bfloat16_start_at_log_2(order: str) -> None:
    pair = []
    for _ in range(2):
        model = tiny_model()
        if order == "attach first":
            pair.append(mixed().prepare_model(attach_tdpo(model), evaluation_mode=True))
        else:
            pair.append(attach_tdpo(mixed().prepare_model(model, evaluation_mode=True)))
    policy, reference_model = pair
    batch = tiny_batch(policy)
    output = policy(**batch["inputs"], tdpo=targets(policy, reference_model, batch)).tdpo
    assert output.loss.item() == pytest.approx(0.6931471805599453, abs=1e-7)
    assert not output.chosen_kl.any()
    assert not output.rejected_kl.any()


OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "cpu_offload": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
    "dispatch": lambda model: accelerate.dispatch_model(
        model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True
    ),
}


@pytest.mark.parametrize("order", ["attach first", "offload first"])
@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_reference(how: str, order: str) -> None:
    model = attach_tdpo(tiny_model())
    batch = tiny_batch(model)
    plain = attach_tdpo(tiny_model(seed=1))
    expected = model(**batch["inputs"], tdpo=targets(model, plain, batch)).loss
    if order == "attach first":
        offloaded = OFFLOADS[how](attach_tdpo(tiny_model(seed=1)))
    else:
        offloaded = attach_tdpo(OFFLOADS[how](tiny_model(seed=1)))
    for _ in range(2):
        got = model(**batch["inputs"], tdpo=targets(model, offloaded, batch)).loss
        assert torch.equal(got, expected)
    wanted = tiny_model(seed=1)(**batch["inputs"]).logits
    assert torch.equal(offloaded(**batch["inputs"]).logits, wanted)
    detach_tdpo(offloaded)
    assert torch.equal(offloaded(**batch["inputs"]).logits, wanted)
    assert "_tdpo_plain_class" not in vars(type(offloaded.lm_head))
    accelerate.hooks.remove_hook_from_module(attach_tdpo(offloaded), recurse=True)
    if how == "dispatch":  # the other's weights stay where they were
        assert torch.equal(offloaded(**batch["inputs"]).logits, wanted)
        assert torch.equal(answer_of(offloaded, batch), answer_of(plain, batch))
        detach_tdpo(offloaded)
        assert type(offloaded) is type(tiny_model())


# --- what only wraps the head ---------------------------------------------------------------------


class CastOutputToFloat(torch.nn.Sequential):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).float()


class Halved(torch.nn.Sequential):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) / 2


def test_a_head_inside_a_cast_is_served() -> None:
    model, reference_model = tiny_model(), attach_tdpo(tiny_model(seed=1))
    model.lm_head = CastOutputToFloat(model.lm_head)
    batch = tiny_batch(model)
    loss, expected = truth(model, detach_tdpo(reference_model), batch)
    attach_tdpo(reference_model)
    attach_tdpo(model)
    got = model(**batch["inputs"], tdpo=targets(model, reference_model, batch)).loss
    torch.testing.assert_close(got, loss.float(), rtol=1e-5, atol=1e-6)
    assert expected.keys() == gradients(model, got).keys()


def test_a_wrapper_that_does_more_than_cast_is_seen() -> None:
    model = tiny_model()
    model.lm_head = Halved(model.lm_head)
    with pytest.raises(ValueError, match="no known field"):
        attach_tdpo(model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 61))
    with pytest.raises(ValueError, match=r"Sequential with 2 modules inside \(Linear, Linear\)"):
        attach_tdpo(model)
