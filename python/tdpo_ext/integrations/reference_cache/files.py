"""The files of a cache: their names, the records of an index, and the description."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = "tdpo_ext reference cache 1"
DESCRIPTION = "description.json"
RECORD = struct.Struct("<16sqq")
"""A record of an index: key, number of tokens, CRC-32 of these two and of the hidden states."""
REMOVE = "Remove the folder and write the cache again."
"""The end of every message about a file that is not as it was written."""


def sequence_key(*sides: Sequence[int] | Tensor) -> bytes:
    """16 bytes that stand for a sequence's token ids.

    Args:
        *sides: the ids without padding, one sequence for a decoder; for an encoder-decoder the
            encoder's and the decoder's.
    """
    digest = hashlib.blake2b(digest_size=16)
    for side in sides:
        ids = side.tolist() if isinstance(side, Tensor) else side
        digest.update(struct.pack("<q", len(ids)))
        digest.update(array("q", ids).tobytes())
    return digest.digest()


def checksum(key: bytes, tokens: int, data: bytearray | memoryview | bytes) -> int:
    """CRC-32 over a sequence's key, its number of tokens and its hidden states."""
    return zlib.crc32(data, zlib.crc32(key + struct.pack("<q", tokens)))


def records_of(index: bytes) -> Iterable[tuple[bytes, int, int]]:
    """Key, number of tokens and checksum of every complete record in an index."""
    return RECORD.iter_unpack(index[: len(index) - len(index) % RECORD.size])


def parts_of(folder: Path) -> list[Path]:
    """The paths of a cache's parts, without a suffix."""
    return sorted(path.with_suffix("") for path in folder.glob("part-*.index"))


def read_description(folder: Path, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
    """The description of the cache in a folder; None if there is none.

    Raises:
        ValueError: it is of another version, or its fingerprint differs.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} describes no reference cache of this version. {REMOVE}")
    written, asked = description["fingerprint"], dict(fingerprint)
    different = [
        f"{key}: cached {written.get(key)!r}, asked {asked.get(key)!r}"
        for key in sorted(written.keys() | asked.keys())
        if written.get(key) != asked.get(key)
    ]
    if different:
        raise ValueError(
            f"the reference cache in {folder} is of something else ({'; '.join(different)}); take "
            "another folder, or remove this one"
        )
    return description


def replace_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write the description. Other processes read the old one or the new one, never a part."""
    unfinished = folder / f"{DESCRIPTION}.{os.getpid()}"
    try:
        with unfinished.open("w") as file:
            file.write(json.dumps(description, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / DESCRIPTION)
    finally:
        unfinished.unlink(missing_ok=True)
