"""Reading a finished cache."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tdpo_ext.integrations.reference_cache.files import (
    RECORD,
    REMOVE,
    checksum,
    read_description,
)


class ReferenceCache:
    """A finished cache, to be read from. It can be pickled, and read by several processes.

    Args:
        folder: where it was written.
        fingerprint: the one that the writer got; it must be the same.

    Raises:
        FileNotFoundError: there is no cache, or its writing was not finished.
        ValueError: the fingerprint differs, or the files are shorter than they were.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, str]) -> None:
        self.folder, self.fingerprint = Path(folder), dict(fingerprint)
        description = read_description(self.folder, self.fingerprint)
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
        """``[sequences, 6]``: a part's records, and where their hidden states are.

        Args:
            number: of the part.
            sequences: in the part, by the description.
            size: of its hidden states in bytes, by the description.
            check: CRC-32 of its index, by the description.
        """
        path = self.folder / self._parts[number]
        for suffix, expected in ((".index", sequences * RECORD.size), (".hidden", size)):
            found = path.with_suffix(suffix)
            there = found.stat().st_size if found.exists() else 0
            if there < expected:
                raise ValueError(
                    f"{found} has {there} bytes, but the reference cache's description says "
                    f"{expected}: it was cut, or is not seen by this process. {REMOVE}"
                )
        with path.with_suffix(".index").open("rb") as file:
            records = bytearray(file.read(sequences * RECORD.size))
        if zlib.crc32(records) != check:
            raise ValueError(f"{path}.index has changed since it was written. {REMOVE}")
        if not records:
            return torch.empty(0, 6, dtype=torch.int64)
        table = torch.frombuffer(records, dtype=torch.int64).view(-1, 4)
        sizes = table[:, 2] * self._token_bytes
        first = sizes.cumsum(0) - sizes
        return torch.cat([table, torch.full_like(first, number)[:, None], first[:, None]], dim=1)

    def __len__(self) -> int:
        """The number of sequences."""
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
        """The hidden states of several sequences, padded with zeros.

        Args:
            keys: of ``sequence_key``.
            starts: the position at which each begins; None: all begin at 0.
            length: T; None: the smallest that is enough.

        Returns:
            ``[len(keys), T, H]`` on the CPU, in the dtype of the cache.

        Raises:
            KeyError: a sequence is not in the cache.
            ValueError: a sequence does not fit into T, or its bytes have changed on disk.
        """
        starts = [0] * len(keys) if starts is None else starts
        rows = [self._row(key) for key in keys]
        longest = max((s + row[2] for s, row in zip(starts, rows, strict=True)), default=0)
        length = longest if length is None else length
        if longest > length:
            raise ValueError(
                f"a sequence ends at position {longest}, length is {length}; it must be at least "
                "as large"
            )
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
            if checksum(key, tokens, of_sequence) != check:
                raise ValueError(
                    f"hidden states in {self.folder / self._parts[part]}.hidden, {tokens} tokens "
                    f"from byte {first} on, have changed since they were written. {REMOVE}"
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
                    f"while it was open. {REMOVE}"
                )
            filled += count

    def verify(self) -> None:
        """Read everything once.

        Raises:
            ValueError: bytes have changed on disk.
        """
        for first, second in self._table_by_key[:, :2].tolist():
            self.read([struct.pack("<qq", first, second)])

    def __reduce__(self) -> Any:
        return type(self), (self.folder, self.fingerprint)
