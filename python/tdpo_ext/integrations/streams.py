"""Iterable data sets around others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset


class WrappedStream(IterableDataset):  # type: ignore[type-arg]
    """An iterable data set around another one, which answers for all other attributes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:  # set_epoch, generator
        return getattr(self.__dict__["stream"], name)


class FilteredStream(WrappedStream):
    """Only the examples for which ``is_kept`` is true."""

    def __init__(self, stream: Any, is_kept: Callable[[Any], bool]) -> None:
        super().__init__(stream)
        self.is_kept = is_kept

    def __iter__(self) -> Iterator[Any]:
        return filter(self.is_kept, self.stream)


class CountedStream(WrappedStream):
    """Counts the examples of its last iteration in ``count``."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.count = 0
        for example in self.stream:
            self.count += 1
            yield example
