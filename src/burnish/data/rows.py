"""Prepared rows, read from their file when they are asked for: 100,000 of them need no more memory than 1,000."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from burnish.run import read_at
from burnish.types import Example

_CHUNK_BYTES = 1 << 20


class Rows(Sequence[Example]):
    """The lines of a JSONL file that `prepare` wrote, as examples. Only where each line begins is kept in memory.

    Lines are read, not mapped: pages of a mapped file count as the process's memory for as long as nobody else wants them.
    """

    def __init__(self, path: Path, read: Callable[[Mapping[str, Any]], Example]) -> None:
        self._read = read
        self._file = path.open("rb", buffering=0)
        # Where each line begins, and the end of the last one.
        self._bounds = np.fromiter(self._line_bounds(), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, end = (int(bound) for bound in self._bounds[index % len(self) :][:2])
        return self._read(json.loads(read_at(self._file, start, end - start)))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def _line_bounds(self) -> Iterator[int]:
        yield 0
        done, ended = 0, True
        while chunk := self._file.read(_CHUNK_BYTES):
            found = chunk.find(b"\n")
            while found >= 0:
                yield done + found + 1
                found = chunk.find(b"\n", found + 1)
            done, ended = done + len(chunk), chunk.endswith(b"\n")
        if not ended:
            yield done
