"""Candidates, selection, retrieval, verdicts: the parts that no model is needed for, and one that a stand-in is enough for."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from burnish.data.formats import make_example
from burnish.evaluation import limits_for
from burnish.evaluation.candidates import CANDIDATES, Context, Setting, fitting, make_context, write_instruction
from burnish.evaluation.compare import overall, sentence
from burnish.evaluation.retrieve import Library, varied
from burnish.models import Chat
from burnish.tasks import detect_task
from burnish.types import Comparison, Example, Verdict


def example(question: str, answer: str, system: str | None = None) -> Example:
    head = [{"role": "system", "content": system}] if system else []
    return make_example([*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}], source="x")


TRAIN = [
    example("turn on the kitchen light", '{"intent": "on", "area": "kitchen"}'),
    example("turn off the bedroom light", '{"intent": "off", "area": "bedroom"}'),
    example("play some jazz music", '{"intent": "play", "query": "jazz"}'),
    example("what is the weather", '{"intent": "weather"}'),
]


@pytest.fixture
def context(chat: Chat) -> Context:
    return make_context(chat, detect_task([e.reference for e in TRAIN * 5]), Library(TRAIN), instruction=None, prompt_limit=400)


def test_bm25_finds_what_a_hand_count_finds() -> None:
    """Okapi BM25 with Lucene's idf and k1 = 1.5, b = 0.75 (the defaults of bm25s), written out."""
    questions = [e.question.split() for e in TRAIN]
    mean = sum(map(len, questions)) / len(questions)

    def score(query: list[str], document: list[str]) -> float:
        total = 0.0
        for word in query:
            n = sum(word in q for q in questions)
            tf = document.count(word)
            total += math.log(1 + (len(questions) - n + 0.5) / (n + 0.5)) * tf / (tf + 1.5 * (0.25 + 0.75 * len(document) / mean))
        return total

    for query in ("turn on the light", "jazz in the bedroom", "weather"):
        expected = sorted(range(4), key=lambda i: score(query.split(), questions[i]))
        found = Library(TRAIN).examples(query, 4)
        ranked = [score(query.split(), e.question.split()) for e in found]
        assert ranked == sorted(ranked), "the nearest stands last"
        assert found[-1] is TRAIN[expected[-1]]


def test_retrieval_of_unknown_words_and_empty_questions() -> None:
    assert len(Library(TRAIN).examples("zzz", 2)) == 2
    assert len(Library([example("?!", "a")]).examples("", 3)) == 1


def test_varied_takes_unlike_answers_first() -> None:
    rows = [example(f"q{i}", json.dumps({"intent": "the very same beginning", "n": i})) for i in range(6)] + [example("r", "another")]
    assert "another" in [e.reference for e in varied(rows, 2)]
    assert len(varied(rows, 5)) == 5
    assert varied(rows, 3) == varied(rows[::-1], 3), "not the order of the file"


def test_messages_of_each_candidate(context: Context) -> None:
    row = example("turn on the hall light", '{"intent": "on", "area": "hall"}', system="You are a home.")
    base = CANDIDATES["base"].messages(row, Setting("instructed"), context)
    assert [m["role"] for m in base] == ["system", "user"]
    assert base[0]["content"].startswith(context.instruction)
    assert base[0]["content"].endswith("You are a home.")
    shots = CANDIDATES["few_shot_retrieved"].messages(row, Setting("as_is", 2), context)
    assert [m["role"] for m in shots] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert shots[3]["content"] == "turn on the kitchen light"
    assert shots[-1]["content"] == row.question
    assert CANDIDATES["tuned"].messages(row, Setting(), context) == list(row.prompt)
    for name in CANDIDATES:
        text = json.dumps(CANDIDATES[name].messages(row, Setting("instructed", 2), context))
        assert row.reference not in text, "no candidate sees the answer"


def test_examples_that_do_not_fit_are_left_out(context: Context) -> None:
    row = example("turn on the hall light", "x")
    tight = Context(context.chat, context.instruction, context.library, 60, True)
    _, full, shown = fitting("few_shot", row, Setting("as_is", 4), context)
    _, cut, fewer = fitting("few_shot", row, Setting("as_is", 4), tight)
    assert fewer < shown == 4
    assert len(cut) <= 60 < len(full)
    assert full[-8:] == cut[-8:]


