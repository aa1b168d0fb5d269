"""attach_tdpo on every language model of the installed transformers that can be made tiny."""

from __future__ import annotations

import copy
import inspect
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from attached_models import gradients, targets, truth
from recording import record
from tiny_architectures import language_models, tiny_architecture
from tiny_models import tiny_batch

from tdpo_ext.integrations.attach import attach_tdpo

pytestmark = pytest.mark.slow

SECONDS = 60
REFUSED = {
    "ClvpForCausalLM": "no output embeddings",
    "FSMTForConditionalGeneration": "does not multiply its input with its weight",
    "HiggsAudioV2ForConditionalGeneration": "no output embeddings",
    "MusicgenForCausalLM": "a ModuleList with 4 modules",
    "MusicgenMelodyForCausalLM": "a ModuleList with 4 modules",
    "ProphetNetForCausalLM": "the results of its head",
    "ProphetNetForConditionalGeneration": "the results of its head",
}
"""And what the message says."""
EXPECTED = {
    "BartForConditionalGeneration",
    "DeepseekV3ForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "T5ForConditionalGeneration",
}
"""These must not be skipped, whatever else becomes of the generic sizes."""


@contextmanager
def seconds(most: int) -> Iterator[None]:
    def give_up(*_: Any) -> None:
        raise TimeoutError(f"it takes more than {most} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def not_compared(name: str, why: str) -> None:
    record("architectures_not_compared", {"model": name, "why": why})
    assert name not in EXPECTED, why
    pytest.skip(why)


def one_line(error: Exception, most: int = 110) -> str:
    text = " ".join(str(error).replace("|", "/").split())
    return text if len(text) <= most else text[:most] + " ..."


@pytest.mark.parametrize("name", language_models())
def test_every_language_model(name: str) -> None:
    transformers.logging.set_verbosity_error()
    with seconds(SECONDS):
        try:
            model = tiny_architecture(name)
        except Exception as error:  # of transformers, before anything of ours
            not_compared(name, f"not built from a small config: {one_line(error)}")
        reference_model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in reference_model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        batch = tiny_batch(model)
        if "use_cache" in inspect.signature(model.forward).parameters:
            batch["inputs"]["use_cache"] = False  # T5Gemma's logits differ with it
        try:
            loss, expected = truth(model, reference_model, batch)
        except Exception as error:
            not_compared(name, f"does not run on text alone: {one_line(error)}")
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
                attach_tdpo(model)
            why = f"refused: {one_line(refusal.value)}"
            record("architectures_not_compared", {"model": name, "why": why})
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "what .* does to the results of its head")
            for each in (model, reference_model):
                attach_tdpo(each)
        got = model(**batch["inputs"], tdpo=targets(model, reference_model, batch)).loss
        error = abs(got.item() - loss.item()) / max(1, loss.item())
        assert error <= 2e-6
        largest = largest_error(gradients(model, got), expected)
        assert largest <= 5e-5
    scale, softcap = model.__dict__["_tdpo"].logit_options
    options = f"{scale:.4g}, {softcap or 'none'}"
    row = {"model": name, "scale, softcap": options, "loss": error, "gradient": largest}
    record("architectures_compared", row)


def largest_error(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """Relative to each parameter's largest gradient, or to a thousandth of the largest of all: that
    of a key's bias is 0 but for rounding."""
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(value.abs().max() for value in expected.values())
    return max(
        ((got[name] - value).abs().max() / value.abs().max().clamp(min=floor)).item()
        for name, value in expected.items()
    )
