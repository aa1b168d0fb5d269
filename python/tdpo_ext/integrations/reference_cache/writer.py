"""Writing a cache, in one process or several."""

from __future__ import annotations

import contextlib
import fcntl
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tdpo_ext.integrations.models import dtype_name
from tdpo_ext.integrations.reference_cache.files import (
    DESCRIPTION,
    FORMAT,
    RECORD,
    REMOVE,
    checksum,
    parts_of,
    read_description,
    records_of,
    replace_description,
)


class ReferenceCacheWriter:
    """Writes a cache, goes on with one that was interrupted, or adds to a finished one.

    Args:
        folder: made if it does not exist.
        fingerprint: all that the hidden states depend on, as strings: model and its parameters,
            precision, tokenizer ...
        process: the number of this process, from 0.
        processes: how many processes write. All must have opened their writers before one of them
            calls ``keys``, and closed them before one calls ``finish``.

    Raises:
        ValueError: an empty fingerprint, a cache with another fingerprint, or a finished cache with
            files that are shorter than they were.
        RuntimeError: another process is writing this part of the cache.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, str],
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if not fingerprint:
            raise ValueError(
                "fingerprint must say what the hidden states depend on, got nothing; give at least "
                "one name with a string, such as the model's"
            )
        self.folder, self.fingerprint = Path(folder), dict(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        read_description(self.folder, self.fingerprint)  # raises before anything is changed
        with contextlib.ExitStack() as stack:
            name = f"part-{process:05}"
            self._index = stack.enter_context(_appending(self.folder / f"{name}.index"))
            _lock(self._index)
            self.description = read_description(self.folder, self.fingerprint)
            for part in parts_of(self.folder):  # there may be parts of more processes than now
                if int(part.name.removeprefix("part-")) % processes == process:
                    _keep_complete(part, self.description)
            self._hidden = stack.enter_context(_appending(self.folder / f"{name}.hidden"))
            self._stack = stack.pop_all()

    def keys(self) -> set[bytes]:
        """The keys of all sequences on disk, written by any process."""
        indices = (part.with_suffix(".index").read_bytes() for part in parts_of(self.folder))
        return {key for index in indices for key, _, _ in records_of(index)}

    def add(self, key: bytes, hidden: Tensor) -> None:
        """Write the hidden states of one sequence.

        Args:
            key: of ``sequence_key``.
            hidden: ``[tokens, H]`` on any device, in the dtype to keep.

        Raises:
            ValueError: ``hidden`` has not two dimensions, or another H or dtype than those before.
        """
        if hidden.dim() != 2:
            raise ValueError(f"hidden must be [tokens, H], got {tuple(hidden.shape)}")
        tokens, width = hidden.shape
        dtype = dtype_name(hidden.dtype)
        if self.description is None:
            description = {"format": FORMAT, "fingerprint": self.fingerprint, "finished": False}
            self.description = {**description, "dtype": dtype, "width": width, "parts": {}}
            if not (self.folder / DESCRIPTION).exists():  # another process may have been first
                replace_description(self.folder, self.description)
            self.description = read_description(self.folder, self.fingerprint)
            assert self.description is not None
        of_cache = self.description["width"], self.description["dtype"]
        if (width, dtype) != of_cache:
            raise ValueError(
                f"hidden must have the width and dtype of the cache, {of_cache}, got "
                f"{(width, dtype)}; take another folder for a reference in another dtype"
            )
        data = bytearray(hidden.numel() * hidden.element_size())
        if data:
            torch.frombuffer(data, dtype=hidden.dtype).view(hidden.shape).copy_(hidden.detach())
        files = self._hidden, self._index
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        try:  # the hidden states first, so that no record is without them
            _write(self._hidden, data)
            _write(self._index, RECORD.pack(key, tokens, checksum(key, tokens, data)))
        except BaseException:  # a full disk, Ctrl-C
            for file, size in zip(files, sizes, strict=True):
                file.truncate(size)
            raise

    def close(self) -> None:
        """Flush everything to disk and let others write; the cache is not marked as finished."""
        if self._index.closed:
            return
        with self._stack:
            for file in (self._hidden, self._index):
                os.fsync(file.fileno())
            if os.fstat(self._index.fileno()).st_size == 0:
                for file in (self._hidden, self._index):
                    Path(file.name).unlink()

    def finish(self) -> None:
        """Mark all that is on disk as a finished cache. One process calls it, when all have closed.

        Raises:
            ValueError: no sequence was ever written.
        """
        self.close()
        description = read_description(self.folder, self.fingerprint)
        if description is None:
            raise ValueError(
                f"a reference cache needs at least one sequence, {self.folder} has 0; add one "
                "before finish"
            )
        parts = {}
        for part in parts_of(self.folder):
            index = part.with_suffix(".index").read_bytes()
            size = part.with_suffix(".hidden").stat().st_size
            sequences = len(index) // RECORD.size
            parts[part.name] = {"sequences": sequences, "size": size, "check": zlib.crc32(index)}
        replace_description(self.folder, {**description, "parts": parts, "finished": True})

    def __enter__(self) -> ReferenceCacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _appending(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)


def _write(file: BinaryIO, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _lock(file: BinaryIO) -> None:
    """Lock the file until it is closed, which the end of the process does as well."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process is writing {file.name}; wait until it has finished the reference "
            "cache, or write to another folder"
        ) from error


def _keep_complete(part: Path, description: Mapping[str, Any] | None) -> None:
    """Cut off a part after its last complete record.

    The rest is what a process that died left half written, or a machine that died has lost. The
    hidden states of finished records are not read here: that happens when they are used.

    Args:
        part: the path of its files without a suffix.
        description: of the cache; None: there is none.

    Raises:
        ValueError: finished records are missing, or there are records but no description.
    """
    finished = {} if description is None else description["parts"].get(part.name, {})
    index, hidden = part.with_suffix(".index"), part.with_suffix(".hidden")
    size = hidden.stat().st_size if hidden.exists() else 0
    records = [*records_of(index.read_bytes())]
    if len(records) < finished.get("sequences", 0) or size < finished.get("size", 0):
        raise ValueError(f"the files {part}.* are shorter than the finished cache was. {REMOVE}")
    if description is None and records:
        raise ValueError(f"there is {index}, but no {DESCRIPTION} beside it. {REMOVE}")
    kept, end = finished.get("sequences", 0), finished.get("size", 0)
    if description is not None and size:
        token_bytes = description["width"] * getattr(torch, description["dtype"]).itemsize
        with hidden.open("rb") as file:
            file.seek(end)
            for key, tokens, check in records[kept:]:
                if not 0 <= tokens * token_bytes <= size - end:
                    break
                if checksum(key, tokens, file.read(tokens * token_bytes)) != check:
                    break
                kept, end = kept + 1, end + tokens * token_bytes
    os.truncate(index, kept * RECORD.size)
    if hidden.exists():
        os.truncate(hidden, end)
