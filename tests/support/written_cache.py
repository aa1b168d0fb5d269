"""A cache of hidden states as a trainer writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdpo_ext.integrations.reference_cache import ReferenceCacheWriter, sequence_key

FINGERPRINT = {"model": "m@1", "tokenizer": "t", "autocast": "bfloat16"}
IDS = [[1, 2, 3], [4], [1, 2], [5, 6, 7, 8, 9], [3, 2, 1]]


def states(ids: list[int], width: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same for the same tokens, as a model's are."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return torch.randn(len(ids), width, generator=generator, dtype=torch.float64).to(dtype)


def write(folder: Path, sequences: Any = IDS, finish: bool = True, **options: Any) -> None:
    """As a trainer does: what is there is left alone."""
    with ReferenceCacheWriter(folder, FINGERPRINT) as writer:
        known = writer.keys()
        for ids in sequences:
            if sequence_key(ids) not in known:
                writer.add(sequence_key(ids), states(ids, **options))
        if finish:
            writer.finish()
