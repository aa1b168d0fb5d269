"""Data sets without the pairs of which truncation leaves nothing to score."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from tdpo_ext.integrations.preferences import COLUMNS, EMPTY, limit_of
from tdpo_ext.integrations.streams import FilteredStream


def without_empty_pairs(dataset: Any, collator: Any, name: str) -> Any:
    """The data set without the examples of which ``collator`` would leave nothing to score.

    Args:
        dataset: a list, a ``datasets.Dataset``, an iterable data set, or a dictionary of these.
            Other data sets are returned as they are: reading one may cost as much as an epoch.
        collator: a ``PreferenceCollator``; with another one the data set is returned as it is.
        name: of the trainer's argument, for messages.

    Raises:
        ValueError: no example is left.
    """
    if isinstance(dataset, dict):
        return {
            key: without_empty_pairs(each, collator, f"{name}[{key!r}]")
            for key, each in dataset.items()
        }
    if getattr(collator, "max_length", None) is None or not hasattr(collator, "leaves_labels"):
        return dataset
    columns = getattr(dataset, "column_names", None)
    if columns is not None and not set(COLUMNS) <= set(columns):
        return dataset  # the collator raises for these
    if isinstance(dataset, (list, tuple)):
        kept: Any = [each for each in dataset if _leaves_labels(collator, each)]
    elif hasattr(dataset, "filter") and hasattr(dataset, "__len__"):
        kept = dataset.filter(collator.leaves_labels, input_columns=COLUMNS)
    elif hasattr(dataset, "filter") or isinstance(dataset, IterableDataset):
        return _filtered_stream(dataset, collator, name)
    else:
        return dataset
    if len(kept) == len(dataset):
        return dataset
    count = len(dataset)
    if not len(kept):
        raise ValueError(
            f"all {count} examples of {name} {EMPTY} {limit_of(collator)}: raise max_length"
        )
    warnings.warn(
        f"{count - len(kept)} of the {count} examples of {name} are left out: they {EMPTY} "
        f"{limit_of(collator)}",
        stacklevel=1,
    )
    return kept


def _leaves_labels(collator: Any, example: Mapping[str, Any]) -> bool:
    if not all(name in example for name in COLUMNS):
        return True  # the collator raises for these
    return bool(collator.leaves_labels(*(example[name] for name in COLUMNS)))


def _filtered_stream(stream: Any, collator: Any, name: str) -> Any:
    warned: list[bool] = []

    def is_kept(example: Mapping[str, Any]) -> bool:
        keep = _leaves_labels(collator, example)
        if not keep and not warned:
            warned.append(True)
            warnings.warn(
                f"examples of {name} that {EMPTY} {limit_of(collator)} are left out", stacklevel=1
            )
        return keep

    return stream.filter(is_kept) if hasattr(stream, "filter") else FilteredStream(stream, is_kept)