def test_the_instruction_tells_form_keys_and_values() -> None:
    text = write_instruction(detect_task([e.reference for e in TRAIN * 5]), TRAIN * 5)
    assert all(part in text for part in ('"intent" (always): one of "off", "on", "play", "weather"', '"area" (only where', "JSON"))
    labels = [example(f"q{i}", ["yes", "no"][i % 2]) for i in range(60)]
    assert "no, yes" in write_instruction(detect_task([e.reference for e in labels]), labels)


def test_stop_texts_come_from_the_training_answers() -> None:
    assert limits_for(TRAIN, 9).stop_texts == ("\n",)
    assert limits_for([example("q", "a\nb")], 9).stop_texts == ("\n\n",)
    assert limits_for([example("q", "a\n\nb")], 9).stop_texts == ()


def comparison(baseline: str, verdict: Verdict, difference: float = 0.1) -> Comparison:
    return Comparison("tuned", baseline, "exact_match", 100, difference, difference - 0.05, difference + 0.05, 0.01, 0.02, verdict)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ({"base": Verdict.BETTER, "few_shot": Verdict.BETTER}, Verdict.BETTER),
        ({"base": Verdict.BETTER, "few_shot": Verdict.CANT_TELL}, Verdict.CANT_TELL),
        ({"base": Verdict.BETTER, "few_shot": Verdict.WORSE}, Verdict.WORSE),
        ({"base": Verdict.WORSE, "few_shot": Verdict.CANT_TELL}, Verdict.CANT_TELL),
        ({}, Verdict.CANT_TELL),
    ],
)
def test_overall_is_against_every_baseline(verdicts: dict[str, Verdict], expected: Verdict) -> None:
    """few_shot is the best baseline here: being worse than it is WORSE, being worse than a weak one is not."""
    scores: dict[str, dict[str, Any]] = {"base": {"score": 0.1}, "few_shot": {"score": 0.5}}
    assert overall([comparison(name, verdict) for name, verdict in verdicts.items()], scores) is expected


@pytest.mark.parametrize(
    ("verdict", "part"), [("BETTER", "better than every baseline"), ("WORSE", "Do not ship"), ("CAN'T TELL", "Can't tell")]
)
def test_the_sentence_carries_the_numbers(verdict: str, part: str) -> None:
    content = {
        "rows": 100, "metric_title": "Exact match", "verdict": verdict, "best_baseline": "few_shot", "detectable_difference": 0.2,
        "candidates": [{"name": n, "title": n, "score": s} for n, s in (("base", 0.1), ("few_shot", 0.5), ("tuned", 0.6))],
        "comparisons": [
            {"candidate": "tuned", "baseline": n, "difference": 0.1, "low": -0.02, "high": 0.22, "verdict": verdict} for n in ("base", "few_shot")
        ],
    }  # fmt: skip
    text = sentence(content)
    assert part in text
    assert all(number in text for number in ("60.0 %", "50.0 %", "+10.0 points [-2.0, +22.0]", "100 test rows"))


def test_selection_takes_the_best_and_then_the_cheapest(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from burnish.evaluation.predict import Options
    from burnish.models import Limits
    from burnish.recipe import build_recipe
    from burnish.tasks import METRICS
    from burnish.types import Prediction

    module = sys.modules["burnish.evaluation.select"]
    right = {("base", "as_is", 0): 0, ("base", "instructed", 0): 0, ("few_shot", "as_is", 2): 1, ("few_shot", "instructed", 2): 3}

    def fake(model: Any, candidate: str, examples: Any, *, setting: Setting, **_: Any) -> list[Prediction]:
        good = right[(candidate, setting.prompt_form, setting.shots)]
        cost = 100 if setting.prompt_form == "instructed" else 10
        return [Prediction(e.id, candidate, e.reference if i < good else "no", "stop", cost, 1, 0.1) for i, e in enumerate(examples)]

    monkeypatch.setattr(module, "predict", fake)
    recipe = build_recipe({"model": "m", "data": "d", "evaluation": {"shots": [2]}})
    found = module.select(
        None, ["base", "few_shot", "tuned"], TRAIN, context=context, limits=Limits(5), metric=METRICS["exact_match"],
        settings=recipe.evaluation, options=Options(4),
    )  # fmt: skip
    assert {name: Setting(**kept) for name, kept in found["chosen"].items()} == {
        "base": Setting("as_is", 0),
        "few_shot": Setting("instructed", 2),
    }
    assert len(found["tried"]) == 4
    assert "Input:" in found["example_prompts"]["base"]
