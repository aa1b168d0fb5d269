"""A forward of the reference for the cache, on all processes that share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import ReferenceAdapter
from tdpo_ext.integrations.cached_reference.batches import Row
from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.models import (
    decoder_inputs,
    evaluating,
    language_model,
    text_config,
    unwrapped,
)
from tdpo_ext.integrations.targets import HEAD_INPUTS


class ReferenceRun:
    """A reference and the processes that share it."""

    def __init__(self, model: nn.Module, of_policy: bool, accelerator: Any) -> None:
        self.model, self.of_policy, self.accelerator = model, of_policy, accelerator
        self.inner = language_model(unwrapped(model))
        self.encoder_decoder = bool(self.inner.config.is_encoder_decoder)
        self.device = self.inner.device if accelerator is None else accelerator.device
        self.process = 0 if accelerator is None else accelerator.process_index
        self.processes = 1 if accelerator is None else accelerator.num_processes

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> HeadInputs:
        """What the head takes for a batch, as a step of training would ask the reference."""
        ids, mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.encoder_decoder:
            labels = batch["labels"].to(self.device)
            inputs["decoder_input_ids"] = decoder_inputs(self.inner, labels)
        if hasattr(text_config(self.model), "output_router_logits"):
            inputs["output_router_logits"] = False
        adapter = ReferenceAdapter(unwrapped(self.model)) if self.of_policy else nullcontext()
        with autocast_of(self.accelerator), evaluating(self.model), adapter:
            result = self.model(**inputs, tdpo=HEAD_INPUTS)
        torch.clear_autocast_cache()  # of casts made without gradients, under a caller's autocast
        assert isinstance(result, HeadInputs)
        shape = (inputs["decoder_input_ids"] if self.encoder_decoder else ids).shape
        if result.hidden.shape[:2] != shape:
            raise ValueError(
                f"the reference has hidden states {[*result.hidden.shape]} for tokens {[*shape]} "
                "(virtual tokens of prompt tuning?); use a reference that is not cached"
            )
        return result

    def check_padding(self, batch: Mapping[str, Any], rows: Sequence[Row], hidden: Tensor) -> None:
        """Raise ValueError unless the batch's shortest sequence has the same states by itself."""
        number = min(range(len(rows)), key=lambda n: rows[n].tokens or batch["input_ids"].numel())
        row, each = rows[number], slice(number, number + 1)
        on = batch["attention_mask"][number] != 0
        alone = {name: batch[name][each, on] for name in ("input_ids", "attention_mask")}
        if self.encoder_decoder:
            alone["labels"] = batch["labels"][each, batch["labels"][number] != -100]
        wanted = self(alone).hidden[0].float()
        padded = hidden[number, row.start : row.start + row.tokens].float()
        error = ((padded - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()
        if not error <= _ROUNDING:
            raise ValueError(
                "the reference's hidden states of a sequence depend on its padding: beside longer "
                f"ones half of its tokens differ by {error:.1g} or more from those it has alone "
                "(absolute positions and rows padded on the left?), so they cannot be kept by "
                "tokens; pad on the right, or use a reference that is not cached"
            )

    def _of_all(self, number: int) -> Tensor:
        given = torch.tensor([number], device=self.device)
        gathered: Tensor = given if self.accelerator is None else self.accelerator.gather(given)
        return gathered

    def sum(self, number: int) -> int:
        return int(self._of_all(number).sum())

    def max(self, number: int) -> int:
        return int(self._of_all(number).max())

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


_ROUNDING = 0.05
"""bfloat16 through many layers stays below; another position is far above."""


def autocast_of(accelerator: Any) -> Any:
    return nullcontext() if accelerator is None else accelerator.autocast()
