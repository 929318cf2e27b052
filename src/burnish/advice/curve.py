"""How much would more data bring? A saturating power law through scores at several sizes, and when not to believe it.

    score(n) = c − a·n^(−b)        loss(n) = c + a·n^(−b)        a ≥ 0, a score's c ≤ 1, a loss's c ≥ 0

The form is that of Hestness et al. 2017 (arXiv 1712.00409) and the usual one of learning curves (Viering & Loog 2021, arXiv 2103.10948, who also count how
often curves do not follow it: hence the checks).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.advice.draws import interval, seed_draws
from burnish.run import hash_of

Floats = NDArray[np.float64]

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
EXPONENTS = (0.05, 3.0)  # below, a curve does not bend within any data set one could collect; above, it is flat after one doubling
LEAST_SIZES = 3  # a curve of three numbers goes through any two points
WIDEST = 0.05  # an interval wider than this share of the scale, and than what a doubling has brought so far, says nothing
_GRID = np.geomspace(*EXPONENTS, 121)
_LINE_POINTS = 60


def nested(groups: Sequence[str], fractions: Sequence[float], seed: int) -> dict[float, list[int]]:
    """Fraction → places of the rows, each set holding the smaller ones; whole groups, in an order drawn by `seed`.

    A set has as many groups as come nearest to the fraction of the rows, at least one. Raises ValueError for fractions outside (0, 1].
    """
    if not fractions or any(not 0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions are {list(fractions)}; expected numbers above 0 and at most 1")
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    order = sorted(members, key=lambda group: (hash_of(seed, group), group))
    total = np.cumsum([len(members[group]) for group in order])  # rows in the first 1, 2, … groups
    sets: dict[float, list[int]] = {}
    for fraction in sorted(set(fractions)):
        count = 1 + int(np.argmin(np.abs(total - fraction * len(groups))))
        sets[fraction] = sorted(place for group in order[:count] for place in members[group])
    return sets


@dataclass(frozen=True, slots=True)
class Fit:
    """c − gap·(n/largest)^(−b) for a score, c + gap·(n/largest)^(−b) for a loss."""

    asymptote: float  # c: with endless data
    gap: float  # what the largest size lacks of it; a = gap · largest^b
    exponent: float  # b
    largest: int  # training rows
    lower_is_better: bool

    def at(self, rows: float) -> float:
        sign = 1.0 if self.lower_is_better else -1.0
        return float(self.asymptote + sign * self.gap * (rows / self.largest) ** -self.exponent)

    @property
    def doubled(self) -> float:
        """What twice the largest size brings; positive is better."""
        return float(self.gap * (1 - 2.0**-self.exponent))

    def to_dict(self) -> dict[str, float]:
        return {"c": self.asymptote, "a": self.gap * self.largest**self.exponent, "b": self.exponent}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the curve says, in the unit of the measure (fractions of a score, nats of a loss); positive gains are better."""

    gain: float | None  # of doubled data; None: no curve could be drawn
    low: float | None
    high: float | None
    trustworthy: bool
    reasons: tuple[str, ...]  # why not
    fit: Fit | None
    held_out: dict[str, float] | None  # the largest size: predicted from the smaller ones, its interval, observed
    line: tuple[dict[str, float], ...]  # rows, value, low, high: for drawing, up to twice the largest size


def fit_curve(rows: Sequence[int], values: Sequence[float], *, lower_is_better: bool = False) -> Fit:
    """The curve through (training rows, value) points, several to a size: least squares under soft-L1, so that one training gone wrong does not bend it.

    Raises ValueError where there are fewer than three sizes.
    """
    from scipy.optimize import least_squares  # slow to import

    n, y = np.asarray(rows, dtype=np.float64), np.asarray(values, dtype=np.float64)
    sizes = np.unique(n)
    if sizes.size < LEAST_SIZES:
        raise ValueError(f"{sizes.size} sizes; a curve of three numbers needs {LEAST_SIZES} at least")
    x, y = n / sizes[-1], -y if lower_is_better else y
    ceiling = 0.0 if lower_is_better else 1.0
    middles = np.array([np.median(y[n == size]) for size in sizes])
    weights = np.array([(n == size).sum() for size in sizes], dtype=np.float64)
    start = [float(part[0]) for part in _profile(sizes / sizes[-1], middles[None], weights, ceiling)]
    # Of the usual scatter, by the median of the deviations (1.4826 of it is a normal standard deviation): one that went wrong must not widen what is usual.
    noise = 1.4826 * float(np.median(np.abs(y - middles[np.searchsorted(sizes, n)])))
    bounds = ([-np.inf, 0.0, EXPONENTS[0]], [ceiling, np.inf, EXPONENTS[1]])
    start = [min(max(one, low + 1e-9), high - 1e-9) for one, low, high in zip(start, *bounds, strict=True)]
    found = least_squares(
        lambda p: p[0] - p[1] * x ** -p[2] - y, start, bounds=bounds, loss="soft_l1", f_scale=max(2 * noise, 5e-3), x_scale=[0.1, 0.1, 1.0]
    )
    c, gap, b = (float(one) for one in found.x)
    return Fit(-c if lower_is_better else c, gap, b, int(sizes[-1]), lower_is_better)


