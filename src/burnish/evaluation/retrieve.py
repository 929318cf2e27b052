"""What stands nearest to a question: training rows to show, passages to read, answers to vote. By words (BM25) or by meaning (vectors).

Which of the two is used is chosen on validation rows, where the extra `embeddings` is installed (see select.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np

from burnish.data import Passage
from burnish.run import hash_of, write_whole
from burnish.types import Example

BY_WORDS, BY_MEANING = "bm25", "embeddings"
_WORD = re.compile(r"\w+", re.UNICODE)
_WIDTH = 384  # of a kept vector

Embed = Callable[[Sequence[str]], "np.ndarray[Any, Any]"]


class Search(Protocol):
    def nearest(self, question: str, k: int) -> list[tuple[int, float]]:
        """Up to k places in the texts, the nearest first, each with how near it is (at least 0)."""


class Words:
    """BM25 (Robertson & Zaragoza 2009)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.size = len(texts)
        self.index: Any = bm25s.BM25()
        # A corpus without a single word cannot be indexed; the mark below stands in every row and tells none apart.
        if texts:
            self.index.index([_words(text) or ["∅"] for text in texts], show_progress=False)

    def nearest(self, question: str, k: int) -> list[tuple[int, float]]:
        k = min(k, self.size)
        words = [word for word in _words(question) if self.size and word in self.index.vocab_dict]
        if k == 0 or not words:
            return [(index, 0.0) for index in range(k)]
        found, scores = self.index.retrieve([words], k=k, show_progress=False, sorted=True)
        return [(int(index), float(score)) for index, score in zip(found[0], scores[0], strict=True)]


class Meanings:
    """Cosine of vectors. `keep`: where the vectors of these very texts lie, or will."""

    def __init__(self, texts: Sequence[str], embed: Embed, keep: Path | None = None) -> None:
        self.embed = embed
        self.asked: dict[str, np.ndarray[Any, Any]] = {}
        size = len(texts) * _WIDTH * 4
        if keep is not None and keep.exists() and keep.stat().st_size == size:
            self.vectors = np.fromfile(keep, dtype=np.float32).reshape(len(texts), _WIDTH)
            return
        self.vectors = embed(texts).astype(np.float32)
        if keep is not None and self.vectors.nbytes == size:
            write_whole(keep, self.vectors.tobytes())

    def ask(self, questions: Sequence[str], *, again: bool = False) -> None:
        """Embed many questions at once: much faster than one by one. `again`: those that are known, too, for who measures how long it takes."""
        if new := [question for question in dict.fromkeys(questions) if again or question not in self.asked]:
            self.asked.update(zip(new, self.embed(new), strict=True))

    def nearest(self, question: str, k: int) -> list[tuple[int, float]]:
        self.ask([question])
        alike = self.vectors @ self.asked[question]
        k = min(k, len(alike))
        if k == 0:
            return []
        found = np.argpartition(-alike, k - 1)[:k]
        found = found[np.lexsort((found, -alike[found]))]
        return [(int(index), max(0.0, float(alike[index]))) for index in found]


class Library:
    """What can be looked up: the training rows by their questions, the passages by their text. Indexes are made when they are first asked for."""

    def __init__(
        self, train: Sequence[Example], passages: Sequence[Passage] = (), *, embed: Embed | None = None, folder: Path | None = None
    ) -> None:
        self.train, self.passages = list(train), list(passages)
        self.ways = (BY_WORDS, BY_MEANING) if embed is not None else (BY_WORDS,)
        self.labelled = [passage for passage in self.passages if passage.answer is not None]
        # A passage that knows its answer is found by what it is about; where all do, one index serves to read and to vote.
        self._read_by = "labelled" if len(self.labelled) == len(self.passages) else "passages"
        self._embed, self._folder = embed, folder
        self._made: dict[tuple[str, str], Search] = {}
        self._states: dict[str, str] = {}

    def examples(self, question: str, k: int, way: str = BY_WORDS) -> list[Example]:
        """Up to k training rows, the nearest last: what stands next to the question is copied most."""
        return [self.train[index] for index, _ in self._search("examples", way).nearest(question, k)][::-1]

    def read(self, question: str, k: int, way: str = BY_WORDS) -> list[Passage]:
        """Up to k passages, the nearest last."""
        return [self.passages[index] for index, _ in self._search(self._read_by, way).nearest(question, k)][::-1]

    def vote(self, question: str, k: int, way: str = BY_WORDS, pool: str = "examples") -> str:
        """The answer that the k nearest have most of, each counted by how near it is; of equals the nearest one's. "" where there is none.

        pool: `examples`, the training rows · `labelled`, the passages that know their answer.
        """
        votes: dict[str, float] = defaultdict(float)
        answers = [row.reference for row in self.train] if pool == "examples" else [str(passage.answer) for passage in self.labelled]
        for index, near in self._search(pool, way).nearest(question, k):
            votes[answers[index].strip()] += near
        return max(votes, key=lambda answer: votes[answer], default="")

    def state(self, pool: str) -> str:
        """Changes with what votes: a row more, another answer."""
        if pool not in self._states:
            rows = self.train if pool == "examples" else self.labelled
            self._states[pool] = hash_of(
                [(row.question, row.reference) if isinstance(row, Example) else (row.key, row.answer) for row in rows]
            )
        return self._states[pool]

    def ask(self, questions: Sequence[str], way: str, kind: str, *, again: bool = False) -> None:
        """Make ready for many questions at once: kind is examples, passages or labelled."""
        if isinstance(search := self._search(self._read_by if kind == "passages" else kind, way), Meanings):
            search.ask(questions, again=again)

    def _search(self, kind: str, way: str) -> Search:
        if (kind, way) not in self._made:
            texts = {
                "examples": lambda: [row.question for row in self.train],
                "passages": lambda: [passage.text for passage in self.passages],
                "labelled": lambda: [passage.key for passage in self.labelled],
            }[kind]()
            self._made[kind, way] = Words(texts) if way == BY_WORDS else self._meanings(texts)
        return self._made[kind, way]

    def _meanings(self, texts: Sequence[str]) -> Meanings:
        assert self._embed is not None
        return Meanings(texts, self._embed, None if self._folder is None else self._folder / f"vectors-{hash_of(list(texts))}.f32")


def varied(rows: Sequence[Example], k: int) -> list[Example]:
    """A fixed few: in the order of their ids (a hash, so: at random), first those whose answers begin unlike any taken before."""
    ordered = sorted(rows, key=lambda row: row.id)
    taken: list[Example] = []
    beginnings: set[str] = set()
    for row in ordered:
        beginning = row.reference.strip()[:24]
        if beginning not in beginnings:
            beginnings.add(beginning)
            taken.append(row)
        if len(taken) == k:
            return taken
    ids = {row.id for row in taken}
    return (taken + [row for row in ordered if row.id not in ids])[:k]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
