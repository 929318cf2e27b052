"""Documents → passages, for candidates that look things up. No torch.

A text is cut into passages of whole paragraphs, or of whole sentences where a paragraph is long, each beginning with the last sentence of the one
before. A row of a table is one passage. Where a column of the table holds the very answers of the training rows (a code, a label), a passage
knows its answer, and looking it up needs no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.read import Row, read_documents
from burnish.errors import DataError

PASSAGE_WORDS = 120  # about 160 tokens: several fit beside a question; 100 words are the passages of DPR (arXiv 2004.04906)
ANSWERS_FOUND = 0.5  # share of the training answers that stand in a column, for it to be the column of answers
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+")


@dataclass(frozen=True, slots=True)
class Passage:
    text: str  # as a model reads it
    source: str  # file:line
    key: str = ""  # what is looked for in it; the text where it knows no answer
    answer: str | None = None


def read_passages(name: str, answers: Sequence[str] = ()) -> list[Passage]:
    """The passages of a file or folder (.txt, .md, .jsonl, .csv …). `answers`: of the training rows, to find a column that holds them.

    Raises DataError with every problem, or where there is no text.
    """
    found = read_documents(name)
    if found.problems:
        raise DataError(f"data.documents: {len(found.problems)} problem{'s' * (len(found.problems) > 1)} in {name}", found.problems)
    column = answer_column([row.content for row in found.rows], answers)
    passages = [passage for row in found.rows for passage in _passages_of(row, column)]
    if not passages:
        raise DataError(f"data.documents: {name}: no text in {len(found.rows)} rows; expected documents, or rows with texts")
    return passages


def answer_column(rows: Sequence[dict[str, Any]], answers: Sequence[str]) -> str | None:
    """The column in which at least half of the distinct training answers stand, the one with most of them; None without one."""
    wanted = {answer.strip() for answer in answers}
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, str | int | float):
                values.setdefault(key, set()).add(str(value).strip())
    shares = {key: len(wanted & held) / len(wanted) for key, held in values.items()} if wanted else {}
    best = max(shares, key=lambda key: shares[key], default=None)
    # A table of one column has nothing by which its answers could be found.
    return best if best is not None and shares[best] >= ANSWERS_FOUND and len(values) > 1 else None


def split_text(text: str, words: int = PASSAGE_WORDS) -> list[str]:
    """Whole paragraphs together up to so many words; a longer paragraph by sentences, a longer sentence by words."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if (paragraph := paragraph.strip()) and len(paragraph.split()) <= words:
            pieces.append(paragraph)
        elif paragraph:
            pieces += [part for sentence in _SENTENCE.split(paragraph) for part in _by_words(sentence, words)]
    passages: list[list[str]] = []
    for piece in pieces:
        if passages and _count(passages[-1]) + _count([piece]) <= words:
            passages[-1].append(piece)
            continue
        last = _SENTENCE.split(passages[-1][-1])[-1] if passages else ""
        lead = [last] if last and _count([last, piece]) <= words else []
        passages.append([*lead, piece])
    return ["\n".join(passage) for passage in passages]


def _passages_of(row: Row, column: str | None) -> list[Passage]:
    parts = {key: str(value).strip() for key, value in row.content.items() if isinstance(value, str | int | float) and str(value).strip()}
    if column is not None:
        rest = " ".join(value for key, value in parts.items() if key != column)
        return [Passage(f"{rest}: {parts[column]}", row.source, rest, parts[column])] if rest and column in parts else []
    text = next(iter(parts.values())) if len(parts) == 1 else "\n".join(f"{key}: {value}" for key, value in parts.items())
    return [Passage(part, row.source, part) for part in split_text(text)]


def _by_words(sentence: str, words: int) -> list[str]:
    parts = sentence.split()
    return [sentence] if len(parts) <= words else [" ".join(parts[start : start + words]) for start in range(0, len(parts), words)]


def _count(pieces: Sequence[str]) -> int:
    return sum(len(piece.split()) for piece in pieces)
