"""Terminology: are a glossary's preferred terms used where they belong, and its forbidden ones nowhere?

A glossary is a CSV file with the columns `preferred` and `forbidden` (several, `;`), and if wanted `context` (words of the input, several, `;`,
that show that the term belongs into the answer) and `language` (en, de, fr, es; else words are compared as they stand).

Words are compared by stems: a few suffix rules for each language, so that "invoices" is found for "invoice" and "Verträge" for "Vertrag".
What this cannot do: tell words whose stems meet ("rating" is found for "rat"), irregular forms ("mice"), German compounds ("Rechnungsbetrag" for "Rechnung"), separable verbs, languages written without
spaces, and meaning: "bank" is the same word for money and for rivers.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from burnish.errors import DataError, Problem
from burnish.types import Score

COLUMNS = ("preferred", "forbidden", "context", "language")
MOST_TERMS = 20_000
_WORD = re.compile(r"\w+")
# Longest first; what is left of a word has at least so many letters.
_SUFFIXES: dict[str, tuple[tuple[str, ...], int]] = {
    "en": (("ings", "ing", "ed", "es", "s"), 3),
    "de": (("ern", "em", "en", "er", "es", "e", "n", "s"), 4),
    "fr": (("aux", "es", "e", "s", "x"), 3),
    "es": (("es", "s"), 3),
}

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Term:
    preferred: Words
    forbidden: tuple[Words, ...]
    context: tuple[Words, ...]
    language: str
    line: int


def read_glossary(path: Path) -> list[Term]:
    """The terms of a CSV file. DataError with every line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {problem}") from problem
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [str(name).strip().lower() for name in reader.fieldnames or ()]
    if "preferred" not in header or [name for name in header if name not in COLUMNS]:
        found = ", ".join(header) or "nothing"
        raise DataError(
            f"{path}:1: expected the columns preferred, forbidden and, if wanted, context and language; found {found}"
        ) from None
    reader.fieldnames = header
    terms: list[Term] = []
    problems: list[Problem] = []
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                problems.append(Problem(where, "more cells than columns", "put cells that hold a comma in quotes"))
                continue
            cells = {key: (value or "").strip() for key, value in row.items()}
            language = cells.get("language", "").lower()
            term = Term(
                _words(cells["preferred"]), _several(cells.get("forbidden")), _several(cells.get("context")), language, reader.line_num
            )
            if not term.preferred and not term.forbidden:
                problems.append(Problem(where, "neither a preferred nor a forbidden term", "fill in one, or delete the line"))
            elif language and language not in _SUFFIXES:
                problems.append(
                    Problem(where, f"language {language!r}", f"known: {', '.join(_SUFFIXES)}; leave it empty for words as they stand")
                )
            elif term.preferred in term.forbidden:
                problems.append(Problem(where, "a term is preferred and forbidden", "keep one"))
            terms.append(term)
    except csv.Error as problem:
        raise DataError(f"{path}:{reader.line_num}: not a CSV file: {problem}") from problem
    if problems:
        raise DataError(f"{path}: the glossary is not valid", problems)
    if not terms or len(terms) > MOST_TERMS:
        raise DataError(f"{path}: {len(terms)} terms; expected 1 to {MOST_TERMS:,}")
    return terms


@dataclass(frozen=True, slots=True)
class Glossary:
    terms: Sequence[Term]

    def preferred(self, answer: str, reference: str, prompt: str) -> Score:
        """Of the terms that belong into this row's answer, the share that is there. A term belongs where the reference has it, or where the
        input has one of its `context` words; a row to which none belongs is left out."""
        read = {name: _Text(text) for name, text in (("answer", answer), ("reference", reference), ("prompt", prompt))}
        wanted = [
            term
            for term in self.terms
            if term.preferred
            and (read["reference"].has(term.preferred, term) or any(read["prompt"].has(words, term) for words in term.context))
        ]
        if not wanted:
            return Score(None, "reference and input show no term of the glossary")
        return Score(sum(read["answer"].has(term.preferred, term) for term in wanted) / len(wanted))

    def forbidden(self, answer: str, reference: str) -> Score:
        """1 where the answer has no forbidden term. Terms that the reference has itself do not count in this row."""
        given, expected = _Text(answer), _Text(reference)
        for term in self.terms:
            for words in term.forbidden:
                if given.has_forbidden(words, term) and not expected.has_forbidden(words, term):
                    return Score(0.0)
        return Score(1.0)


