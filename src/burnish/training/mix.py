"""Replay: general rows mixed into training, so that what the base model could is not unlearnt.

A pure function of (seed, epoch, numbers of rows), like the order: a run that was cut off goes on with the same rows. Training sequences have
the indices 0 … n_train − 1, replayed ones n_train … n_train + n_replay − 1.
"""

from __future__ import annotations

import hashlib
import random


def replayed_per_epoch(n_train: int, n_replay: int, fraction: float) -> int:
    """How many replayed sequences make `fraction` of all that an epoch trains on: k ÷ (n_train + k) = fraction."""
    return round(n_train * fraction / (1 - fraction)) if n_replay else 0


def epoch_indices(n_train: int, n_replay: int, fraction: float, *, seed: int, epoch: int) -> list[int]:
    """What epoch 0, 1, 2 … trains on: every training sequence, and its share of the replayed ones; not in order yet (`epoch_order` shuffles).

    The replayed ones come from an endless row of shuffled rounds through all of them: none returns before each had its turn, and an epoch goes
    on where the one before stopped.
    """
    k = replayed_per_epoch(n_train, n_replay, fraction)
    replayed: list[int] = []
    at = epoch * k  # place in the endless row
    while len(replayed) < k:
        number, place = divmod(at + len(replayed), n_replay)
        replayed += _round(n_replay, seed, number)[place : place + k - len(replayed)]
    return [*range(n_train), *(n_train + index for index in replayed)]


def _round(n: int, seed: int, number: int) -> list[int]:
    shuffle = random.Random(int.from_bytes(hashlib.sha256(f"replay:{seed}:{number}".encode()).digest()[:8], "big"))
    order = list(range(n))
    shuffle.shuffle(order)
    return order
