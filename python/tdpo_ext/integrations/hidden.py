"""What a Hugging Face language model gives its head, and the head itself.

The logits of such models are, with h what the head takes, W and b its weight and bias,

    softcap tanh(scale (h W^T + b) / softcap)          without softcap: scale (h W^T + b)

``probe.logit_options_of`` finds a model's scale and softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LogitOptions(NamedTuple):
    """What a model does to h W^T + b."""

    scale: float = 1.0
    softcap: float | None = None

    def applied(self, logits: Tensor) -> Tensor:
        """To the results of the head."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HeadInputs:
    """All that a model's logits are made of.

    A plain class, no tuple and no dataclass: what casts, copies or moves the tensors it finds in a
    model's outputs (accelerate, FSDP2's mixed precision, DDP) looks into those, and would make a
    copy of the whole head at every step.
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
        """[..., H]"""
        self.weight = weight
        """[V, H], the head's own memory where that is not sharded"""
        self.bias = bias
        """[V]"""
        self.logit_options = logit_options
        self.autocast = autocast
        """The dtype of the autocast that the model ran under; None: it ran under none."""
        self.model = model
        """The class of the model that has made this; empty: none has, as with a cache."""

    def replace(self, **changes: Any) -> HeadInputs:
        return HeadInputs(**{**vars(self), **changes})

    def logits(self) -> Tensor:
        """[..., V], as the model itself makes them, under the autocast it ran under."""
        device = self.hidden.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            logits = nn.functional.linear(self.hidden, self.weight, self.bias)
        return self.logit_options.applied(logits)

    def detached(self) -> HeadInputs:
        return self._each(lambda tensor: tensor.detach())

    def to(self, *args: Any, **kwargs: Any) -> HeadInputs:
        """All tensors with ``Tensor.to``: what is there already is not copied."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def _each(self, function: Callable[[Tensor], Tensor]) -> HeadInputs:
        return self.replace(
            hidden=function(self.hidden),
            weight=function(self.weight),
            bias=None if self.bias is None else function(self.bias),
        )

    def __repr__(self) -> str:
        described = {
            name: f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
            if isinstance(value, Tensor)
            else repr(value)
            for name, value in vars(self).items()
        }
        return f"HeadInputs({', '.join(f'{name}={what}' for name, what in described.items())})"
