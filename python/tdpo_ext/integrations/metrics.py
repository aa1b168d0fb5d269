"""Means of metrics over pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PairMetrics:
    """Means over the pairs of several batches; only ``take`` waits for a device."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        """``[names]``"""
        self.pairs = 0

    def add(self, names: list[str], values: Tensor) -> None:
        """Add the metrics of a batch.

        Args:
            names: of the metrics, the same ones at each call.
            values: ``[pairs, names]``, floats on any device.
        """
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        sums = values.sum(0, dtype=wide)
        self.names, self.sums = names, sums if self.sums is None else self.sums + sums
        self.pairs += len(values)

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """Means over the pairs since the last call; empty if there were none.

        Args:
            accelerator: to take means over all processes, each of which must call; None: over this
                process alone.
        """
        sums, pairs = self.sums, self.pairs
        self.sums, self.pairs = None, 0
        if sums is None:
            return {}
        sums = torch.cat([sums, sums.new_tensor([pairs])])
        if accelerator is not None:
            sums = accelerator.gather(sums[None]).sum(0)
        *means, pairs = sums.tolist()
        return {name: value / pairs for name, value in zip(self.names, means, strict=True)}
