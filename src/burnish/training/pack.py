"""Training sequences → steps. The order is a pure function of (seed, epoch, n); a batch is one row without padding."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.models import IGNORED
from burnish.types import Tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences joined in one row; `position_ids` start again at 0 with each, and that is how attention keeps them apart.

    input_ids     a0 a1 a2 b0 b1      (1, T)
    position_ids   0  1  2  0  1      (1, T)
    predictors        0  1     3      (N,)   places whose next token is a target
    targets          a1 a2    b1      (N,)
    owners            0  0     1      (N,)   the sequence that each target belongs to
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    owners: Tensor

    def to(self, device: torch.device | str) -> Batch:
        tensors = (self.input_ids, self.position_ids, self.predictors, self.targets, self.owners)
        return Batch(*(tensor.to(device) for tensor in tensors))


def flatten(sequences: Sequence[Tokens]) -> Batch:
    """Join sequences into one batch. A label belongs to the place before it; the first token of a sequence is never a target."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, sequence in enumerate(sequences):
        offset = len(ids)
        ids += sequence.input_ids
        positions += range(len(sequence.input_ids))
        for place, label in enumerate(sequence.labels[1:]):
            if label != IGNORED:
                predictors.append(offset + place)
                targets.append(label)
                owners.append(number)
    return Batch(torch.tensor([ids]), torch.tensor([positions]), *(torch.tensor(part) for part in (predictors, targets, owners)))


def epoch_order(lengths: Sequence[int], *, seed: int, epoch: int, batch: int, indices: Sequence[int] | None = None) -> list[int]:
    """Indices 0..n−1 (or those given), shuffled; then, within windows of 16 batches, sorted by length, and the batches shuffled again.

    Batches of like length waste little attention; windows keep the order random enough that the loss curve does not follow length.
    """
    shuffle = random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "big"))
    order = list(range(len(lengths)) if indices is None else indices)
    shuffle.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), 16 * batch):
        window = sorted(order[start : start + 16 * batch], key=lambda index: lengths[index])
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    # A last batch that is not full stays last: else it would shift every step behind it.
    tail = [part for part in batches if len(part) < batch]
    full = [part for part in batches if len(part) == batch]
    shuffle.shuffle(full)
    return [index for part in [*full, *tail] for index in part]
