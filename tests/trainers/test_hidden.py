"""What is read of a Hugging Face model beside its logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model

from tdpo_ext.integrations.models import decoder_inputs, router_coefficient

LABELS = torch.tensor([[5, 6, 7], [8, -100, -100]])


def without_a_helper(**options: Any) -> Any:
    """As the class of this config, which has no method for it."""
    return SimpleNamespace(config=transformers.M2M100Config(**options))


@pytest.mark.parametrize("make", [lambda: tiny_model("t5-untied"), without_a_helper])
def test_a_decoder_is_one_token_behind_its_labels(make: Any) -> None:
    model = make()
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    wanted = [[start, 5, 6], [start, 8, padding]]
    assert decoder_inputs(model, LABELS).tolist() == wanted


def test_a_config_without_a_start_token_is_refused() -> None:
    with pytest.raises(ValueError, match="needs decoder_start_token_id and pad_token_id, got None"):
        decoder_inputs(without_a_helper(decoder_start_token_id=None), LABELS)


def test_a_t5_without_a_start_token_is_refused() -> None:
    model = tiny_model("t5-untied")
    del model.config.decoder_start_token_id
    with pytest.raises(ValueError, match="T5ForConditionalGeneration needs decoder_start_token_id"):
        decoder_inputs(model, LABELS)


@pytest.mark.parametrize(
    ("architecture", "coefficient"), [("mixtral", 0.25), ("jetmoe", 0.25), ("llama", 0.0)]
)
def test_the_coefficient_of_a_routers_loss(architecture: str, coefficient: float) -> None:
    model = tiny_model(architecture)
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(model.config, name):
            setattr(model.config, name, coefficient)
    assert router_coefficient(model) == coefficient
