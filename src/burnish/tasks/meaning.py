"""Functional representations, as ViGGO writes them: `inform(name[Dirt: Showdown], genres[driving/racing, sport])`.

A representation is one name and its slots, each `slot[value]`, in brackets that may nest. Other notations (TOP's trees, calls with `=`) are
not read; a JSON answer is judged field by field elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from burnish.tasks.metrics import Unreadable, one_spaced

_HEAD = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\(")
_SLOT = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*\[")
MAX_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Representation:
    name: str
    slots: Counter[tuple[str, str]]  # (slot, value); the parts of a list in one order, for their order says nothing


def read_representation(text: str) -> Representation:
    """Unreadable where `text` is not a name and, in parentheses, slots with values in brackets."""
    text = text.strip()
    head = _HEAD.match(text)
    if head is None or not text.endswith(")") or len(text) > MAX_CHARACTERS:
        raise Unreadable("is no name(slot[value], …)")
    place, end = head.end(), len(text) - 1
    slots: Counter[tuple[str, str]] = Counter()
    while text[place:end].strip(" ,"):
        slot = _SLOT.match(text, place, end)
        if slot is None:
            raise Unreadable("is no name(slot[value], …)")
        closed = _closing(text, slot.end(), end)
        slots[slot[1], _value(text[slot.end() : closed])] += 1
        comma = re.compile(r"\s*(,|$)").match(text, closed + 1, end)
        if comma is None:
            raise Unreadable("is no name(slot[value], …)")
        place = comma.end()
    return Representation(head[1], slots)


def slot_f1(given: Representation, expected: Representation) -> float:
    """F1 of the (slot, value) pairs, 0..1; two representations without slots agree."""
    found, wanted = given.slots.total(), expected.slots.total()
    return 2 * (given.slots & expected.slots).total() / (found + wanted) if found + wanted else 1.0


def _closing(text: str, start: int, end: int) -> int:
    depth = 1
    for place in range(start, end):
        depth += (text[place] == "[") - (text[place] == "]")
        if depth == 0:
            return place
    raise Unreadable("has a bracket that is never closed")


def _value(text: str) -> str:
    return ", ".join(sorted(one_spaced(part) for part in text.split(",")))
