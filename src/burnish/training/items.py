"""Rows → what the objective trains on: tokens or pairs, with the place each came from."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from burnish.models import Chat
from burnish.training import distributed
from burnish.training.objective import Objective
from burnish.training.preference import Preference, with_reference
from burnish.training.store import TokenStore, stored
from burnish.types import Dataset, Example, Tell, silent


@dataclass(frozen=True, slots=True)
class Items:
    train: Sequence[Any]
    replay: Sequence[Any]
    validation: Sequence[Any]
    dataset: Dataset
    rows: tuple[Any, Any]  # arrays of int: the row that each item of train, of replay was made from
    validation_rows: Any = ()  # the same of validation

    @property
    def mixed(self) -> Sequence[Any]:
        """Train, then replay: what the indices of an epoch's order mean."""
        return self.train if not len(self.replay) else Joined(self.train, self.replay)

    def source(self, index: int) -> str:
        """file:line of an item of `mixed`."""
        n = len(self.train)
        return (
            self.dataset.train[int(self.rows[0][index])].source if index < n else self.dataset.replay[int(self.rows[1][index - n])].source
        )

    def lengths(self, objective: Objective) -> Sequence[int]:
        """Tokens of each item of `mixed`."""
        return [int(length) for part in (self.train, self.replay) for length in _lengths(part, objective)]

    def longest(self, objective: Objective, count: int) -> list[Any]:
        """The longest items, the longest first."""
        lengths = self.lengths(objective)
        chosen = heapq.nlargest(count, range(len(lengths)), key=lambda index: lengths[index])
        mixed = self.mixed
        return [mixed[index] for index in chosen]


class Joined(Sequence[Any]):
    """Two sequences as one, without a copy."""

    def __init__(self, first: Sequence[Any], second: Sequence[Any]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]


def make_items(
    objective: Objective, chat: Chat, dataset: Dataset, *, folder: Path | None = None, key: str = "", tell: Tell = silent
) -> Items:
    """Each row as the objective reads it; a row may become several items (a template that writes earlier turns anew).

    With a `folder`, items that are plain tokens lie there in files, made once for a `key`.
    """

    def made(examples: Sequence[Example], name: str) -> tuple[Sequence[Any], Any]:
        if folder is not None and examples and objective.tokens_only and distributed.rank() == 0:
            store = stored(folder / name, key, examples, lambda e: objective.items(chat, e), what=f"tokenising the {name} rows", tell=tell)
            return store, store.rows
        pairs = [(item, number) for number, example in enumerate(examples) for item in objective.items(chat, example)]
        return [item for item, _ in pairs], [number for _, number in pairs]

    train, replay, validation = made(dataset.train, "train"), made(dataset.replay, "replay"), made(dataset.validation, "validation")
    offset = 0
    for store in (train[0], replay[0], validation[0]):
        if isinstance(store, TokenStore):
            store.offset, offset = offset, offset + int(store.lengths.sum())
    return Items(train[0], replay[0], validation[0], dataset, (train[1], replay[1]), validation[1])


def only_rows(items: Items, rows: Collection[int]) -> Items:
    """The items of some training rows (places in dataset.train), in their old order; validation and replayed ones stay."""
    chosen = set(rows)
    kept = [index for index, row in enumerate(items.rows[0]) if int(row) in chosen]
    return replace(items, train=[items.train[index] for index in kept], rows=([int(items.rows[0][index]) for index in kept], items.rows[1]))


def _lengths(items: Sequence[Any], objective: Objective) -> Sequence[int]:
    known = getattr(items, "lengths", None)  # a sequence on disk knows them
    return known if known is not None else [objective.length(item) for item in items]


def with_references(items: Items, objective: Objective, model: Any, *, cache: Path, state: str, at_once: int, tell: Tell = silent) -> Items:
    """For preferences: what the model says of each pair before the first step. Call it before trained weights of a checkpoint are put back."""
    if not isinstance(objective, Preference):
        return items
    pairs = [*items.train, *items.validation]
    known = with_reference(model, pairs, cache=cache, state=state, at_once=at_once, paths=objective.paths, tell=tell)
    return replace(items, train=known[: len(items.train)], validation=known[len(items.train) :])
