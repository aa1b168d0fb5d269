"""Batches with a cached reference's hidden states, found by the tokens of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tdpo_ext.integrations.reference_cache.files import sequence_key
from tdpo_ext.integrations.reference_cache.reader import ReferenceCache


class Row(NamedTuple):
    """A sequence of a batch, without its padding."""

    key: bytes
    """The sequence's key in a cache."""
    start: int
    """The first position that has hidden states."""
    tokens: int
    """The number of positions that have hidden states."""


def rows_of(batch: Mapping[str, Any], encoder_decoder: bool) -> list[Row]:
    """The sequences of a batch.

    Args:
        batch: with ``input_ids`` and ``attention_mask``, and ``labels`` of an encoder-decoder.
        encoder_decoder: the hidden states are the decoder's, one for each label.

    Raises:
        ValueError: the batch lacks a field, has one that hidden states may depend on, or has
            padding inside a row.
    """
    _check_batch(batch, encoder_decoder)
    ids, spans = batch["input_ids"], _spans(batch["attention_mask"] != 0, "attention_mask")
    sides = [[row[start:end] for row, (start, end) in zip(ids, spans, strict=True)]]
    if encoder_decoder:
        labels = batch["labels"]
        spans = _spans(labels != -100, "labels")
        sides.append([row[start:end] for row, (start, end) in zip(labels, spans, strict=True)])
    keys = [sequence_key(*of_row) for of_row in zip(*sides, strict=True)]
    return [Row(key, a, b - a) for key, (a, b) in zip(keys, spans, strict=True)]


def _spans(mask: Tensor, name: str) -> list[tuple[int, int]]:
    """For each row of a mask the first position that is on, and the one after the last."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, positions, mask.shape[1]).amin(1)
    end = torch.where(mask, positions + 1, 0).amax(1)
    first = torch.minimum(first, end)
    if not torch.equal(end - first, mask.sum(1)):
        raise ValueError(
            f"{name} has gaps inside a row; the cached reference takes rows that are padded on the "
            "left or on the right only"
        )
    return [*zip(first.tolist(), end.tolist(), strict=True)]


_KNOWN_FIELDS = {"input_ids", "attention_mask", "labels", "completion_mask", "decoder_input_ids"}
"""Fields of batches that follow from the tokens, or that the reference does not take."""


def _check_batch(batch: Mapping[str, Any], encoder_decoder: bool) -> None:
    wanted = {"input_ids", "attention_mask", *(["labels"] if encoder_decoder else [])}
    if missing := sorted(wanted - {*batch}):
        raise ValueError(
            f"the cached reference needs batches with {missing}, got {[*batch]}; let the collator "
            "return them"
        )
    if others := sorted({*batch} - _KNOWN_FIELDS - {"reference_hidden"}):
        raise ValueError(
            f"batches have {others}, but a cached reference finds hidden states by the tokens "
            "alone, which do not determine them if the model takes more (images, token types, "
            "positions); use a reference that is not cached"
        )


class CachedReferenceCollator:
    """Adds the reference's hidden states from a cache to another collator's batches.

    It can run in a worker of the data loader. Called with examples, it returns the other collator's
    batch with ``reference_hidden`` ``[2B, T, H]`` on the CPU in the dtype of the cache, read from
    disk; padding is 0.

    Args:
        collator: returns ``input_ids`` and ``attention_mask`` ``[2B, T]``, padded on the left or on
            the right, and for an encoder-decoder ``labels``; such as ``PreferenceCollator`` or
            TRL's ``DataCollatorForPreference``.
        cache: the reference's, of ``precompute_reference``.
        encoder_decoder: True if the reference is one.

    Raises:
        ValueError: when called, a sequence is not in the cache, or the batch has fields that
            hidden states may depend on.
    """

    def __init__(
        self,
        collator: Callable[[Any], Any],
        cache: ReferenceCache,
        *,
        encoder_decoder: bool = False,
    ) -> None:
        self.collator = collator
        self.cache = cache
        self.encoder_decoder = encoder_decoder

    def __call__(self, examples: Any) -> Any:
        batch = self.collator(examples)
        rows = rows_of(batch, self.encoder_decoder)
        for number, row in enumerate(rows):
            if row.key not in self.cache:
                raise ValueError(
                    f"row {number} of a batch, a sequence of {row.tokens} tokens, is not among the "
                    f"{len(self.cache)} of the reference cache in {self.cache.folder}. Give the "
                    "data set to the trainer at construction, and change neither truncation nor "
                    "chat template afterwards; or run precompute_reference over it"
                )
        batch["reference_hidden"] = self.cache.read(
            [row.key for row in rows],
            starts=[row.start for row in rows],
            length=batch["labels" if self.encoder_decoder else "input_ids"].shape[1],
        )
        return batch
