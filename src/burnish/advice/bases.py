"""Which base model? The smallest one that nobody can show to be worse than the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.advice.rules import CANT_TELL, FINE_TUNE, NO
from burnish.types import Verdict


def choose_base(rows: Sequence[Mapping[str, Any]], paired: Mapping[str, Any]) -> dict[str, Any]:
    """`rows`: one for each base, with its score `after` a probe (or `before` only), weights_gb and verdict; `paired`: what `evaluation.weigh_runs` returned.

    Returns base, verdict and sentence. The verdict is that of the base that is recommended.
    """
    scored = [row for row in rows if _score(row) is not None]
    if not scored:
        return {"base": None, "verdict": CANT_TELL, "sentence": "Can't tell which base to take: none of them could be scored."}
    best = max(scored, key=lambda row: _score(row) or 0.0)
    worse = {pair["baseline"] for pair in paired["pairs"] if pair["candidate"] == best["base"] and pair["verdict"] == Verdict.BETTER}
    as_good = [row for row in scored if row["base"] not in worse]
    chosen = min(as_good, key=lambda row: (row["weights_gb"], -(_score(row) or 0.0)))
    state = "after a probe" if chosen["after"] is not None else "untrained"
    text = (
        f"Take {chosen['base']}: {_percent(_score(chosen))} {state}, {chosen['weights_gb']:.2f} GB of weights, licence {chosen['licence']}"
    )
    if chosen is not best:
        text += f"; {best['base']} scores {_percent(_score(best))}, but nobody can show that it is better on these rows"
    if small := paired.get("small_tuned_against_large"):
        gain = f"{100 * small['difference']:+.1f} points [{100 * small['low']:+.1f}, {100 * small['high']:+.1f}]"
        text += f". The smallest base, tuned, against the largest, untrained: {gain}, {small['verdict']}"
    if chosen["verdict"] == NO:
        text += (
            ". None of the bases is worth fine-tuning as it stands: a larger one is needed" if all(r["verdict"] == NO for r in rows) else ""
        )
    elif chosen["verdict"] != FINE_TUNE:
        text += f". The advice on it is *{chosen['verdict']}*"
    return {"base": chosen["base"], "verdict": chosen["verdict"], "sentence": text + "."}


def _score(row: Mapping[str, Any]) -> float | None:
    value = row["after"] if row["after"] is not None else row["before"]
    return None if value is None else float(value)


def _percent(value: float | None) -> str:
    return "no score" if value is None else f"{100 * value:.1f} %"