def _profile(x: Floats, values: Floats, weights: Floats, ceiling: float) -> tuple[Floats, Floats, Floats]:
    """(D, K) rising values at x (K,) → asymptote, gap, exponent (D,): for each exponent of a grid the other two have a closed form.

    With b fixed the problem is a line in z = x^(−b) under gap ≥ 0 and c ≤ ceiling, of which at most one binds. It draws a thousand curves in the time
    that scipy needs for a few; tests hold the two against each other.
    """
    z = x[None, :] ** -_GRID[:, None]  # (G, K)
    w = weights / weights.sum()
    z_mean, y_mean = z @ w, values @ w
    z_apart = z - z_mean[:, None]
    gap = -(values - y_mean[:, None]) @ (z_apart * w).T / (z_apart**2 @ w)  # (D, G)
    gap = np.maximum(gap, 0.0)
    c = y_mean[:, None] + gap * z_mean
    capped = np.maximum((ceiling - values) @ (z * w).T / (z**2 @ w), 0.0)
    gap, c = np.where(c > ceiling, capped, gap), np.minimum(c, ceiling)
    cost = np.zeros_like(gap)
    for size in range(x.size):
        cost += w[size] * (values[:, size, None] - c + gap * z[:, size]) ** 2
    best = cost.argmin(axis=1)
    every = np.arange(values.shape[0])
    return c[every, best], gap[every, best], _GRID[best]


def answer_curve(
    rows: Sequence[int], values: Sequence[float], drawn: Floats, *, lower_is_better: bool = False, confidence: float = 0.95, seed: int = 0
) -> Answer:
    """What doubling the data is worth.

    `rows`, `values`: (P,) training rows and value of each training; `drawn`: (draws, P) their values on drawn validation rows (`row_draws`).
    """
    sizes = sorted(set(rows))
    if len(sizes) < LEAST_SIZES:
        reason = f"{len(sizes)} {'size' if len(sizes) == 1 else 'sizes'} measured, and a curve needs {LEAST_SIZES} at least"
        return Answer(None, None, None, False, (reason,), None, None, ())
    fit = fit_curve(rows, values, lower_is_better=lower_is_better)
    names, means = seed_draws(drawn, list(rows), confidence=confidence, seed=seed)
    order = [names.index(size) for size in sizes]
    rising = (-1.0 if lower_is_better else 1.0) * means[:, order]  # (draws, K)
    x = np.asarray(sizes, dtype=np.float64) / sizes[-1]
    weights = np.array([list(rows).count(size) for size in sizes], dtype=np.float64)
    ceiling = 0.0 if lower_is_better else 1.0
    c, gap, b = _profile(x, rising, weights, ceiling)
    low, high = interval(gap * (1 - 2.0**-b), confidence)
    low, high = min(low, fit.doubled), max(high, fit.doubled)
    held_out = _held_out(x, rising, weights, ceiling, confidence)
    scale = abs(fit.at(sizes[-1])) if lower_is_better else 1.0
    reasons = [
        *_thin(rows, values, lower_is_better),
        *_not_monotone(sizes, rising, confidence),
        *_at_bound(fit, rising, confidence),
        *_missed(held_out),
        *_wide(low, high, scale=scale, so_far=float((rising[:, -1] - rising[:, 0]).mean() / np.log2(sizes[-1] / sizes[0]))),
    ]
    if held_out is not None and lower_is_better:
        held_out = {**{key: -value for key, value in held_out.items()}, "low": -held_out["high"], "high": -held_out["low"]}
    line = _line(fit, sizes, (c, gap, b), lower_is_better, confidence)
    return Answer(fit.doubled, low, high, not reasons, tuple(reasons), fit, held_out, line)


