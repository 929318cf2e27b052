"""What the rows nearest to each row say: do they answer alike, and is one of them the same question once more?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz

from burnish.evaluation import Words
from burnish.types import Example, Tell, silent

Floats = NDArray[np.float64]

NEAREST = 10  # rows that have a say
NEAR_DUPLICATE = 0.9  # likeness of two questions (rapidfuzz ratio, case aside) from which they are the same question once more
_COMPARED_CHARACTERS = 2000  # of a text: likeness of longer ones costs the square of their length and hardly changes


@dataclass(frozen=True, slots=True)
class Neighbours:
    """One entry a row, in order; nan where a row has no neighbours."""

    disagreement: Floats  # −1 (all nearest rows answer as this one does) to 1 (all answer alike, and otherwise)
    duplicate: Floats  # likeness to an earlier row with the same answer, 0 below NEAR_DUPLICATE
    twin: tuple[int | None, ...]  # which row that is
    majority: tuple[str, ...]  # what the nearest rows answer most, where answers are labels; else ""
    differing: tuple[tuple[int, int], ...]  # (how many of the nearest answer otherwise, how many there are)


def find_neighbours(examples: Sequence[Example], *, labels: bool, tell: Tell = silent) -> Neighbours:
    """BM25 over questions, a row never its own neighbour; votes weigh as much as their score. Plain text has no answers to vote on: only copies are found.

    `labels`: answers are the same or not, and disagreement is the share of the strongest other answer minus the share of the row's own (the margin of
    confident learning, arXiv 1911.00068, with neighbours in the place of a classifier). Else answers are more or less alike, and it is minus the mean likeness.
    """
    rows = list(examples)
    plain = not all(row.question for row in rows)
    texts = [row.reference if plain else row.question for row in rows]
    if plain:
        rows = [replace(row, messages=({"role": "user", "content": row.reference}, row.messages[-1])) for row in rows]
    search = Words([row.question for row in rows])
    found: list[list[tuple[int, float]]] = []
    for place, text in enumerate(texts):
        near = [(other, score) for other, score in search.nearest(text, NEAREST + 1) if other != place and score > 0]
        found.append(near[:NEAREST])
        tell("nearest rows", place + 1, len(rows), "")
    answers = [""] * len(rows) if plain else [" ".join(row.reference.split()) for row in rows]
    votes = [_vote(place, [] if plain else near, answers, labels=labels) for place, near in enumerate(found)]
    copies = [_copy(place, near, texts, answers) for place, near in enumerate(found)]
    return Neighbours(
        np.array([vote[0] for vote in votes]),
        np.array([likeness for likeness, _ in copies]),
        tuple(twin for _, twin in copies),
        tuple(vote[1] for vote in votes),
        tuple(vote[2] for vote in votes),
    )


def _vote(place: int, near: Sequence[tuple[int, float]], answers: Sequence[str], *, labels: bool) -> tuple[float, str, tuple[int, int]]:
    """(disagreement, the answer given most, (how many differ, of how many))."""
    if not near:
        return float("nan"), "", (0, 0)
    total, own = sum(score for _, score in near), answers[place]
    differing = sum(answers[other] != own for other, _ in near)
    if not labels:
        alike = sum(score * likeness(own, answers[other]) for other, score in near) / total
        return -alike, "", (differing, len(near))
    shares: dict[str, float] = defaultdict(float)
    for other, score in near:
        shares[answers[other]] += score / total
    strongest = max((share for answer, share in shares.items() if answer != own), default=0.0)
    return strongest - shares.get(own, 0.0), max(shares, key=lambda answer: shares[answer]), (differing, len(near))


def _copy(place: int, near: Sequence[tuple[int, float]], texts: Sequence[str], answers: Sequence[str]) -> tuple[float, int | None]:
    """(likeness, which) of the most similar earlier row with the same answer, if it is a near-duplicate."""
    best: tuple[float, int | None] = (0.0, None)
    for other, _ in near:
        if other < place and answers[other] == answers[place]:
            alike = likeness(texts[place].casefold(), texts[other].casefold())
            if alike >= NEAR_DUPLICATE and alike > best[0]:
                best = (alike, other)
    return best


def likeness(one: str, other: str) -> float:
    """1 − (insertions and deletions that make one the other) ÷ (their lengths together)."""
    return float(fuzz.ratio(one[:_COMPARED_CHARACTERS], other[:_COMPARED_CHARACTERS])) / 100
