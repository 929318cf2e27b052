"""Should you fine-tune? From everything that was weighed to one piece of advice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.advice.rules import CANT_TELL, FINE_TUNE, MORE_DATA, NO, OF_USE, PROMPT, RETRIEVE, RULES, Facts, Rule
from burnish.types import Advice, Verdict

SENTENCES = {
    FINE_TUNE: "Fine-tune",
    PROMPT: "Don't fine-tune: prompt",
    RETRIEVE: "Don't fine-tune: look it up (retrieve)",
    MORE_DATA: "Get more data first",
    NO: "Don't fine-tune this model",
    CANT_TELL: "Can't tell yet whether to fine-tune",
}


def decide(
    weighed: Mapping[str, Any], *, probe: Mapping[str, Any] | None, target: float | None = None, of_use: float = OF_USE,
    price_per_hour: float | None = None,
) -> tuple[Advice, list[dict[str, Any]]]:  # fmt: skip
    """The advice, and every rule with whether it held. `weighed`: what `evaluation.weigh` returns; `probe`: of the training that was measured
    (steps, seconds, epochs, planned_steps and planned_seconds of the whole training, whole: whether it was the whole one); None: nothing was trained."""
    facts = facts_from(weighed, target=target, of_use=of_use)
    found = [(rule, rule.holds(facts)) for rule in RULES]
    rule, reason = next((rule, reason) for rule, reason in found if reason is not None)  # the last rule always holds
    costs = costs_of(facts, probe, price_per_hour)
    advice = Advice(
        verdict=rule.verdict,
        sentence=f"{SENTENCES[rule.verdict]}: {reason}.",
        reason=reason,
        rule=rule.asks,
        would_change=tuple(would_change(facts, rule.verdict, probe, costs)),
        costs=costs,
    )
    table = [
        {"verdict": r.verdict, "asks": r.asks, "source": r.source, "holds": text is not None, "decided": r is rule} for r, text in found
    ]
    return advice, table


def facts_from(weighed: Mapping[str, Any], *, target: float | None, of_use: float) -> Facts:
    return Facts(
        scores={row["name"]: row for row in weighed["candidates"]},
        best=weighed["best"],
        pairs={(pair["candidate"], pair["baseline"]): pair for pair in weighed["pairs"]},
        train_rows=weighed["train_rows"],
        test_rows=weighed["test_rows"],
        detectable=weighed["detectable_difference"],
        target=target,
        of_use=of_use,
    )


def costs_of(facts: Facts, probe: Mapping[str, Any] | None, price_per_hour: float | None) -> dict[str, Any]:
    """Training once against answering many times: after how many requests a training has paid for itself.

    Local costs are measured seconds at the stated price; without one only seconds are told. `break_even_requests` is None with the reason beside
    it where training never pays by cost alone.
    """
    seconds = None if probe is None else float(probe["planned_seconds"])
    training = None if seconds is None or price_per_hour is None else seconds / 3600 * price_per_hour
    costs: dict[str, Any] = {
        "price_per_hour": price_per_hour,
        "training_seconds": None if seconds is None else round(seconds, 1),
        "training_cost": None if training is None else round(training, 6),
        "break_even_requests": None,
        "break_even_against": None,
        "break_even_reason": None,
    }
    tuned = facts.best.get("tuned")
    others = [facts.best[family] for family in ("larger", "prompt", "retrieve") if family in facts.best]
    if tuned is None or not others:
        return costs | {"break_even_reason": "there is no trained candidate to compare the cost of"}
    # What somebody would use instead: the best that needs no training of ours.
    other = max(others, key=lambda name: facts.scores[name]["score"])
    ours, theirs = facts.scores[tuned]["cost_per_1000"], facts.scores[other]["cost_per_1000"]
    costs["break_even_against"] = other
    if training is None or ours is None or theirs is None:
        return costs | {"break_even_reason": "no price is stated (evaluation.price_per_hour; price_in and price_out of an endpoint)"}
    if ours >= theirs:
        return costs | {"break_even_reason": "an answer of the tuned model costs no less, so training does not pay by cost alone"}
    return costs | {"break_even_requests": int(1000 * training / (theirs - ours)) + 1}


def would_change(facts: Facts, verdict: str, probe: Mapping[str, Any] | None, costs: Mapping[str, Any]) -> list[str]:
    """What would turn the decision, or was not looked at."""
    tuned, best = facts.best.get("tuned"), facts.untrained
    lines: list[str] = []
    pair = facts.gain(tuned, best) if tuned is not None and best is not None else None
    if pair is not None and best is not None:
        title = facts.scores[best]["title"]
        if verdict == FINE_TUNE:
            lines.append(f"a way without training that scores {100 * pair['low']:.1f} points more than {title} does would be as good")
        elif pair["verdict"] != Verdict.BETTER:
            need = max(0.0, facts.worth_having - pair["difference"])
            if tuned is not None and facts.scores[tuned]["score"] + need <= 1:
                lines.append(f"a training that scores {100 * need:.1f} points more than the one tried would be worth having")
    if probe is None:
        lines.append("a short training was not tried: a larger --budget tries one")
    elif not probe["whole"]:
        share = probe["epochs"] / probe["planned_epochs"] if probe["planned_epochs"] else 1.0
        lines.append(
            f"the training tried was {probe['steps']} of {probe['planned_steps']} planned steps ({100 * share:.0f} %): the whole one may score more"
        )
    if facts.detectable is not None and verdict in (CANT_TELL, MORE_DATA):
        rows = _rows_for(facts, pair)
        lines.append(
            f"about {rows:,} test rows would show the difference seen here" if rows else "more test rows would show smaller differences"
        )
    if "larger" not in facts.best:
        lines.append("no larger model was measured (evaluation.endpoint)")
    if "rag" not in facts.scores:
        lines.append("no documents were given to look things up in (data.documents)")
    if costs.get("break_even_requests"):
        lines.append(f"fewer than {costs['break_even_requests']:,} requests would not pay for the training")
    return lines


def _rows_for(facts: Facts, pair: Mapping[str, Any] | None) -> int | None:
    """Test rows with which the difference seen would be detectable: it shrinks with the square root of the rows."""
    if pair is None or facts.detectable is None or abs(pair["difference"]) < 0.005 or abs(pair["difference"]) >= facts.detectable:
        return None
    return int(facts.test_rows * (facts.detectable / abs(pair["difference"])) ** 2)


__all__ = ["Rule", "costs_of", "decide", "facts_from", "would_change"]
