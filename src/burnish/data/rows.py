"""Prepared rows, read from their file when they are asked for: 100,000 of them need no more memory than 1,000."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from burnish.types import Example


class Rows(Sequence[Example]):
    """The lines of a JSONL file that `prepare` wrote, as examples. Only where each line begins is kept in memory."""

    def __init__(self, path: Path, read: Callable[[Mapping[str, Any]], Example]) -> None:
        self._read = read
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            self._text: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
        self._starts = np.fromiter(self._lines(), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        start = int(self._starts[index])
        end = self._text.find(b"\n", start)
        return self._read(json.loads(self._text[start : end if end >= 0 else len(self._text)]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _lines(self) -> Iterator[int]:
        start = 0
        while start < len(self._text):
            end = self._text.find(b"\n", start)
            end = end if end >= 0 else len(self._text)
            if end > start:
                yield start
            start = end + 1
