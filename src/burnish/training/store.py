"""Tokens of all rows in files: 100,000 rows cost the same memory as 1,000, and a second start does not tokenise again.

tokens/
├── ids.bin       int32, all sequences one after another
├── labels.bin    int32, the same places
├── bounds.bin    int64, where each sequence begins, and the end
├── rows.bin      int32, the row that each sequence was made from
└── key.json      what they were made from; anything else there is made anew
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from burnish.run import read_at, write_folder
from burnish.types import Example, Tell, Tokens, silent

_FILES = {"ids": np.int32, "labels": np.int32, "bounds": np.int64, "rows": np.int32}


class TokenStore(Sequence[Tokens]):
    """Sequences on disk. `lengths` and `rows` are arrays; a sequence is read when it is asked for.

    It is read, not mapped: pages of a mapped file count as the process's memory for as long as nobody else wants them.
    """

    def __init__(self, folder: Path) -> None:
        self.offset = 0  # of its tokens' numbers, where several stores are counted through
        self._ids, self._labels = ((folder / f"{name}.bin").open("rb", buffering=0) for name in ("ids", "labels"))
        self._bounds, self.rows = (np.fromfile(folder / f"{name}.bin", dtype=_FILES[name]) for name in ("bounds", "rows"))
        self.lengths = np.diff(self._bounds)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = (int(bound) for bound in self._bounds[index % len(self) :][:2])
        ids, labels = (self._read(file, start, stop) for file in (self._ids, self._labels))
        return Tokens(ids, labels, self.offset + start)

    @staticmethod
    def _read(file: BinaryIO, start: int, stop: int) -> list[int]:
        size = np.dtype(np.int32).itemsize
        values: list[int] = np.frombuffer(read_at(file, start * size, (stop - start) * size), dtype=np.int32).tolist()
        return values


def stored(
    folder: Path, key: str, examples: Sequence[Example], tokenize: Callable[[Example], Iterable[Tokens]], *, what: str, tell: Tell = silent
) -> TokenStore:
    """The store of these examples: as it lies there, where it was made with the same key; else made now, whole or not at all."""
    if _key_of(folder) != key:
        with write_folder(folder) as aside:
            _write(aside, examples, tokenize, what, tell)
            (aside / "key.json").write_text(json.dumps({"key": key}), encoding="utf-8")
    return TokenStore(folder)


def _write(folder: Path, examples: Sequence[Example], tokenize: Callable[[Example], Iterable[Tokens]], what: str, tell: Tell) -> None:
    bounds, rows = [0], []
    with (folder / "ids.bin").open("wb") as ids, (folder / "labels.bin").open("wb") as labels:
        for number, example in enumerate(examples):
            for tokens in tokenize(example):
                ids.write(np.asarray(tokens.input_ids, dtype=np.int32).tobytes())
                labels.write(np.asarray(tokens.labels, dtype=np.int32).tobytes())
                bounds.append(bounds[-1] + len(tokens.input_ids))
                rows.append(number)
            if number % 500 == 499:
                tell(what, number + 1, len(examples), "")
    (folder / "bounds.bin").write_bytes(np.asarray(bounds, dtype=np.int64).tobytes())
    (folder / "rows.bin").write_bytes(np.asarray(rows, dtype=np.int32).tobytes())


def _key_of(folder: Path) -> Any:
    """What the files there were made from; None where they are not whole."""
    try:
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))["key"]
        sizes = {name: (folder / f"{name}.bin").stat().st_size // np.dtype(kind).itemsize for name, kind in _FILES.items()}
        end = int(np.fromfile(folder / "bounds.bin", dtype=np.int64)[-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    return key if sizes["ids"] == sizes["labels"] == end and sizes["bounds"] == sizes["rows"] + 1 else None
