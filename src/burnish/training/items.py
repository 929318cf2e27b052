"""Rows → what the objective trains on: tokens or pairs, with the place each came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from burnish.models import Chat
from burnish.training.objective import Objective
from burnish.training.preference import Preference, with_reference
from burnish.types import Dataset, Example, Tell, silent


@dataclass(frozen=True, slots=True)
class Items:
    train: list[Any]
    replay: list[Any]
    validation: list[Any]
    sources: list[str]  # file:line of each item of train, then of replay


def make_items(objective: Objective, chat: Chat, dataset: Dataset) -> Items:
    """Each row as the objective reads it; a row may become several items (a template that writes earlier turns anew)."""

    def made(examples: Sequence[Example]) -> list[tuple[Any, str]]:
        return [(item, example.source) for example in examples for item in objective.items(chat, example)]

    train, replay = made(dataset.train), made(dataset.replay)
    validation = [item for item, _ in made(dataset.validation)]
    return Items([item for item, _ in train], [item for item, _ in replay], validation, [source for _, source in [*train, *replay]])


def with_references(items: Items, objective: Objective, model: Any, *, cache: Path, state: str, at_once: int, tell: Tell = silent) -> Items:
    """For preferences: what the model says of each pair before the first step. Call it before trained weights of a checkpoint are put back."""
    if not isinstance(objective, Preference):
        return items
    pairs = [*items.train, *items.validation]
    known = with_reference(model, pairs, cache=cache, state=state, at_once=at_once, paths=objective.paths, tell=tell)
    return replace(items, train=known[: len(items.train)], validation=known[len(items.train) :])
