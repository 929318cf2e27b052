"""What was forgotten? The base and the tuned model on the same rows of each suite → KEPT, LOST or CAN'T TELL, for each suite and in all.

A change is a fraction and negative where something was lost: points of a score between 0 and 1, or a share of the base's bits per byte. The whole is the mean over the
suites, each with the same weight, however many rows it has.

    LOST          p < alpha after Holm over all suites and the whole, and the interval lies wholly below 0 (the whole: also where a suite is LOST)
    KEPT          not LOST, and the interval excludes a loss of more than the margin
    CAN'T TELL    neither: with the loss that so many rows would show
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.run import hash_of
from burnish.tasks import bootstrap_interval, compare, detectable_difference, holm, sign_flip_test
from burnish.types import Verdict

Floats = NDArray[np.float64]

# A loss this large is worth knowing of where nobody said how much may be lost (`retain.max_drop`): 5 points, or 5 % more bits.
MARGIN = 0.05


class Kept(StrEnum):
    KEPT = "KEPT"
    LOST = "LOST"
    CANT_TELL = str(Verdict.CANT_TELL)


class Gate(StrEnum):
    PASSED = "PASSED"
    FAILED = "FAILED"
    CANT_TELL = str(Verdict.CANT_TELL)


@dataclass(frozen=True, slots=True)
class Pair:
    """One suite under two models: values of the same rows in the same order."""

    suite: str
    title: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    lower_is_better: bool = False
    unit: str | None = None

    @property
    def binary(self) -> bool:
        return not self.lower_is_better and set(self.before) | set(self.after) <= {0.0, 1.0}

    @property
    def sides(self) -> tuple[Floats, Floats]:
        """(before, after) as fractions of which more is better."""
        before, after = np.asarray(self.before, dtype=np.float64), np.asarray(self.after, dtype=np.float64)
        if not self.lower_is_better:
            return before, after
        scale = float(before.mean())
        return -before / scale, -after / scale

    @property
    def changes(self) -> Floats:
        before, after = self.sides
        return after - before


def halves(items: Sequence[str]) -> tuple[frozenset[str], frozenset[str]]:
    """(to choose on, to report on): every second item, in the order of a hash of its own, so that neither order nor content decides."""
    ordered = sorted(items, key=lambda item: hash_of("half", item))
    return frozenset(ordered[::2]), frozenset(ordered[1::2])


def change_interval(pairs: Sequence[Pair], *, confidence: float, resamples: int, seed: int) -> tuple[float, float, float]:
    """(change, low, high) of the mean over the suites: rows are drawn within each suite (stratified percentile bootstrap)."""
    draws = mean_draws([pair.changes for pair in pairs], resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    unseen = float(np.mean([_unseen(pair.changes, confidence) for pair in pairs])) if low == high == 0 else 0.0
    return float(np.mean([pair.changes.mean() for pair in pairs])), float(low) - unseen, float(high) + unseen


def mean_draws(parts: Sequence[Floats], *, resamples: int, seed: int) -> Floats:
    """Bootstrap draws (resamples,) of the mean over the parts of each part's mean. The same seed draws the same rows of parts of the same sizes."""
    total = np.zeros(resamples)
    for number, part in enumerate(parts):
        random = np.random.default_rng([seed, number])
        step = max(1, 4_000_000 // part.size)
        for start in range(0, resamples, step):
            rows = random.integers(0, part.size, size=(min(step, resamples - start), part.size))
            total[start : start + step] += part[rows].mean(axis=1)
    return total / len(parts)


def _unseen(changes: Floats, confidence: float) -> float:
    """The share of rows that may change where none of n did: 1 − alpha^(1/n), about 3 ÷ n ("rule of three", Hanley & Lippman-Hand 1983). Else 0."""
    return 1 - (1 - confidence) ** (1 / changes.size) if not changes.any() else 0.0


def judge_retention(
    pairs: Sequence[Pair], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0, margin: float | None = None
) -> dict[str, Any]:
    """What retain.json says of base and tuned: each suite, the whole, the verdict and the margin."""
    if not pairs:
        raise ValueError("no suites: nothing to judge")
    margin = MARGIN if margin is None else margin
    rows = [_suite(pair, confidence=confidence, resamples=resamples, seed=seed, comparisons=len(pairs) + 1) for pair in pairs]
    whole = _whole(pairs, confidence=confidence, resamples=resamples, seed=seed)
    adjusted = holm([row["p_value"] for row in (*rows, whole)])
    for row, p in zip((*rows, whole), adjusted, strict=True):
        row["p_adjusted"] = p
        row["verdict"] = str(_verdict(row, 1 - confidence, margin))
    lost = any(row["verdict"] == Kept.LOST for row in rows)
    if lost:
        whole["verdict"] = str(Kept.LOST)
    return {"confidence": confidence, "margin": margin, "suites": rows, "whole": whole, "verdict": whole["verdict"]}


def judge_gate(
    pairs: Sequence[Pair], max_drop: float, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Whether more than `max_drop` was lost, by intervals that hold for all suites and the whole together (Bonferroni).

    FAILED: of a suite or of the whole, even the better end of the interval is a loss above `max_drop`. PASSED: none is, and even the worse end of the whole's is within
    it. Else CAN'T TELL. Bounds and not the estimate: a gate that noise opens and closes is none (a test of non-inferiority on the one side, of inferiority on the other).
    """
    sure = 1 - (1 - confidence) / (len(pairs) + 1)
    named = {pair.suite: _interval(pair, sure, resamples, seed) for pair in pairs}
    _, low, high = change_interval(pairs, confidence=sure, resamples=resamples, seed=seed)
    failed = [name for name, (_, best) in named.items() if best < -max_drop] + (["the mean over the suites"] if high < -max_drop else [])
    state = Gate.FAILED if failed else Gate.PASSED if low >= -max_drop else Gate.CANT_TELL
    allowed = f"{100 * max_drop:g} points may be lost"
    reasons = {
        Gate.FAILED: f"{', '.join(failed)} lost more, even at the better end of the interval",
        Gate.PASSED: f"even at the worse end of its interval the mean over the suites changed by {100 * low:+.1f}",
        Gate.CANT_TELL: f"the mean over the suites may have changed by {100 * low:+.1f} or by {100 * high:+.1f}: more rows (--rows) would tell",
    }
    return {
        "max_drop": max_drop,
        "state": str(state),
        "low": low,
        "high": high,
        "failed": failed,
        "sentence": f"{state}: {allowed}; {reasons[state]}",
    }


def retention_sentence(content: Mapping[str, Any]) -> str:
    """The verdict as a person would say it, with its numbers."""
    whole, rows = content["whole"], content["suites"]
    numbers = f"{points(whole['change'])} points on average over {len(rows)} suite{'s' * (len(rows) > 1)} [{points(whole['low'])}, {points(whole['high'])}]"
    lost = [f"{row['suite']} ({points(row['change'])})" for row in rows if row["verdict"] == Kept.LOST]
    if content["verdict"] == Kept.LOST:
        return f"The tuned model has forgotten something: {numbers}" + (f"; lost in {', '.join(lost)}." if lost else ".")
    if content["verdict"] == Kept.KEPT:
        return f"The tuned model has kept what it could: {numbers}, no loss beyond {100 * content['margin']:g} points."
    shown = whole["detectable"]
    hint = f"; so many rows show a change of about {100 * shown:.1f} points" if shown is not None else ""
    return f"Can't tell whether the tuned model has forgotten anything: {numbers}{hint}."


def points(fraction: float) -> str:
    return f"{100 * fraction:+.1f}"


def _suite(pair: Pair, *, confidence: float, resamples: int, seed: int, comparisons: int) -> dict[str, Any]:
    before, after = pair.sides
    found = compare(after, before, binary=pair.binary, confidence=confidence, resamples=resamples, seed=seed)
    unseen = _unseen(pair.changes, confidence)
    return {
        "suite": pair.suite,
        "title": pair.title,
        "unit": pair.unit,
        "n": len(pair.before),
        "before": float(np.mean(pair.before)),
        "after": float(np.mean(pair.after)),
        "change": found.difference,
        "low": found.low - unseen,
        "high": found.high + unseen,
        "p_value": found.p_value,
        "detectable": _detectable(pair.changes, before, pair.binary, confidence, comparisons),
    }


def _whole(pairs: Sequence[Pair], *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    change, low, high = change_interval(pairs, confidence=confidence, resamples=resamples, seed=seed)
    # Each row weighs what it weighs in the mean over the suites; were the models alike, any of these could have the other sign.
    weighted = np.concatenate([pair.changes / (len(pairs) * pair.changes.size) for pair in pairs])
    p_value = sign_flip_test(weighted, np.zeros_like(weighted), resamples=resamples, seed=seed)
    error = math.sqrt(sum(float(pair.changes.var(ddof=1)) / pair.changes.size if pair.changes.size > 1 else 1.0 for pair in pairs)) / len(
        pairs
    )
    shown = detectable_difference(1, confidence=confidence, spread=min(1.0, error), comparisons=len(pairs) + 1) if error > 0 else None
    return {
        "suite": None, "title": "mean over the suites", "unit": None, "n": int(weighted.size), "before": None, "after": None,
        "change": change, "low": low, "high": high, "p_value": p_value, "detectable": shown,
    }  # fmt: skip


def _detectable(changes: Floats, before: Floats, binary: bool, confidence: float, comparisons: int) -> float | None:
    """From how much the rows' changes were seen to vary; where no row changed, from what right/wrong rows do at worst."""
    spread = float(changes.std(ddof=1)) if changes.size > 1 else 1.0
    if spread > 0:
        return detectable_difference(changes.size, confidence=confidence, spread=min(1.0, spread), comparisons=comparisons)
    if not binary:
        return None
    rate = float(before.mean())  # a loss from p looks like a gain over 1 − p
    return detectable_difference(changes.size, confidence=confidence, baseline=1 - rate, comparisons=comparisons)


def _interval(pair: Pair, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    if pair.changes.size == 1:
        return -1.0, 1.0
    low, high = bootstrap_interval(pair.changes, confidence=confidence, resamples=resamples, seed=seed)
    unseen = _unseen(pair.changes, confidence)
    return low - unseen, high + unseen


def _verdict(row: Mapping[str, Any], alpha: float, margin: float) -> Kept:
    if row["p_adjusted"] < alpha and row["high"] < 0:
        return Kept.LOST
    return Kept.KEPT if row["low"] > -margin and row["n"] > 1 else Kept.CANT_TELL
