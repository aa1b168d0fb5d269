"""The reference's hidden states on disk, so that training needs no reference model in memory.

A reference that never changes says the same about a token every epoch. Its hidden states before
the head, in their own dtype, are exact and far smaller than its logits; ``linear_tdpo_loss`` takes
them with the reference's head, which alone stays in memory. A sequence is found by its tokens, so
neither the order of a data set nor padding matters.

    fingerprint = {"model": "...", "parameters": "...", "tokenizer": "..."}
    with ReferenceCacheWriter(folder, fingerprint) as writer:
        for ids in sequences:
            writer.add(sequence_key(ids), hidden_states_of(ids))
        writer.finish()
    cache = ReferenceCache(folder, fingerprint)
    hidden = cache.read([sequence_key(ids)])[0]              # [tokens, H]

In the folder, each writing process has two files of its own, to which it only appends: hidden
states, and then one record of 32 bytes that says whose they are and has a CRC-32 over both. So
what was complete when a process died is kept, and writing goes on after it. ``description.json``
says what the cache is of, and which records are finished; it is replaced as a whole.

Reading takes the bytes of the rows asked for, by ``pread``; the operating system keeps what is
read often in memory, as it does for a mapped file. A mapped file would end the process with SIGBUS
where a file was cut or a disk fails; here it is an error with words. Every read checks the CRC-32.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT = "tdpo_ext reference cache 1"
DESCRIPTION = "description.json"
_RECORD = struct.Struct("<16sqq")
"""Key, number of tokens, CRC-32 of these two and of the hidden states."""


def sequence_key(*sides: Sequence[int] | Tensor) -> bytes:
    """16 bytes that stand for token ids without padding: of a decoder, those of the sequence; of an
    encoder-decoder, the encoder's and the decoder's."""
    digest = hashlib.blake2b(digest_size=16)
    for side in sides:
        ids = side.tolist() if isinstance(side, Tensor) else side
        digest.update(struct.pack("<q", len(ids)))
        digest.update(array("q", ids).tobytes())
    return digest.digest()


class ReferenceCache:
    """A finished cache, to be read from. It can be pickled, and read by several processes.

    Args:
        folder: where it was written.
        fingerprint: what it must be of, as it was said to the writer.

    Raises:
        FileNotFoundError: there is no cache, or its writing has not been finished.
        ValueError: it is of something else, or its files are not as long as they were.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder, self.fingerprint = Path(folder), dict(fingerprint)
        description = _read_description(self.folder, self.fingerprint)
        if description is None or not description["finished"]:
            what = "no reference cache" if description is None else "an unfinished reference cache"
            raise FileNotFoundError(f"there is {what} in {folder}; write it to its end first")
        self.dtype: torch.dtype = getattr(torch, description["dtype"])
        self.width: int = description["width"]
        self._token_bytes = self.width * self.dtype.itemsize
        self._files: dict[int, BinaryIO] = {}
        self._parts = [*description["parts"]]
        tables = [self._table(n, **part) for n, part in enumerate(description["parts"].values())]
        table = torch.cat([torch.empty(0, 6, dtype=torch.int64), *tables])
        # Six columns: both halves of the key, tokens, check, part, first byte.
        self._table_by_key = table[table[:, 0].argsort()]
        self._first_halves = self._table_by_key[:, 0].contiguous()

    def _table(self, number: int, sequences: int, size: int, check: int) -> Tensor:
        """A part's records, and where their hidden states are."""
        path = self.folder / self._parts[number]
        for suffix, expected in ((".index", sequences * _RECORD.size), (".hidden", size)):
            found = path.with_suffix(suffix)
            there = found.stat().st_size if found.exists() else 0
            if there < expected:
                raise ValueError(
                    f"{found} has {there} bytes, but the reference cache's description says "
                    f"{expected}: it was cut, or is not seen by this process. {_REMOVE}"
                )
        with path.with_suffix(".index").open("rb") as file:
            records = bytearray(file.read(sequences * _RECORD.size))
        if zlib.crc32(records) != check:
            raise ValueError(f"{path}.index has changed since it was written. {_REMOVE}")
        if not records:
            return torch.empty(0, 6, dtype=torch.int64)
        table = torch.frombuffer(records, dtype=torch.int64).view(-1, 4)
        sizes = table[:, 2] * self._token_bytes
        first = sizes.cumsum(0) - sizes
        return torch.cat([table, torch.full_like(first, number)[:, None], first[:, None]], dim=1)

    def __len__(self) -> int:
        """How many sequences are in it."""
        return len(self._table_by_key)

    def __contains__(self, key: bytes) -> bool:
        try:
            self._row(key)
        except KeyError:
            return False
        return True

    def _row(self, key: bytes) -> list[int]:
        halves = struct.unpack("<qq", key)
        row = int(torch.searchsorted(self._first_halves, halves[0]))
        while row < len(self) and self._first_halves[row] == halves[0]:
            found: list[int] = self._table_by_key[row].tolist()
            if found[1] == halves[1]:
                return found
            row += 1
        raise KeyError(key)

    def read(
        self,
        keys: Sequence[bytes],
        *,
        starts: Sequence[int] | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Hidden states of several sequences, padded with zeros.

        Args:
            keys: of ``sequence_key``.
            starts: at which position each begins; None: at 0.
            length: T; None: as long as is needed.

        Returns:
            ``[len(keys), T, H]`` on the CPU, in the dtype of the cache.

        Raises:
            KeyError: a sequence is not in the cache.
            ValueError: a sequence does not fit into T, or its bytes have changed since they were
                written.
        """
        starts = [0] * len(keys) if starts is None else starts
        rows = [self._row(key) for key in keys]
        longest = max((s + row[2] for s, row in zip(starts, rows, strict=True)), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a sequence ends at position {longest}, length is {length}")
        shape = (len(keys), length, self.width)
        buffer = bytearray(len(keys) * length * self._token_bytes)
        if not buffer:
            return torch.empty(shape, dtype=self.dtype)
        view = memoryview(buffer)
        for number, (key, start, row) in enumerate(zip(keys, starts, rows, strict=True)):
            _, _, tokens, check, part, first = row
            begin = (number * length + start) * self._token_bytes
            of_sequence = view[begin : begin + tokens * self._token_bytes]
            self._fill(of_sequence, part, first)
            if _check(key, tokens, of_sequence) != check:
                raise ValueError(
                    f"hidden states in {self.folder / self._parts[part]}.hidden, {tokens} tokens "
                    f"from byte {first} on, have changed since they were written. {_REMOVE}"
                )
        return torch.frombuffer(buffer, dtype=self.dtype).view(shape)

    def _fill(self, view: memoryview, part: int, first: int) -> None:
        if part not in self._files:
            path = (self.folder / self._parts[part]).with_suffix(".hidden")
            self._files[part] = path.open("rb", buffering=0)
        filled = 0
        while filled < len(view):
            count = os.preadv(self._files[part].fileno(), [view[filled:]], first + filled)
            if count == 0:
                raise ValueError(
                    f"{self._files[part].name} ends before byte {first + len(view)}: it was cut "
                    f"while it was open. {_REMOVE}"
                )
            filled += count

    def verify(self) -> None:
        """Read all of it once.

        Raises:
            ValueError: bytes have changed since they were written.
        """
        for first, second in self._table_by_key[:, :2].tolist():
            self.read([struct.pack("<qq", first, second)])

    def __reduce__(self) -> Any:
        return type(self), (self.folder, self.fingerprint)


class ReferenceCacheWriter:
    """Writes a cache, goes on with one that was interrupted, or adds to a finished one.

    Args:
        folder: made if it does not exist.
        fingerprint: all that the hidden states depend on, as strings: model and its parameters,
            precision, tokenizer ...
        process: the number of the process that writes here, from 0.
        processes: how many write. All must have opened their writers before one of them asks for
            ``keys``, and closed them before one calls ``finish``.

    Raises:
        ValueError: an empty fingerprint, a cache of something else, or a finished cache with files
            that are not as long as they were.
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
            raise ValueError("fingerprint must say what the hidden states depend on, got nothing")
        self.folder, self.fingerprint = Path(folder), dict(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        _read_description(self.folder, self.fingerprint)  # of something else: nothing is touched
        with contextlib.ExitStack() as stack:
            name = f"part-{process:05}"
            self._index = stack.enter_context(_appending(self.folder / f"{name}.index"))
            _lock(self._index)
            self.description = _read_description(self.folder, self.fingerprint)
            for part in _parts(self.folder):  # also of processes that were more than now
                if int(part.name.removeprefix("part-")) % processes == process:
                    _keep_complete(part, self.description)
            self._hidden = stack.enter_context(_appending(self.folder / f"{name}.hidden"))
            self._stack = stack.pop_all()

    def keys(self) -> set[bytes]:
        """Those of all sequences on disk, of all processes."""
        indices = (part.with_suffix(".index").read_bytes() for part in _parts(self.folder))
        return {key for index in indices for key, _, _ in _records(index)}

    def add(self, key: bytes, hidden: Tensor) -> None:
        """Write the hidden states of one sequence.

        Args:
            key: of ``sequence_key``.
            hidden: ``[tokens, H]`` on any device, in the dtype in which they shall be kept.

        Raises:
            ValueError: not of two dimensions, or of another H or dtype than those before.
        """
        if hidden.dim() != 2:
            raise ValueError(f"hidden must be [tokens, H], got {tuple(hidden.shape)}")
        tokens, width = hidden.shape
        dtype = str(hidden.dtype).removeprefix("torch.")
        if self.description is None:
            description = {"format": FORMAT, "fingerprint": self.fingerprint, "finished": False}
            self.description = {**description, "dtype": dtype, "width": width, "parts": {}}
            if not (self.folder / DESCRIPTION).exists():  # else another process was first
                _replace_description(self.folder, self.description)
            self.description = _read_description(self.folder, self.fingerprint)
            assert self.description is not None
        of_cache = self.description["width"], self.description["dtype"]
        if (width, dtype) != of_cache:
            raise ValueError(
                f"hidden must have the width and dtype of the cache, {of_cache}, got "
                f"{(width, dtype)}"
            )
        data = bytearray(hidden.numel() * hidden.element_size())
        if data:
            torch.frombuffer(data, dtype=hidden.dtype).view(hidden.shape).copy_(hidden.detach())
        files = self._hidden, self._index
        sizes = [os.fstat(file.fileno()).st_size for file in files]
        try:  # the hidden states first: a record is only of what is there
            _write(self._hidden, data)
            _write(self._index, _RECORD.pack(key, tokens, _check(key, tokens, data)))
        except BaseException:  # a full disk, Ctrl-C
            for file, size in zip(files, sizes, strict=True):
                file.truncate(size)
            raise

    def close(self) -> None:
        """Everything is on disk then, and others may write; the cache is not marked as finished."""
        if self._index.closed:
            return
        with self._stack:
            for file in (self._hidden, self._index):
                os.fsync(file.fileno())
            if os.fstat(self._index.fileno()).st_size == 0:
                for file in (self._hidden, self._index):
                    Path(file.name).unlink()

    def finish(self) -> None:
        """Mark all that is on disk as a finished cache; by one process, when all have closed.

        Raises:
            ValueError: nothing was ever written.
        """
        self.close()
        description = _read_description(self.folder, self.fingerprint)
        if description is None:
            raise ValueError(f"a reference cache needs at least one sequence, {self.folder} has 0")
        parts = {}
        for part in _parts(self.folder):
            index = part.with_suffix(".index").read_bytes()
            size = part.with_suffix(".hidden").stat().st_size
            sequences = len(index) // _RECORD.size
            parts[part.name] = {"sequences": sequences, "size": size, "check": zlib.crc32(index)}
        _replace_description(self.folder, {**description, "parts": parts, "finished": True})

    def __enter__(self) -> ReferenceCacheWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_REMOVE = "Remove the folder and write the cache again."


def _check(key: bytes, tokens: int, data: bytearray | memoryview | bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key + struct.pack("<q", tokens)))


def _records(index: bytes) -> Iterable[tuple[bytes, int, int]]:
    return _RECORD.iter_unpack(index[: len(index) - len(index) % _RECORD.size])


def _parts(folder: Path) -> list[Path]:
    """Without a suffix."""
    return sorted(path.with_suffix("") for path in folder.glob("part-*.index"))


def _appending(path: Path) -> BinaryIO:
    return path.open("ab", buffering=0)


def _write(file: BinaryIO, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _lock(file: BinaryIO) -> None:
    """Until the file is closed, be it because the process died."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RuntimeError(
            f"another process is writing {file.name}; wait until it has finished the reference "
            "cache, or write to another folder"
        ) from error


def _keep_complete(part: Path, description: Mapping[str, Any] | None) -> None:
    """Cut off what a process that died has left half written, or a machine that died has lost.

    What is finished already is not read: that happens when it is used.
    """
    finished = {} if description is None else description["parts"].get(part.name, {})
    index, hidden = part.with_suffix(".index"), part.with_suffix(".hidden")
    size = hidden.stat().st_size if hidden.exists() else 0
    records = [*_records(index.read_bytes())]
    if len(records) < finished.get("sequences", 0) or size < finished.get("size", 0):
        raise ValueError(f"the files {part}.* are shorter than the finished cache was. {_REMOVE}")
    if description is None and records:
        raise ValueError(f"there is {index}, but no {DESCRIPTION} beside it. {_REMOVE}")
    kept, end = finished.get("sequences", 0), finished.get("size", 0)
    if description is not None and size:
        token_bytes = description["width"] * getattr(torch, description["dtype"]).itemsize
        with hidden.open("rb") as file:
            file.seek(end)
            for key, tokens, check in records[kept:]:
                if not 0 <= tokens * token_bytes <= size - end:
                    break
                if _check(key, tokens, file.read(tokens * token_bytes)) != check:
                    break
                kept, end = kept + 1, end + tokens * token_bytes
    os.truncate(index, kept * _RECORD.size)
    if hidden.exists():
        os.truncate(hidden, end)


def _read_description(folder: Path, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        description = None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"{path} describes no reference cache of this version. {_REMOVE}")
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


def _replace_description(folder: Path, description: Mapping[str, Any]) -> None:
    """At once: whoever reads sees the old one or the new one."""
    unfinished = folder / f"{DESCRIPTION}.{os.getpid()}"
    try:
        with unfinished.open("w") as file:
            file.write(json.dumps(description, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / DESCRIPTION)
    finally:
        unfinished.unlink(missing_ok=True)
