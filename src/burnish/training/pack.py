"""Training sequences → steps. The order is a pure function of (seed, epoch, n); a batch is one row without padding.

Sequences that begin alike (a system prompt, a schema, the two answers of a preference) share that beginning: it stands in the row once, and
the sequences branch off it. Each piece is a segment, and a token attends to its own segment and to those it branched off:

    segment          0: <bos> You are …        1: hi → hello       2: bye → farewell
    position_ids     0 1 2 3 …                 20 21 22 …          20 21 22 …
    looks back to    —                         0                   0
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from burnish.models import IGNORED, Kernels, Segment
from burnish.types import Tokens

if TYPE_CHECKING:
    from burnish.training.frozen import FrozenCache

# Sharing fewer tokens than this saves less than another segment costs.
_LEAST_SHARED = 16


@dataclass(frozen=True, slots=True)
class Paths:
    """How sequences become a batch and how it is computed: `engine` in a recipe, as far as the model takes it. All give the same loss."""

    by_segment: bool = False  # attention follows segments: models.attend_by_segment must have said yes
    share: bool = False  # common beginnings are computed once; needs by_segment
    blocked: bool = True  # the head in blocks of the vocabulary
    packed: bool = True  # False: the model lets packed sequences see each other, so each is computed alone
    cache: FrozenCache | None = field(default=None, compare=False)  # of what frozen lower layers make of the rows
    kernels: Kernels | None = field(default=None, compare=False)  # compiled passes over memory, on a CPU


@dataclass(frozen=True)
class Batch:
    """Sequences joined in one row.

    input_ids      (1, T)
    position_ids   (1, T)   place of each token in its own sequence
    predictors     (N,)     places whose next token is a target; a place where sequences part stands once for each
    targets        (N,)
    owners         (N,)     which sequence a target belongs to
    segments                what attends to what; None: sequences are kept apart by position_ids alone
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor
    segments: tuple[Segment, ...] | None = None
    blocked: bool = True
    cache: FrozenCache | None = None
    kernels: Kernels | None = None
    numbers: np.ndarray[Any, Any] | None = None  # (T,) of each token among all of the training, where there is a cache
    copies: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = (
        None  # (M,) numbers and (M,) places: a shared token has several numbers
    )

    def to(self, device: torch.device | str) -> Batch:
        names = ("input_ids", "position_ids", "predictors", "targets", "owners")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def model_arguments(self) -> dict[str, Any]:
        """What a transformers model is called with. Without segments, transformers builds the block mask from positions (only without a cache)."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if self.segments is not None:
            # A mask of four dimensions is passed on as it is; attention by segments looks at the segments only.
            arguments |= {"segments": self.segments, "attention_mask": self._no_mask}
        return arguments

    @cached_property
    def _no_mask(self) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.input_ids.device)


def row_length(sequences: Sequence[Tokens], paths: Paths) -> int:
    """Tokens of the row that `flatten` makes, or a few more: of what is shared, only what all share is counted off."""
    total = sum(len(tokens.input_ids) for tokens in sequences)
    if not (paths.by_segment and paths.share) or len(sequences) < 2:
        return total
    # The first and the last in order have the least in common.
    first, last = min(tokens.input_ids for tokens in sequences), max(tokens.input_ids for tokens in sequences)
    common = _common(first, last)
    return total - (len(sequences) - 1) * common if common >= _LEAST_SHARED else total


def flatten(sequences: Sequence[Tokens], paths: Paths = Paths()) -> Batch:
    """Join sequences into one batch. A label belongs to the place before it; the first token of a sequence is never a target."""
    row = _Row([], [], [])
    places: list[list[int]] = [[] for _ in sequences]  # of each sequence's tokens in the row
    if paths.by_segment and paths.share:
        order = sorted(range(len(sequences)), key=lambda index: sequences[index].input_ids)
        _branch(sequences, order, 0, (), row, places)
    else:
        for index in range(len(sequences)):
            _add(sequences, [index], 0, len(sequences[index].input_ids), (), row, places)
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for index, sequence in enumerate(sequences):
        mine = places[index]
        for place, label in enumerate(sequence.labels[1:]):
            if label != IGNORED:
                predictors.append(mine[place])
                targets.append(label)
                owners.append(index)
    tensor = torch.tensor
    return Batch(
        tensor([row.ids]), tensor([row.positions]), tensor(predictors), tensor(targets), tensor(owners),
        segments=tuple(row.segments) if paths.by_segment else None, blocked=paths.blocked, cache=paths.cache, kernels=paths.kernels, **_numbers(sequences, places, paths),
    )  # fmt: skip


def _numbers(sequences: Sequence[Tokens], places: list[list[int]], paths: Paths) -> dict[str, Any]:
    if paths.cache is None or any(tokens.number is None for tokens in sequences):
        return {}
    numbers = np.concatenate([np.arange(len(t.input_ids)) + (t.number or 0) for t in sequences])
    rows = np.concatenate([np.asarray(mine) for mine in places])
    one_each = np.empty(rows.max() + 1, dtype=np.int64)
    one_each[rows] = numbers
    return {"numbers": one_each, "copies": (numbers, rows)}


@dataclass(slots=True)
class _Row:
    ids: list[int]
    positions: list[int]
    segments: list[Segment]


def _branch(
    sequences: Sequence[Tokens], order: list[int], begin: int, parents: tuple[int, ...], row: _Row, places: list[list[int]]
) -> None:
    """Lay down sequences (sorted) from place `begin` on: neighbours that go on alike for long enough share a segment."""
    rest = list(order)
    while rest:
        first = sequences[rest[0]].input_ids
        group, shared = [rest[0]], len(first)
        for index in rest[1:]:
            common = min(shared, _common(first, sequences[index].input_ids))
            if common - begin < _LEAST_SHARED:
                break
            group.append(index)
            shared = common
        rest = rest[len(group) :]
        if len(group) == 1:
            _add(sequences, group, begin, len(first), parents, row, places)
            continue
        segment = _add(sequences, group, begin, shared, parents, row, places)
        longer = [index for index in group if len(sequences[index].input_ids) > shared]
        _branch(sequences, longer, shared, (*parents, segment), row, places)


def _add(
    sequences: Sequence[Tokens], group: list[int], begin: int, end: int, parents: tuple[int, ...], row: _Row, places: list[list[int]]
) -> int:
    start = len(row.ids)
    row.ids += sequences[group[0]].input_ids[begin:end]
    row.positions += range(begin, end)
    row.segments.append(Segment(start, start + end - begin, begin, parents))
    for index in group:
        places[index] += range(start, start + end - begin)
    return len(row.segments) - 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # a[:low] equal, a[:high] not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def epoch_order(
    lengths: Sequence[int], *, seed: int, epoch: int, batch: int, indices: Sequence[int] | None = None, buckets: bool = True
) -> list[int]:
    """Indices 0..n−1 (or those given), shuffled; then, within windows of 16 batches, sorted by length, and the batches shuffled again. Without `buckets`, only shuffled.

    Batches of like length waste little attention; windows keep the order random enough that the loss curve does not follow length.
    """
    shuffle = random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big"))
    order = list(range(len(lengths)) if indices is None else indices)
    shuffle.shuffle(order)
    if not buckets:
        return order
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * batch):
        window = sorted(order[start : start + 16 * batch], key=lambda index: lengths[index])
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    # A last batch that is not full stays last: else it would shift every step behind it.
    tail = [part for part in batches if len(part) < batch]
    full = [part for part in batches if len(part) == batch]
    shuffle.shuffle(full)
    return [index for part in [*full, *tail] for index in part]