def _line(
    fit: Fit, sizes: Sequence[int], drawn: tuple[Floats, Floats, Floats], lower_is_better: bool, confidence: float
) -> tuple[dict[str, float], ...]:
    """The curve and its band from the smallest size to twice the largest."""
    c, gap, b = drawn
    points = []
    for n in np.geomspace(sizes[0], 2 * sizes[-1], _LINE_POINTS):
        curves = c - gap * (n / sizes[-1]) ** -b
        low, high = interval(-curves if lower_is_better else curves, confidence)
        points.append({"rows": float(n), "value": fit.at(n), "low": low, "high": high})
    return tuple(points)


# ------------------------------------------------------------------------------------------------ when not to believe it


def _thin(rows: Sequence[int], values: Sequence[float], lower_is_better: bool) -> list[str]:
    counts = [list(rows).count(size) for size in set(rows)]
    reasons = []
    if max(counts) < 2:
        reasons.append("one training a size: how far seeds scatter is not known")
    if not lower_is_better and max(values) <= 0:
        reasons.append("every training scored 0: there is nothing yet to draw a curve through")
    return reasons


def _not_monotone(sizes: Sequence[int], rising: Floats, confidence: float) -> list[str]:
    """Neighbouring sizes of which the larger is worse, beyond what rows and seeds explain (Bonferroni over the pairs)."""
    level = 1 - (1 - confidence) / (len(sizes) - 1)
    for index, (smaller, larger) in enumerate(pairwise(sizes)):
        if interval(rising[:, index + 1] - rising[:, index], level)[1] < 0:
            return [f"{larger} rows did worse than {smaller}, beyond noise: the curve does not rise steadily"]
    return []


def _at_bound(fit: Fit, rising: Floats, confidence: float) -> list[str]:
    """An exponent at its bound is no estimate. Where the sizes do not differ beyond noise there is no bend to find, and the gap is small, too."""
    if interval(rising[:, -1] - rising[:, 0], confidence)[0] <= 0:
        return []
    low, high = EXPONENTS
    if low * 1.02 < fit.exponent < high / 1.02:
        return []
    bend = "does not bend" if fit.exponent < 1 else "bends faster than these sizes can show"
    return [f"the exponent lies at its bound ({fit.exponent:.2g}): the curve {bend}"]


def _held_out(x: Floats, rising: Floats, weights: Floats, ceiling: float, confidence: float) -> dict[str, float] | None:
    """The largest size predicted from the smaller ones; None where too few are left."""
    if x.size - 1 < LEAST_SIZES:
        return None
    c, gap, _ = _profile(x[:-1], rising[:, :-1], weights[:-1], ceiling)
    error_low, error_high = interval(rising[:, -1] - (c - gap), confidence)
    predicted, observed = float(np.median(c - gap)), float(rising[:, -1].mean())
    return {"predicted": predicted, "observed": observed, "low": observed - error_high, "high": observed - error_low}


def _missed(held_out: Mapping[str, float] | None) -> list[str]:
    if held_out is None or held_out["low"] <= held_out["observed"] <= held_out["high"]:
        return []
    return ["the smaller sizes do not predict the largest one: the data do not follow such a curve"]


def _wide(low: float, high: float, *, scale: float, so_far: float) -> list[str]:
    """`so_far`: what a doubling brought on average over the measured sizes."""
    if high - low <= max(WIDEST * scale, so_far):
        return []
    return ["the interval is too wide to plan with: more seeds or more validation rows would narrow it"]


def to_json(answer: Answer) -> dict[str, Any]:
    """What curve.json holds of an answer."""
    return {
        "gain": answer.gain, "low": answer.low, "high": answer.high, "trustworthy": answer.trustworthy, "reasons": list(answer.reasons),
        "fit": None if answer.fit is None else answer.fit.to_dict(), "held_out": answer.held_out, "line": list(answer.line),
    }  # fmt: skip
