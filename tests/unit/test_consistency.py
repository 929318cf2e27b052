"""Measures over candidates: values by hand, p-values by scipy, Holm by hand, and which direction is good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from burnish.data.formats import make_example
from burnish.evaluation.consistency import Answered, consistency
from burnish.recipe import build_recipe
from burnish.run import Run, append_line
from burnish.tasks import detect_task
from burnish.types import Example, Prediction

N = 40


def example(n: int, group: str | None = None) -> Example:
    made = make_example(
        [
            {"role": "user", "content": f"question {n}"},
            {"role": "assistant", "content": f'{{"intent": "on", "level": {n}, "place": "the hall"}}'},
        ],
        source="x",
    )
    return made if group is None else Example(made.id, made.messages, group, made.source)


def predictions(name: str, test: list[Example], texts: list[str], finished: int = N) -> list[Prediction]:
    return [
        Prediction(row.id, name, text, "stop" if n < finished else "length", 5, 5, 0.1)
        for n, (row, text) in enumerate(zip(test, texts, strict=True))
    ]


def found(tmp_path: Path, checks: Any = None, *, groups: bool = False) -> dict[str, Any]:
    test = [example(n, f"g{n // 4}" if groups else None) for n in range(N)]
    good = [row.reference for row in test]
    made = {
        "base": predictions(
            "base", test, [good[n] if n < 12 else "I'm sorry, I cannot help with that." if n < 22 else "oh " * 30 for n in range(N)], 30
        ),
        "tuned": predictions("tuned", test, [good[n] if n < 36 else "I'm sorry, I cannot help with that." for n in range(N)]),
    }
    recipe = build_recipe(
        {"model": "m", "data": "d.jsonl", "evaluation": {"resamples": 400, **({} if checks is None else {"checks": checks})}}
    )
    train = [example(n).reference for n in range(100, 160)]
    return consistency(Run(tmp_path), recipe, detect_task(train), answered=Answered(test, made, "base"), train=train)


def test_values_and_comparisons_by_hand(tmp_path: Path) -> None:
    content = found(tmp_path)
    assert content["chosen"] == "by the training answers"
    measures = {measure["key"]: measure for measure in content["measures"]}
    assert list(measures) == ["json", "refusal", "repetition", "unfinished", "length"]
    shares = {key: {name: row["value"] for name, row in measure["candidates"].items()} for key, measure in measures.items()}
    assert shares["json"] == {"base": 12 / 40, "tuned": 36 / 40}
    assert shares["refusal"] == {"base": 10 / 40, "tuned": 4 / 40}
    assert shares["repetition"] == {"base": 18 / 40, "tuned": 0.0}
    assert shares["unfinished"] == {"base": 10 / 40, "tuned": 0.0}
    p_values = {
        "json": binomtest(0, 24).pvalue,  # rows 12–35: only the tuned one is right
        "refusal": binomtest(4, 14).pvalue,  # rows 12–21 against 36–39
        "repetition": binomtest(0, 18).pvalue,
        "unfinished": binomtest(0, 10).pvalue,
    }
    pairs = {key: measure["comparisons"]["tuned"] for key, measure in measures.items()}
    for key, p_value in p_values.items():
        assert pairs[key]["p_value"] == pytest.approx(p_value)
    p_values["length"] = pairs["length"]["p_value"]
    highest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):  # Holm: times 5, 4, 3 … and never falling
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[key]))
        assert pairs[key]["p_adjusted"] == pytest.approx(highest)
    assert {key: pair["verdict"] for key, pair in pairs.items() if key != "length"} == {
        "json": "BETTER", "refusal": "CAN'T TELL", "repetition": "BETTER", "unfinished": "BETTER",
    }  # fmt: skip
    assert pairs["repetition"]["difference"] == pytest.approx(-18 / 40), "as measured: fewer loops"
    assert pairs["repetition"]["high"] < 0
    row = measures["json"]["candidates"]["tuned"]
    assert row["low"] < row["value"] < row["high"]
    assert (row["n"], row["unscored"], row["left_out"]) == (40, 0, 0)


def test_rows_of_a_group_are_worth_less(tmp_path: Path) -> None:
    def width(content: dict[str, Any]) -> float:
        row = content["measures"][0]["candidates"]["base"]
        return float(row["high"] - row["low"])

    assert width(found(tmp_path, groups=True)) > 1.3 * width(found(tmp_path))


def test_checks_of_the_recipe_and_those_that_say_nothing(tmp_path: Path) -> None:
    checks = [
        {"regex": "^\\{"},
        {"regex": "level"},
        {"meaning_representation": True},
        {"self_consistency": True},
        {"judge": {"rubric": "y"}},
    ]
    content = found(tmp_path, checks)
    assert content["chosen"] == "by the recipe"
    assert [measure["key"] for measure in content["measures"]] == ["regex", "regex 2", "function_name", "slot_f1"]
    assert [refused["check"] for refused in content["refused"]] == ["self_consistency", "judge"]
    name = content["measures"][2]
    assert name["candidates"]["tuned"]["value"] is None
    assert name["candidates"]["tuned"]["left_out"] == N, "no reference is a representation"
    assert name["comparisons"] == {}


def test_drawn_answers_are_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name, texts in (("base", ["a", "b"]), ("tuned", ["a", "a"])):
        append_line(run.samples_file(name), {"key": "k", "samples": 2, "temperature": 1.0})
        for n in range(10):
            for draw, text in enumerate(texts):
                append_line(run.samples_file(name), {"example": example(n).id, "draw": draw, "text": f'"{text}"'})
        append_line(run.samples_file(name), {"example": example(11).id, "draw": 0, "text": "x"})  # cut off before its second draw
    (measure,) = found(tmp_path, [{"self_consistency": {"samples": 2}}])["measures"]
    assert {name: (row["value"], row["n"], row["left_out"]) for name, row in measure["candidates"].items()} == {
        "base": (0.0, 10, 30),
        "tuned": (1.0, 10, 30),
    }
    assert measure["comparisons"]["tuned"]["verdict"] == "BETTER"