class _Text:
    """A text's words, and their stems in the languages that are asked for."""

    def __init__(self, text: str) -> None:
        self.words = _words(text)
        self._stems: dict[str | None, tuple[Words, frozenset[str]]] = {None: (self.words, frozenset(self.words))}

    def has(self, words: Words, term: Term) -> bool:
        return bool(self._places(words, term, exact=self._alike(words, term)))

    def has_forbidden(self, words: Words, term: Term) -> bool:
        """Whether it has the forbidden words, not counting where they are a part of the preferred term ("card" in "credit card")."""
        exact = bool(term.preferred) and _stems(words, term.language) == _stems(term.preferred, term.language)
        inside = {
            at + offset
            for at in (self._places(term.preferred, term, exact=exact) if term.preferred and len(term.preferred) > len(words) else ())
            for offset in range(len(term.preferred))
        }
        return any(at not in inside for at in self._places(words, term, exact=exact))

    def _alike(self, words: Words, term: Term) -> bool:
        """Where a forbidden word differs from the preferred one only in its form or in capitals, forms are compared letter by letter."""
        return any(_stems(words, term.language) == _stems(other, term.language) for other in term.forbidden)

    def _places(self, words: Words, term: Term, *, exact: bool) -> list[int]:
        language = None if exact else term.language
        if language not in self._stems:
            stems = tuple(stem(word, str(language)) for word in self.words)
            self._stems[language] = (stems, frozenset(stems))
        (text, known), wanted = self._stems[language], words if exact else _stems(words, term.language)
        if not known.issuperset(wanted):
            return []
        n = len(wanted)
        return [at for at in range(len(text) - n + 1) if text[at] == wanted[0] and text[at : at + n] == wanted]


def stem(word: str, language: str = "") -> str:
    """What the forms of a word have in common, by suffix rules: invoices → invoic, as invoice → invoic."""
    word = word.casefold()
    if language not in _SUFFIXES:
        return word
    if language in ("de", "fr", "es"):  # Vertrag, Verträge; général, généraux
        word = "".join(c for c in unicodedata.normalize("NFD", word) if not unicodedata.combining(c))
    if language == "en":
        word = re.sub(r"(?<=\w{2})(ies|y)$", "i", word)
    if language == "fr":
        word = re.sub(r"(?<=\w{2})aux$", "al", word)
    suffixes, least = _SUFFIXES[language]
    for suffix in suffixes:
        if word.endswith(suffix) and len(word) - len(suffix) >= least and not (suffix == "s" and word.endswith("ss")):
            word = word[: -len(suffix)]
            break
    if language == "en" and len(word) > 3:
        word = re.sub(r"([bdfgmnprt])\1$", r"\1", word)  # shipped → ship
        word = word.removesuffix("e")
    return word


@lru_cache(maxsize=200_000)  # each term meets each row
def _stems(words: Words, language: str) -> Words:
    return tuple(stem(word, language) for word in words)


def _words(text: str) -> Words:
    """Letters and digits; what stands after an apostrophe ("customer's") is a word of its own, and so is each part of "e-mail"."""
    return tuple(_WORD.findall(unicodedata.normalize("NFC", text)))


def _several(cell: str | None) -> tuple[Words, ...]:
    return tuple(words for part in (cell or "").split(";") if (words := _words(part)))
