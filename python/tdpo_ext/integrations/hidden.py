"""All that a model's logits are made of: the head's inputs, its weight, scale and softcap.

The logits of a Hugging Face language model are, with h the hidden states that the head takes, W and
b its weight and bias,

    softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

``probe.logit_options_of`` finds a model's scale and softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext.integrations.models import dtype_name


class LogitOptions(NamedTuple):
    """What a model does to h W^T + b."""

    scale: float = 1.0
    softcap: float | None = None

    def applied(self, logits: Tensor) -> Tensor:
        """The model's logits, from the results of its head, ``[..., V]``."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadInputs:
    """All that a model's logits are made of; what an attached model returns for ``HEAD_INPUTS``.

    This is neither a tuple nor a dataclass. Accelerate, FSDP2's mixed precision and DDP look into
    those in a model's outputs and cast, copy or move the tensors there: they would copy the whole
    head at every step.

    Args:
        hidden: ``[..., H]``, the hidden states that the head takes.
        weight: ``[V, H]``, the head's own memory unless that is sharded.
        bias: ``[V]``, or None.
        logit_options: the model's scale and softcap.
        autocast: the dtype of the autocast that the model ran under; None: it ran under none.
        model: the name of the model's class; empty: no model made this (it is from a cache).
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_options: LogitOptions,
        *,
        autocast: torch.dtype | None = None,
        model: str = "",
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.logit_options = logit_options
        self.autocast = autocast
        self.model = model

    def replace(self, **changes: Any) -> HeadInputs:
        """A copy with other values for the named attributes."""
        return HeadInputs(**{**vars(self), **changes})

    def logits(self) -> Tensor:
        """``[..., V]``, as the model itself makes them, under the autocast it ran under."""
        device = self.hidden.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            logits = nn.functional.linear(self.hidden, self.weight, self.bias)
        return self.logit_options.applied(logits)

    def detached(self) -> HeadInputs:
        """The same tensors without their gradients."""
        return self._each(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> HeadInputs:
        """All tensors after ``Tensor.to``, with its arguments; it copies only what differs."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def _each(self, function: Callable[[Tensor], Tensor]) -> HeadInputs:
        return self.replace(
            hidden=function(self.hidden),
            weight=function(self.weight),
            bias=None if self.bias is None else function(self.bias),
        )

    def __repr__(self) -> str:
        described = {
            name: f"{dtype_name(value.dtype)}{[*value.shape]}"
            if isinstance(value, Tensor)
            else repr(value)
            for name, value in vars(self).items()
        }
        return f"HeadInputs({', '.join(f'{name}={what}' for name, what in described.items())})"
