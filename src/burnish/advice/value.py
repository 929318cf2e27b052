"""Which training rows help and which hurt: a ranking from several signals, and the proof that it is worth something.

The rule, in one sentence: each signal puts the rows in order, and a row's badness is the mean of its places (as shares from 0, best, to 1, worst) over the
signals that tell the rows apart. Places and not values, because nats, cosines and shares have no common unit; no weights, because any would have to be
tuned on rows whose truth is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.advice.draws import interval, seed_draws
from burnish.advice.neighbours import Neighbours
from burnish.tasks import verdict
from burnish.types import Verdict

Floats = NDArray[np.float64]
KEPT, RANDOM = "kept", "random"
STANDS_OUT = 0.8  # share of the rows that must be better for a signal to be named as a reason


@dataclass(frozen=True, slots=True)
class Signals:
    """One entry a row, in order."""

    held_out_loss: Floats  # nats per target token under models that were trained on the other folds
    base_loss: Floats  # the same under the untrained model
    gradient: Floats | None  # mean cosine with the gradients of validation rows; None where it was not measured
    neighbours: Neighbours


# Signal → its values with the worst highest; None: not there.
SIGNALS: dict[str, Callable[[Signals], Floats | None]] = {
    "held_out_loss": lambda signals: signals.held_out_loss,  # hard to predict from the other rows
    "not_learnt": lambda signals: signals.held_out_loss - signals.base_loss,  # the other rows make it no likelier, or less likely
    "disagreement": lambda signals: signals.neighbours.disagreement,  # its nearest rows answer otherwise
    "gradient": lambda signals: None if signals.gradient is None else -signals.gradient,  # a step on it raises the validation loss
    "duplicate": lambda signals: signals.neighbours.duplicate,  # says what another row has said
}


def places(values: Floats) -> Floats | None:
    """(n,) shares from 0 (lowest) to 1 (highest), ties in the middle of their places, unknown rows (nan) at 0.5. None: nothing is told apart."""
    from scipy.stats import rankdata  # slow to import

    known = np.isfinite(values)
    if known.sum() < 2 or np.ptp(values[known]) == 0:
        return None
    shares = np.full(values.shape, 0.5)
    shares[known] = (rankdata(values[known]) - 1) / (known.sum() - 1)
    return shares


def rank_rows(signals: Signals) -> tuple[Floats, dict[str, Floats]]:
    """(n,) badness from 0 to 1, and the places by signal that it is the mean of."""
    found: dict[str, Floats] = {}
    for name, read in SIGNALS.items():
        values = read(signals)
        shares = None if values is None else places(np.asarray(values, dtype=np.float64))
        if shares is not None:
            found[name] = shares
    count = len(signals.held_out_loss)
    return (np.mean(list(found.values()), axis=0) if found else np.full(count, 0.5)), found


def kept_rows(badness: Floats, drop: float) -> list[int]:
    """Places of the rows that stay when the worst share `drop` goes, in their old order; of equal rows the later ones go."""
    count = round(drop * len(badness))
    worst = sorted(range(len(badness)), key=lambda place: (-badness[place], -place))[:count]
    return sorted(set(range(len(badness))) - set(worst))


def reasons(place: int, signals: Signals, by_signal: Mapping[str, Floats], sources: Sequence[str]) -> list[str]:
    """In words, what stands out about a row; the worst first."""
    order = sorted((name for name in by_signal if by_signal[name][place] >= STANDS_OUT), key=lambda name: -by_signal[name][place])
    near, loss, base = signals.neighbours, signals.held_out_loss, signals.base_loss
    differing, total = near.differing[place]
    twin = near.twin[place]
    say = {
        "held_out_loss": lambda: f"hard to predict from the other rows: loss {loss[place]:.2f} nats per token, middle row {np.median(loss):.2f}",
        "not_learnt": lambda: f"the other rows do not make its answer likelier: loss {base[place]:.2f} before training on them, {loss[place]:.2f} after",
        "disagreement": lambda: f"{differing} of the {total} nearest rows answer otherwise" + (f", most: {near.majority[place]}" if near.majority[place] else ""),
        "gradient": lambda: f"a step on it {'raises the loss of' if _at(signals.gradient, place) < 0 else 'hardly helps'} the validation rows: cosine {_at(signals.gradient, place):+.3f}",
        "duplicate": lambda: f"nearly the same as {sources[twin]} ({100 * near.duplicate[place]:.0f} % alike), with the same answer" if twin is not None else "",
    }  # fmt: skip
    return [text for name in order if (text := say[name]())]


def _at(values: Floats | None, place: int) -> float:
    return float("nan") if values is None else float(values[place])


# ------------------------------------------------------------------------------------------------------------- the proof


@dataclass(frozen=True, slots=True)
class Proof:
    """Training on the kept rows against training on as many random ones, on the same validation rows; positive is better."""

    difference: float
    low: float
    high: float
    p_value: float
    verdict: Verdict
    kept: float  # mean value over the seeds
    random: float


def judge_kept(
    arms: Sequence[str], values: Sequence[float], drawn: Floats, *, lower_is_better: bool = False, confidence: float = 0.95, seed: int = 0
) -> Proof:
    """`arms`: KEPT or RANDOM of each training; `drawn`: (draws, trainings) their values on drawn validation rows (`row_draws`).

    The p-value is twice the share of draws on the wrong side of 0, never 0. With one seed an arm nothing is known of how seeds scatter: CAN'T TELL.
    """
    means = {arm: float(np.mean([value for value, own in zip(values, arms, strict=True) if own == arm])) for arm in (KEPT, RANDOM)}
    sign = -1.0 if lower_is_better else 1.0
    names, by_arm = seed_draws(drawn, list(arms), confidence=confidence, seed=seed)
    apart = sign * (by_arm[:, names.index(KEPT)] - by_arm[:, names.index(RANDOM)])
    low, high = interval(apart, confidence)
    difference = sign * (means[KEPT] - means[RANDOM])
    wrong = min(int((apart <= 0).sum()), int((apart >= 0).sum()))
    p_value = min(1.0, 2 * (1 + wrong) / (1 + apart.size))
    few = min(list(arms).count(arm) for arm in (KEPT, RANDOM)) < 2
    said = Verdict.CANT_TELL if few else verdict(difference, low, high, p_value, 1 - confidence)
    return Proof(difference, low, high, p_value, said, means[KEPT], means[RANDOM])


def to_json(proof: Proof) -> dict[str, Any]:
    """What value.json holds of a proof."""
    return {
        "difference": proof.difference, "low": proof.low, "high": proof.high, "p_value": proof.p_value, "verdict": str(proof.verdict),
        "kept": proof.kept, "random": proof.random,
    }  # fmt: skip
