"""Every pair of an evaluation counted once, although accelerate repeats some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import IterableDataset


class CountedStream(IterableDataset):  # type: ignore[type-arg]
    """An iterable data set that knows how many examples its last iteration gave."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for example in self.stream:
            self.count += 1
            yield example

    def __getattr__(self, name: str) -> Any:  # set_epoch, generator
        return getattr(self.__dict__["stream"], name)


class GatheredPairs:
    """``gather_for_metrics`` for rows of which the first half are chosen, the second rejected.

    At the end of a data set accelerate drops the examples that it has repeated, and takes a row for
    an example: it would drop half of the last batch. Here a pair is one.
    """

    def __init__(self, accelerator: Any, rows: int) -> None:
        self.accelerator = accelerator
        self.rows = rows
        self.loss_comes = True

    def __call__(self, data: Any) -> Any:
        if self.loss_comes:  # the Trainer gathers it first, as one number for each example
            self.loss_comes = False
            return self.accelerator.gather_for_metrics(data)
        return tree_map_only(Tensor, self._gathered, data)

    def _gathered(self, values: Tensor) -> Any:
        if len(values) != self.rows:  # what preprocess_logits_for_metrics has made of them
            return self.accelerator.gather_for_metrics(values)
        pairs = torch.stack(values.chunk(2), dim=1)
        return self.accelerator.gather_for_metrics(pairs).transpose(0, 1).flatten(0, 1)
