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
    """A reference whose hidden states come with the batches; its head, which stays in memory."""

    head: HeadInputs
    """All that the reference's logits are made of but for the hidden states."""

    @classmethod
    def of(cls, model: nn.Module) -> CachedReference:
        """With the model's head as it is now."""
        weight, bias = weight_and_bias(head_of(model))
        return cls.with_head_of(HeadInputs(weight[:0], weight, bias, logit_options_of(model)))

    @classmethod
    def with_head_of(cls, inputs: HeadInputs) -> CachedReference:
        """With the head of what a reference gave for ``HEAD_INPUTS``. A weight that is trained is
        copied, as it is now."""
        bias = None if inputs.bias is None else _constant(inputs.bias)
        hidden = inputs.hidden.new_empty(0, inputs.hidden.shape[-1])
        return cls(inputs.replace(hidden=hidden, weight=_constant(inputs.weight), bias=bias))

    def to(self, device: torch.device) -> CachedReference:
        return CachedReference(self.head.to(device))

    def with_hidden(self, hidden: Tensor | None) -> HeadInputs:
        """What the reference itself would have given for ``HEAD_INPUTS``.

        Args:
            hidden: ``[..., H]``, ``reference_hidden`` of a batch.
        """
        if hidden is None:
            raise ValueError(
                "the reference is cached, but the batch has no reference_hidden; wrap the collator "
                "in CachedReferenceCollator, or give PreferenceCollator examples with "
                "chosen_hidden and rejected_hidden"
            )
        return self.head.to(hidden.device).replace(hidden=hidden)


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach().clone() if tensor.requires_grad else tensor.detach()
