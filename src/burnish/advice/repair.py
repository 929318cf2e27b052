"""Which point between task and retention? Chosen on rows made for choosing, told on rows that nothing was chosen on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.advice.retain import Pair, mean_draws

Floats = NDArray[np.float64]

ENOUGH_GAIN = 0.95  # of what fine-tuning brought
BASE, TUNED = "base", "tuned"
RULE = (
    f"Of the points that keep at least {100 * ENOUGH_GAIN:.0f} % of the gain in the task, the one that lost least. Where none of these lost less than the tuned model: the point with "
    "the best trade-off, the share of the gain that it keeps minus the share of the loss that it keeps (0 for the tuned model and for the base). Where that is not above 0: "
    "the tuned model itself. Chosen on validation rows and on one half of the rows of the suites."
)
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Point:
    """A model on rows for choosing: what it scores in the task (more is better), and by how much it changed in the suites (negative: lost)."""

    name: str
    task: float
    change: float


def choose(points: Sequence[Point]) -> dict[str, Any]:
    """The chosen point's name, why, and what each point keeps of gain and loss. `base` and `tuned` must be among the points."""
    named = {point.name: point for point in points}
    base, tuned = named[BASE], named[TUNED]
    gain, loss = tuned.task - base.task, -tuned.change
    kept = {point.name: _shares(point, base, gain, loss) for point in points}
    found = {"gain": gain, "loss": loss, "kept": kept, "rule": RULE}
    if gain <= _LEAST:
        return {**found, "chosen": TUNED, "why": "the tuned model gained nothing on the validation rows: there is no gain to keep"}
    if loss <= _LEAST:
        return {**found, "chosen": TUNED, "why": "the tuned model lost nothing on the rows for choosing: there is nothing to repair"}
    others = [point for point in points if point.name not in (BASE, TUNED)]
    enough = [point for point in others if (kept[point.name]["gain"] or 0.0) >= ENOUGH_GAIN and point.change > tuned.change]
    if enough:
        best = max(enough, key=lambda point: (point.change, point.task))
        return {
            **found,
            "chosen": best.name,
            "why": f"keeps {_percent(kept[best.name]['gain'])} of the gain with {_percent(kept[best.name]['loss'])} of the loss, the least of all that keep enough",
        }
    best = max(others, key=lambda point: (_trade(kept[point.name]), point.task), default=tuned)
    if _trade(kept[best.name]) > 0:
        return {
            **found,
            "chosen": best.name,
            "why": f"nothing keeps {_percent(ENOUGH_GAIN)} of the gain with less loss; the best trade-off keeps {_percent(kept[best.name]['gain'])} with {_percent(kept[best.name]['loss'])} of the loss",
        }
    return {**found, "chosen": TUNED, "why": "no point is a better trade-off than the tuned model"}


def next_scale(kept: Mapping[float, float], closest: float = 0.05) -> float | None:
    """Where to look next for the smallest scale that keeps enough: half way between the smallest that was seen to and the next below it (0: the base).

    `kept`: the share of the gain at each scale that was measured. None where the two are closer than `closest`, or none keeps enough.
    """
    enough = [scale for scale, share in kept.items() if share >= ENOUGH_GAIN and 0 < scale <= 1]
    if not enough:
        return None
    high = min(enough)
    low = max([0.0, *(scale for scale in kept if scale < high)])
    return round((low + high) / 2, 4) if high - low > closest else None


def compare_points(
    task: tuple[Sequence[float], Sequence[float], Sequence[float]],
    retained: tuple[Sequence[Pair], Sequence[Pair]],
    *,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """What a point keeps of the gain and of the loss, each with an interval, on rows that nothing was chosen on.

    `task`: values of the same rows by base, tuned and the point. `retained`: base → tuned and base → point on the same rows. Ratios of paired differences, by bootstrap; an
    interval is None where the denominator is not clearly above 0 (more than 2.5 % of its draws are not): then the share says nothing.
    """
    base, tuned, point = (np.asarray(values, dtype=np.float64) for values in task)
    gains = [np.asarray(part, dtype=np.float64) for part in (tuned - base, point - base)]
    losses = [[-pair.changes for pair in pairs] for pairs in retained]
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    gain = _ratio([mean_draws([part], **options) for part in gains], [float(part.mean()) for part in gains], confidence)
    loss = _ratio(
        [mean_draws(parts, **options) for parts in losses],
        [float(np.mean([part.mean() for part in parts])) for parts in losses],
        confidence,
    )
    return {"gain_kept": gain, "loss_kept": loss}


def _ratio(draws: list[Floats], values: list[float], confidence: float) -> dict[str, float | None]:
    """second ÷ first, {value, low, high}."""
    whole, part = draws
    if values[0] <= _LEAST:
        return {"value": None, "low": None, "high": None}
    found: dict[str, float | None] = {"value": values[1] / values[0], "low": None, "high": None}
    if float((whole <= _LEAST).mean()) <= 0.025:
        usable = whole > _LEAST
        tail = (1 - confidence) / 2
        low, high = np.quantile(part[usable] / whole[usable], [tail, 1 - tail])
        found |= {"low": float(low), "high": float(high)}
    return found


def _shares(point: Point, base: Point, gain: float, loss: float) -> dict[str, float | None]:
    return {"gain": (point.task - base.task) / gain if gain > _LEAST else None, "loss": -point.change / loss if loss > _LEAST else None}


def _trade(kept: dict[str, float | None]) -> float:
    return (kept["gain"] or 0.0) - (kept["loss"] or 0.0)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
