"""Every pair of an evaluation counts once, although accelerate repeats some.

Accelerate fills the last batches of all processes with examples from the beginning of the data set,
so that every process has as many batches of the same size.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tdpo_ext.integrations.streams import CountedStream


def unrepeated_pairs(accelerator: Any, pairs: int) -> int:
    """The number of pairs of the current batch, from its first on, that are not repetitions.

    Args:
        accelerator: the trainer's ``Accelerator``, while it iterates over an evaluation set.
        pairs: the number of pairs in this process's batch.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader:
        return pairs
    dataloader = state.active_dataloader
    stream, sampler = dataloader.dataset, dataloader.batch_sampler
    if isinstance(stream, IterableDatasetShard):
        counted = isinstance(stream.dataset, CountedStream) and not stream.drop_last
        left = stream.dataset.count % (pairs * stream.num_processes) if counted else 0
        process = stream.process_index
    else:
        left = state.remainder if getattr(sampler, "even_batches", True) else 0
        process = getattr(sampler, "process_index", 0)
    return min(max(left - process * pairs, 0), pairs) if left > 0 else pairs


def count_stream(dataloader: Any) -> None:
    """Let ``unrepeated_pairs`` know the length of an iterable data set that processes share.

    Args:
        dataloader: a data loader that accelerate has prepared. Others are left alone.

    Raises:
        ValueError: its workers read the data set, so that this process cannot count the examples.
    """
    shard = getattr(dataloader, "dataset", None)
    if not isinstance(shard, IterableDatasetShard):
        return
    if dataloader.num_workers > 0:
        raise ValueError(
            f"evaluation of an iterable data set on {shard.num_processes} processes with "
            f"dataloader_num_workers={dataloader.num_workers}: only the workers know which "
            "examples are repetitions that fill the last batches. Use dataloader_num_workers=0 or "
            "a data set with a length"
        )
    if not isinstance(shard.dataset, CountedStream):
        shard.dataset = CountedStream(shard.dataset)


class GatheredPairs:
    """``gather_for_metrics`` for rows whose first half is chosen and whose second half is rejected.

    At the end of a data set accelerate drops the repeated examples and takes every row for one
    example, so it would drop half of the last batch. Here a pair is one example.

    Args:
        accelerator: the trainer's ``Accelerator``.
        rows: the number of rows of this process's batch, two for each pair.
    """

    def __init__(self, accelerator: Any, rows: int) -> None:
        self.accelerator = accelerator
        self.rows = rows
        self.is_loss_next = True

    def __call__(self, data: Any) -> Any:
        if self.is_loss_next:  # the Trainer gathers it first, as one number for each example
            self.is_loss_next = False
            return self.accelerator.gather_for_metrics(data)
        return tree_map_only(Tensor, self._gathered, data)

    def _gathered(self, values: Tensor) -> Any:
        if len(values) != self.rows:  # preprocess_logits_for_metrics has made one row a pair
            return self.accelerator.gather_for_metrics(values)
        pairs = torch.stack(values.chunk(2), dim=1)
        return self.accelerator.gather_for_metrics(pairs).transpose(0, 1).flatten(0, 1)
