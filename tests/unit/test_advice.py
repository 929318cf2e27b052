"""The rules of `decide` on made-up numbers: each verdict has a case, and each case turns when its reason goes."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.advice import RULES, choose_base, decide
from burnish.advice.decide import costs_of, facts_from
from burnish.types import Verdict

FAMILY = {"base": "prompt", "few_shot": "prompt", "neighbours": "retrieve", "rag": "retrieve", "endpoint": "larger", "tuned": "tuned"}
PROBE = {
    "steps": 50, "planned_steps": 100, "whole": False, "epochs": 1.0, "planned_epochs": 2.0, "seconds": 60.0, "planned_seconds": 120.0,
}  # fmt: skip


def weighed(
    scores: dict[str, float], *, half: float = 0.06, test_rows: int = 200, train_rows: int = 2000, detectable: float | None = 0.1
) -> dict[str, Any]:
    """Every pair of what `weigh` compares, each difference with an interval of ± half; BETTER or WORSE where it leaves out 0."""
    scores = {**scores, "constant": scores.get("constant", 0.0)}
    best: dict[str, str] = {}
    for name, score in scores.items():
        if name != "constant" and (FAMILY[name] not in best or score > scores[best[FAMILY[name]]]):
            best[FAMILY[name]] = name
    pairs = [(best["tuned"], name) for name in scores if name not in ("constant", best["tuned"])] if "tuned" in best else []
    pairs += [
        (best[a], best[b]) for a, b in (("retrieve", "prompt"), ("larger", "prompt"), ("larger", "retrieve")) if a in best and b in best
    ]
    pairs += [(name, "constant") for name in best.values()]

    def pair(a: str, b: str) -> dict[str, Any]:
        difference = scores[a] - scores[b]
        verdict = Verdict.BETTER if difference > half else Verdict.WORSE if difference < -half else Verdict.CANT_TELL
        return {
            "candidate": a,
            "baseline": b,
            "difference": difference,
            "low": difference - half,
            "high": difference + half,
            "verdict": str(verdict),
        }

    row = {"rows_per_second": 10.0, "cost_per_1000": None}
    return {
        "candidates": [
            {**row, "name": name, "title": name, "score": score, "low": max(0.0, score - half), "high": min(1.0, score + half)}
            for name, score in scores.items() if name != "constant"
        ],
        "best": best, "pairs": [pair(a, b) for a, b in pairs], "train_rows": train_rows, "test_rows": test_rows, "detectable_difference": detectable,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ({"base": 0.1, "few_shot": 0.3, "neighbours": 0.2, "tuned": 0.8}, {}, "fine-tune"),
        ({"base": 0.1, "few_shot": 0.3, "neighbours": 0.8, "tuned": 0.7}, {}, "retrieve"),
        ({"base": 0.1, "few_shot": 0.3, "neighbours": 0.8, "tuned": 0.2}, {}, "retrieve"),
        ({"base": 0.6, "few_shot": 0.85, "neighbours": 0.3, "tuned": 0.83}, {}, "prompt"),
        ({"base": 0.01, "few_shot": 0.02, "neighbours": 0.0, "tuned": 0.03}, {}, "no"),
        ({"base": 0.01, "few_shot": 0.02, "neighbours": 0.0, "tuned": 0.03, "endpoint": 0.9}, {}, "no"),
        ({"base": 0.1, "few_shot": 0.3, "neighbours": 0.2, "tuned": 0.6, "endpoint": 0.9}, {}, "no"),
        ({"base": 0.1, "few_shot": 0.3, "neighbours": 0.2, "tuned": 0.8, "endpoint": 0.82}, {}, "fine-tune"),
        ({"base": 0.3, "few_shot": 0.5, "neighbours": 0.2, "tuned": 0.54}, {"train_rows": 100}, "more-data"),
        ({"base": 0.3, "few_shot": 0.5, "neighbours": 0.2, "tuned": 0.54}, {}, "cant-tell"),
        ({"base": 0.3, "few_shot": 0.5, "neighbours": 0.2}, {}, "cant-tell"),
        ({"tuned": 0.8}, {}, "cant-tell"),
        ({"base": 0.5, "tuned": 0.5}, {"detectable": None, "half": 0.9}, "cant-tell"),
    ],
)
def test_each_verdict(scores: dict[str, float], options: dict[str, Any], expected: str) -> None:
    advice, table = decide(weighed(scores, **options), probe=PROBE if "tuned" in scores else None)
    assert advice.verdict == expected, advice.sentence
    assert [row["decided"] for row in table].count(True) == 1
    assert len(table) == len(RULES)


def test_what_scores_no_better_than_one_answer_for_all_is_not_recommended() -> None:
    """90 % of the rows have the same answer: a prompt that is right on 91 % knows nothing."""
    scores = {"base": 0.91, "neighbours": 0.9, "tuned": 0.92}
    assert decide(weighed({**scores, "constant": 0.9}), probe=PROBE)[0].verdict == "cant-tell"
    assert decide(weighed({**scores, "constant": 0.2}, half=0.02), probe=PROBE)[0].verdict == "prompt"


def test_a_target_comes_first() -> None:
    scores = {"base": 0.2, "few_shot": 0.9, "neighbours": 0.3, "tuned": 0.99}
    assert decide(weighed(scores), probe=PROBE)[0].verdict == "fine-tune"
    assert decide(weighed(scores), probe=PROBE, target=0.8)[0].verdict == "prompt"
    assert decide(weighed(scores), probe=PROBE, target=0.88)[0].verdict == "fine-tune", "its interval begins at 84 %"


def test_what_is_of_use_is_the_users_to_say() -> None:
    scores = {"base": 0.1, "few_shot": 0.15, "neighbours": 0.1, "tuned": 0.4}
    assert decide(weighed(scores), probe=PROBE)[0].verdict == "fine-tune"
    assert decide(weighed(scores), probe=PROBE, of_use=0.9)[0].verdict == "no"


def test_every_sentence_has_its_numbers_and_what_would_change_it() -> None:
    advice, _ = decide(weighed({"base": 0.1, "few_shot": 0.3, "tuned": 0.8}), probe=PROBE)
    assert "80.0 % [74.0 %, 86.0 %]" in advice.sentence
    assert "+50.0 points [+44.0, +56.0]" in advice.sentence
    assert any("44.0 points" in line for line in advice.would_change)
    assert any("50 of 100 planned steps" in line for line in advice.would_change)


def test_nobody_is_told_to_score_above_everything() -> None:
    told = decide(weighed({"base": 0.2, "neighbours": 1.0, "tuned": 1.0}), probe=PROBE)[0].would_change
    assert not any("worth having" in line for line in told)
    told = decide(weighed({"base": 0.2, "neighbours": 0.8, "tuned": 0.7}), probe=PROBE)[0].would_change
    assert any("15.0 points more" in line for line in told)


def test_break_even_by_hand() -> None:
    """Training costs 120 s at 36 an hour = 1.2; an answer of the tuned model 0.001, of the larger one 0.004: 400 requests."""
    facts = facts_from(weighed({"base": 0.1, "tuned": 0.8, "endpoint": 0.8}), target=None, of_use=0.1)
    facts.scores["tuned"]["cost_per_1000"] = 1.0  # type: ignore[index]
    facts.scores["endpoint"]["cost_per_1000"] = 4.0  # type: ignore[index]
    found = costs_of(facts, PROBE, 36.0)
    assert found["training_cost"] == pytest.approx(1.2)
    assert found["break_even_requests"] == 401, "the first request after 400"
    assert costs_of(facts, PROBE, None)["break_even_reason"].startswith("no price is stated")
    facts.scores["endpoint"]["cost_per_1000"] = 0.5  # type: ignore[index]
    assert "never" in str(costs_of(facts, PROBE, 36.0)) or "does not pay" in costs_of(facts, PROBE, 36.0)["break_even_reason"]


def base_row(name: str, before: float, after: float | None, size: float, verdict: str = "fine-tune") -> dict[str, Any]:
    return {"base": name, "before": before, "after": after, "weights_gb": size, "licence": "apache-2.0", "verdict": verdict}


def test_the_smallest_base_that_is_not_shown_to_be_worse() -> None:
    rows = [base_row("small", 0.1, 0.78, 0.5), base_row("large", 0.4, 0.8, 5.0), base_row("tiny", 0.0, 0.2, 0.1)]
    pairs = [
        {"candidate": "large", "baseline": "small", "verdict": "CAN'T TELL"},
        {"candidate": "large", "baseline": "tiny", "verdict": "BETTER"},
    ]
    found = choose_base(rows, {"pairs": pairs})
    assert found["base"] == "small"
    assert "large scores 80.0 %" in found["sentence"]
    pairs[0]["verdict"] = "BETTER"
    assert choose_base(rows, {"pairs": pairs})["base"] == "large"
    assert choose_base([base_row("x", 0.0, None, 1.0) | {"before": None}], {"pairs": []})["verdict"] == "cant-tell"
