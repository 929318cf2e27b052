"""Intervals of what several trainings scored on the same validation rows: both the rows and the seeds could have been others.

A draw takes validation rows with replacement (whole groups, where rows have groups), the same for all trainings, and then seeds with replacement for each
size or arm. Three seeds say little about how far seeds scatter, in two ways that are made up for: a bootstrap of S values has (S − 1)/S of their variance
(Davison & Hinkley 1997, 2.3), and a variance from few values needs Student's quantile in the place of the normal one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def row_draws(groups: Sequence[str], *, draws: int, seed: int) -> Floats:
    """(draws, rows) how often each validation row stands in each draw; rows of one group come and go together."""
    names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    member = np.array([names[group] for group in groups])
    random = np.random.default_rng(seed)
    taken = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)  # (draws, groups)
    return np.asarray(taken[:, member], dtype=np.float64)


def seed_draws(values: Floats, of: Sequence[Hashable], *, confidence: float = 0.95, seed: int = 0) -> tuple[list[Hashable], Floats]:
    """(draws, trainings) values on drawn rows → the sizes or arms in their order, and (draws, sizes) means over drawn seeds.

    `of`: the size or arm of each training. Where a size has one training, its seeds are not known to scatter and only its rows are drawn.
    """
    names = list(dict.fromkeys(of))
    places = {name: [index for index, other in enumerate(of) if other == name] for name in names}
    freedom = sum(len(part) - 1 for part in places.values())
    wider = _student(confidence, freedom) if freedom else 1.0
    random = np.random.default_rng(seed)
    means = np.empty((values.shape[0], len(names)))
    for column, name in enumerate(names):
        own = values[:, places[name]]  # (draws, S)
        count = own.shape[1]
        middle = own.mean(axis=1)
        chosen = np.take_along_axis(own, random.integers(0, count, size=own.shape), axis=1).mean(axis=1)
        scale = wider * math.sqrt(count / (count - 1)) if count > 1 else 0.0
        means[:, column] = middle + scale * (chosen - middle)
    return names, means


def interval(draws: Floats, confidence: float) -> tuple[float, float]:
    """Percentiles of (draws,)."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _student(confidence: float, freedom: int) -> float:
    """By how much Student's quantile exceeds the normal one."""
    from scipy.stats import t  # slow to import, and only this needs it

    at = 0.5 + confidence / 2
    return float(t.ppf(at, freedom)) / NormalDist().inv_cdf(at)
