"""Tokens and rows on disk: the same as in memory, made once, never half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.data import example_to_row, make_example, row_to_example
from burnish.data.rows import Rows
from burnish.errors import DataError
from burnish.training.store import TokenStore, stored
from burnish.types import Example, Tokens


def rows(n: int) -> list[Example]:
    return [
        make_example([{"role": "user", "content": f"ä\u2028 {i}"}, {"role": "assistant", "content": "x" * i}], source=f"f:{i}")
        for i in range(n)
    ]


def tokenize(example: Example) -> list[Tokens]:
    """Row i becomes i % 3 sequences; row 0 none."""
    number = len(example.reference)
    return [Tokens([number, 262_143, part], [-100, -100, part]) for part in range(number % 3)]


def test_the_store_holds_what_was_tokenised(tmp_path: Path) -> None:
    examples = rows(20)
    store = stored(tmp_path / "t", "k", examples, tokenize, what="")
    expected = [tokens for example in examples for tokens in tokenize(example)]
    assert list(store) == store[:] == expected
    assert store[-1] == expected[-1]
    assert store.lengths.tolist() == [3] * len(expected)
    assert store.rows.tolist() == [i for i in range(20) for _ in range(i % 3)]
    with pytest.raises(IndexError):
        store[len(expected)]


def test_it_is_made_once_for_a_key(tmp_path: Path) -> None:
    stored(tmp_path / "t", "k", rows(5), tokenize, what="")
    assert len(stored(tmp_path / "t", "k", [], tokenize, what="")) == 4, "nothing was tokenised again"
    assert len(stored(tmp_path / "t", "other", rows(3), tokenize, what="")) == 3


@pytest.mark.parametrize("name", ["ids.bin", "labels.bin", "bounds.bin", "rows.bin", "key.json"])
def test_a_torn_store_is_made_anew(name: str, tmp_path: Path) -> None:
    stored(tmp_path / "t", "k", rows(5), tokenize, what="")
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[:-5])
    again = stored(tmp_path / "t", "k", rows(5), tokenize, what="")
    assert list(again) == list(TokenStore(tmp_path / "t"))
    assert len(again) == 4


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    examples = rows(7)
    path.write_text("".join(json.dumps(example_to_row(example), ensure_ascii=False) + "\n" for example in examples), encoding="utf-8")
    lazy = Rows(path, row_to_example)
    assert list(lazy) == examples
    assert (lazy[3], lazy[-1], lazy[2:4]) == (examples[3], examples[6], tuple(examples[2:4]))
    path.write_text("")
    assert list(Rows(path, row_to_example)) == []


def test_a_file_without_a_last_line_end_and_lines_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.rows._CHUNK_BYTES", 7)
    path, examples = tmp_path / "train.jsonl", rows(5)
    text = "\n".join(json.dumps(example_to_row(example), ensure_ascii=False) for example in examples)
    path.write_text(text, encoding="utf-8")
    assert list(Rows(path, row_to_example)) == examples


def test_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(example_to_row(example)) + "\n" for example in rows(3)), encoding="utf-8")
    lazy, store = Rows(path, row_to_example), stored(tmp_path / "t", "k", rows(5), tokenize, what="")
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "t" / "ids.bin").write_bytes(b"")
    with pytest.raises(DataError, match="changed while it was in use"):
        lazy[-1]
    with pytest.raises(DataError, match="changed while it was in use"):
        store[0]
