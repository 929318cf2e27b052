"""Which training rows are shown as examples: a fixed, varied few, or those nearest to the question by BM25."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import bm25s

from burnish.types import Example

_WORD = re.compile(r"\w+", re.UNICODE)


class Retriever:
    """BM25 (Robertson & Zaragoza 2009) over the questions of the training rows."""

    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = list(rows)
        self.index: Any = bm25s.BM25()
        # A corpus without a single word cannot be indexed; the mark below stands in every row and tells none apart.
        self.index.index([_words(row.question) or ["∅"] for row in self.rows], show_progress=False)

    def nearest(self, question: str, k: int) -> list[Example]:
        """Up to k rows, the nearest last: what stands next to the question is copied most."""
        found = [self.rows[place] for place, _ in self.scored(question, k)] or self.rows[: min(k, len(self.rows))]
        return found[::-1]

    def scored(self, question: str, k: int) -> list[tuple[int, float]]:
        """Places of up to k rows with their BM25 scores, the nearest first. Empty where the question has no word that any row has."""
        k = min(k, len(self.rows))
        words = [word for word in _words(question) if word in self.index.vocab_dict]
        if k == 0 or not words:
            return []
        found, scores = self.index.retrieve([words], k=k, show_progress=False, sorted=True)
        return [(int(place), float(score)) for place, score in zip(found[0], scores[0], strict=True)]


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
