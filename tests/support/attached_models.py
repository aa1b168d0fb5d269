"""Models with attach_tdpo: what they are given, and the loss and gradients they should have."""

from __future__ import annotations

from typing import Any

import peft
import torch

from tdpo_ext import reference
from tdpo_ext.integrations.attach import HEAD_INPUTS, TDPOTargets


def targets(model: Any, reference_model: Any, batch: dict[str, Any]) -> TDPOTargets:
    with torch.no_grad():
        of_reference = reference_model(**batch["inputs"], tdpo=HEAD_INPUTS)
    if model.config.is_encoder_decoder:
        return TDPOTargets(of_reference, shift_labels=batch["labels"])
    return TDPOTargets(of_reference, batch["labels"])


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def truth(
    model: Any, reference_model: Any, batch: dict[str, Any], **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients from the models' own logits."""
    with torch.no_grad():
        reference_logits = reference_model(**batch["inputs"]).logits
    kind = "shift_labels" if model.config.is_encoder_decoder else "labels"
    output = reference.tdpo_loss(
        model(**batch["inputs"]).logits.double(),
        reference_logits.double(),
        **{kind: batch["labels"]},
        **options,
    )
    return output.loss.detach(), gradients(model, output.loss)


def assert_equal_gradients(got: dict[str, Any], expected: dict[str, Any], bound: float) -> float:
    """Returns the largest difference, relative to each parameter's largest gradient."""
    assert got.keys() == expected.keys()
    largest = 0.0
    for name, value in expected.items():
        error = ((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-6)).item()
        assert error <= bound, name
        largest = max(largest, error)
    return largest


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, **options))
    with torch.no_grad():  # B starts at 0, where the adapter does nothing
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return wrapped.eval()
