"""The reference's forward on a batch, and the processes that share the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.adapters import reference_model
from tdpo_ext.integrations.cached_reference.batches import Row
from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.models import (
    decoder_inputs,
    evaluating,
    language_model,
    unwrapped,
    without_router_loss,
)
from tdpo_ext.integrations.targets import HEAD_INPUTS


class ReferenceRun:
    """Runs the reference as a training step would, and speaks with the other processes.

    Args:
        model: an attached model, the reference; or a PEFT policy with ``of_policy``.
        of_policy: ``model`` is the policy, and the reference its own.
        accelerator: of Accelerate; None: one process.
    """

    def __init__(self, model: nn.Module, of_policy: bool, accelerator: Any) -> None:
        self.model, self.of_policy, self.accelerator = model, of_policy, accelerator
        self.inner = language_model(unwrapped(model))
        self.encoder_decoder = bool(self.inner.config.is_encoder_decoder)
        self.device = self.inner.device if accelerator is None else accelerator.device
        self.process = 0 if accelerator is None else accelerator.process_index
        self.processes = 1 if accelerator is None else accelerator.num_processes

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> HeadInputs:
        """The head inputs of a batch.

        Raises:
            ValueError: the reference has not one hidden state for each token.
        """
        ids, mask = (batch[name].to(self.device) for name in ("input_ids", "attention_mask"))
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.encoder_decoder:
            labels = batch["labels"].to(self.device)
            inputs["decoder_input_ids"] = decoder_inputs(self.inner, labels)
        inputs |= without_router_loss(self.model)
        separate = None if self.of_policy else self.model
        context = reference_model(self.model, separate)
        with autocast_of(self.accelerator), evaluating(self.model), context as reference:
            result = reference(**inputs, tdpo=HEAD_INPUTS)
        # A caller's autocast must not go on with casts that were made without gradients.
        torch.clear_autocast_cache()
        assert isinstance(result, HeadInputs)
        shape = (inputs["decoder_input_ids"] if self.encoder_decoder else ids).shape
        if result.hidden.shape[:2] != shape:
            raise ValueError(
                f"the reference has hidden states {[*result.hidden.shape]} for tokens {[*shape]} "
                "(virtual tokens of prompt tuning?); use a reference that is not cached"
            )
        return result

    def check_padding(self, batch: Mapping[str, Any], rows: Sequence[Row], hidden: Tensor) -> None:
        """Compare the shortest sequence of a batch with itself alone, without padding.

        Args:
            batch: given to the reference.
            rows: its sequences.
            hidden: ``[2B, T, H]``, what the reference returned.

        Raises:
            ValueError: the hidden states depend on padding.
        """
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
                "the reference's hidden states of a sequence depend on its padding: in a batch "
                f"with longer ones, half of its tokens differ by {error:.1g} or more from those "
                "without padding (absolute positions and rows padded on the left?), so tokens "
                "alone do not determine them; pad on the right, or use a reference that is not "
                "cached"
            )

    def _gathered(self, number: int) -> Tensor:
        """``[processes]``, the number of each process."""
        own = torch.tensor([number], device=self.device)
        numbers: Tensor = own if self.accelerator is None else self.accelerator.gather(own)
        return numbers

    def sum(self, number: int) -> int:
        """The sum over all processes; each has to call."""
        return int(self._gathered(number).sum())

    def max(self, number: int) -> int:
        """The largest of all processes; each has to call."""
        return int(self._gathered(number).max())

    def wait(self) -> None:
        """Return when all processes have called."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


_ROUNDING = 0.05
"""The rounding of bfloat16 through many layers stays below; other positions are far above."""


def autocast_of(accelerator: Any) -> Any:
    """The accelerator's autocast; without an accelerator the one in force."""
    return nullcontext() if accelerator is None else accelerator.autocast()
