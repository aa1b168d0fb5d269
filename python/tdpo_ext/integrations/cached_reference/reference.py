"""A reference of which only the head stays in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.heads import head_of, weight_and_bias
from tdpo_ext.integrations.hidden import HeadInputs
from tdpo_ext.integrations.probe import logit_options_of


@dataclass(frozen=True)
class CachedReference:
    """A reference whose hidden states come with the batches and whose head stays in memory."""

    head: HeadInputs
    """The reference's head inputs, with no rows of hidden states."""

    @classmethod
    def of(cls, model: nn.Module) -> CachedReference:
        """The cached reference of a model, with the model's head as it is now.

        Args:
            model: a Hugging Face language model, or a PEFT model of one.

        Raises:
            ValueError: its logits cannot be rebuilt, or its head cannot be fused.
        """
        weight, bias = weight_and_bias(head_of(model))
        return cls.with_head_of(HeadInputs(weight[:0], weight, bias, logit_options_of(model)))

    @classmethod
    def with_head_of(cls, inputs: HeadInputs) -> CachedReference:
        """The cached reference of a model that has returned ``inputs`` for ``HEAD_INPUTS``.

        A weight that requires grad is copied, as it is now; others are shared.
        """
        bias = None if inputs.bias is None else _constant(inputs.bias)
        hidden = inputs.hidden.new_empty(0, inputs.hidden.shape[-1])
        return cls(inputs.replace(hidden=hidden, weight=_constant(inputs.weight), bias=bias))

    def to(self, device: torch.device) -> CachedReference:
        """The same with its head on another device."""
        return CachedReference(self.head.to(device))

    def with_hidden(self, hidden: Tensor | None) -> HeadInputs:
        """What the reference itself would have returned for ``HEAD_INPUTS``.

        Args:
            hidden: ``[..., H]`` floats, ``reference_hidden`` of a batch.

        Raises:
            ValueError: ``hidden`` is None.
        """
        if hidden is None:
            raise ValueError(
                "the reference is cached, but the batch has no reference_hidden; wrap the collator "
                "in CachedReferenceCollator, or give PreferenceCollator examples with "
                "chosen_hidden and rejected_hidden"
            )
        return self.head.to(hidden.device).replace(hidden=hidden)


def _constant(tensor: Tensor) -> Tensor:
    """The values of now: a copy if training may change them."""
    return tensor.detach().clone() if tensor.requires_grad else tensor.detach()
