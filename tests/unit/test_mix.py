"""Replay: shares by hand, pure functions, every row its turn."""

from __future__ import annotations

from collections import Counter

import pytest

from burnish.training.mix import epoch_indices, replayed_per_epoch
from burnish.training.pack import epoch_order


def test_the_share_is_of_all_rows() -> None:
    assert replayed_per_epoch(90, 1000, 0.1) == 10  # 10 of 100
    assert replayed_per_epoch(100, 1000, 0.5) == 100
    assert replayed_per_epoch(100, 1000, 0.75) == 300
    assert replayed_per_epoch(100, 0, 0.5) == 0


@pytest.mark.parametrize("n_replay", [1, 7, 10, 23, 1000])
def test_every_training_row_once_and_its_share_of_replayed_ones(n_replay: int) -> None:
    for epoch in range(5):
        chosen = epoch_indices(90, n_replay, 0.1, seed=3, epoch=epoch)
        assert chosen[:90] == list(range(90))
        assert len(chosen) == 100
        assert all(90 <= index < 90 + n_replay for index in chosen[90:])
        assert chosen == epoch_indices(90, n_replay, 0.1, seed=3, epoch=epoch), "a pure function"


@pytest.mark.parametrize("n_replay", [7, 10, 23])
def test_none_returns_before_each_had_its_turn(n_replay: int) -> None:
    """Over any number of epochs, how often rows were drawn differs by one at most."""
    drawn: Counter[int] = Counter()
    for epoch in range(8):
        drawn.update(epoch_indices(90, n_replay, 0.1, seed=0, epoch=epoch)[90:])
        counts = [drawn[90 + index] for index in range(n_replay)]
        assert max(counts) - min(counts) <= 1
    assert sum(drawn.values()) == 80


def test_another_draw_each_epoch_and_for_each_seed() -> None:
    first = set(epoch_indices(90, 1000, 0.1, seed=0, epoch=0)[90:])
    assert not first & set(epoch_indices(90, 1000, 0.1, seed=0, epoch=1)[90:]), "no repetition while there are others"
    assert first != set(epoch_indices(90, 1000, 0.1, seed=1, epoch=0)[90:])
    assert first != set(range(90, 100))


def test_without_replay_nothing_changes() -> None:
    lengths = [(i * 37) % 91 + 3 for i in range(50)]
    plain = epoch_order(lengths, seed=1, epoch=2, batch=8)
    assert epoch_order(lengths, seed=1, epoch=2, batch=8, indices=epoch_indices(50, 0, 0.1, seed=1, epoch=2)) == plain


def test_the_order_shuffles_them_in() -> None:
    chosen = epoch_indices(90, 30, 0.25, seed=0, epoch=0)
    order = epoch_order([5] * 120, seed=0, epoch=0, batch=4, indices=chosen)
    assert sorted(order) == sorted(chosen)
    places = [place for place, index in enumerate(order) if index >= 90]
    assert len(places) == 30
    assert places != list(range(90, 120))
    assert max(places) - min(places) > 60
