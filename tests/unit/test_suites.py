"""Suites as files: the embedded ones, a folder, one's own prompts; what is wrong with a file is told at once and by line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import DataError, RecipeError
from burnish.evaluation import SUITES, openings, read_suites
from burnish.evaluation.retention import judge_answer, question_of
from burnish.evaluation.suites import KINDS
from burnish.recipe import build_recipe, load_recipe
from conftest import SHARED


def test_every_kind_can_be_read_and_measured() -> None:
    assert set(SUITES) == {*KINDS, "harness"}
    assert all(way.title and callable(way.measure) for way in SUITES.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_are_rows(kind: str, write_rows: Callable[..., Path]) -> None:
    (suite,) = read_suites([str(write_rows([KINDS[kind].example]))])
    assert (suite.kind, len(suite.items)) == (kind, 1)


def test_the_embedded_suites() -> None:
    general, text, instructions = read_suites(["embedded"])
    assert [suite.name for suite in (general, text, instructions)] == ["general", "text", "instructions"]
    assert len(general.items) >= 100
    golds = Counter(item.row["gold"] for item in general.items)
    assert max(golds.values()) < 0.35 * len(general.items), "always the same place would be right by habit"
    assert all(len(item.row["choices"]) == 4 for item in general.items)
    languages = Counter(item.row["language"] for item in text.items)
    assert languages["en"] >= 8
    assert len(languages) >= 5
    assert len(instructions.items) >= 40
    assert all(judge_answer(item.row, item.row["answer"]) == 1 for item in instructions.items)
    assert all(judge_answer(item.row, "inform(name[x])") == 0 for item in instructions.items)
    asked = openings()
    assert len(set(asked)) == len(asked) >= 60
    suites = " ".join(str(value) for suite in (general, text, instructions) for item in suite.items for value in item.row.values())
    assert not [opening for opening in asked if opening in suites], "replay must not teach what is measured"


def test_the_local_suites() -> None:
    folder = SHARED / "data" / "retention"
    if not folder.exists():
        pytest.skip("needs ../shared/data/retention")
    suites = read_suites([str(folder)], rows=200)
    assert {suite.name: suite.kind for suite in suites} == {"arc_easy": "choice", "lambada": "continuation", "piqa": "choice"}
    assert {len(suite.items) for suite in suites} == {200}
    again = read_suites([str(folder)], rows=100)
    assert {item.id for item in again[0].items} <= {item.id for item in suites[0].items}, "fewer rows are some of the same rows"


def test_a_question_asks_and_a_beginning_goes_on() -> None:
    assert question_of({"query": "Question: Why?\n"}) == "Question: Why?\nAnswer:"
    assert question_of({"query": "The sky is "}) == "The sky is"


@pytest.mark.parametrize(
    ("row", "answer", "value"),
    [
        ({"must_contain": "Ada"}, "I am ADA.", 1.0),
        ({"must_contain": ["Ada", "Lovelace"]}, "Ada", 0.0),
        ({"must_contain": "Ada", "answer": "I am Ada"}, "ada!", 1.0),
        ({"answer": "four"}, " four ", 1.0),
        ({"answer": "four"}, "Four.", 0.0),
        ({"answer": "four", "metric": "label_accuracy"}, "Four.", 1.0),
        ({"answer": '{"a": 1}', "metric": "json_match"}, "not json", 0.0),
        ({"answer": "#### 42", "metric": "numeric_answer"}, "it is 42", 1.0),
    ],
)
def test_answers_are_judged(row: dict[str, Any], answer: str, value: float) -> None:
    assert judge_answer(row, answer) == value


def test_own_prompts_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("prompt,answer,must_contain\nWho are you?,,Ada\n2+2?,4,\n", encoding="utf-8")
    (suite,) = read_suites([str(path)])
    assert (suite.kind, len(suite.items)) == ("prompts", 2)
    assert judge_answer(suite.items[0].row, "my name is ada") == 1
    assert judge_answer(suite.items[1].row, "4") == 1


def test_all_problems_of_all_files_at_once(tmp_path: Path) -> None:
    rows = [
        {"query": "a", "choices": ["b", "c"], "gold": 0},
        {"query": " ", "choices": ["b", "c"], "gold": 0},
        {"query": "a", "choices": ["b"], "gold": 0},
        {"query": "a", "choices": ["b", "c"], "gold": 2},
        {"query": "a", "choices": ["b", "c"], "gold": True},
        {"query": "a", "choices": ["b", "c"]},
    ]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    own = [
        {"prompt": "a", "answer": "b", "metric": "evil.py:run"},
        {"prompt": "a", "answer": "b", "metric": "bleu"},
        {"prompt": "a", "must_contain": [1]},
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    with pytest.raises(DataError) as caught:
        read_suites([str(tmp_path)])
    text = str(caught.value)
    for place in ("one.jsonl:2:query", "one.jsonl:3:choices", "one.jsonl:4:gold", "one.jsonl:5:gold", "one.jsonl:6:gold", "one.jsonl:7"):
        assert place in text, place
    for place in ("two.jsonl:1:metric", "two.jsonl:2:metric", "two.jsonl:3:must_contain"):
        assert place in text, place
    assert "cannot bring code" in text
    assert "9 problems" in text


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["embeded"], "no such file or folder; expected embedded"),
        (["lm-eval:"], "expected lm-eval:TASK"),
        (["lm-eval:/tmp/evil.yaml"], "the name of a task"),
        (["lm-eval:evil.yaml"], "the name of a task"),
        (["lm-eval:../evil"], "the name of a task"),
        (["embedded", "embedded"], "two suites are called general"),
    ],
)
def test_names_that_mean_nothing(names: list[str], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        read_suites(names)


def test_folders_and_files_that_are_none(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="no suite in this folder"):
        read_suites([str(tmp_path)])
    with pytest.raises(DataError, match=r"keys question, which no kind.*choice: \{"):
        read_suites([str(write_rows([{"question": "a"}]))])


def test_the_recipes_section(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d.jsonl\nretain: {suites: [embedded, mine.jsonl, 'lm-eval:hellaswag'], max_drop: 0.02}\n")
    recipe = load_recipe(path)
    assert recipe.retain.suites == ["embedded", str(tmp_path / "mine.jsonl"), "lm-eval:hellaswag"]
    assert recipe.retain.given
    assert not build_recipe({"model": "m", "data": "d"}).retain.given
    assert build_recipe({"model": "m", "data": "d"}, overrides=["retain.max_drop=0.1"]).retain.given
    with pytest.raises(RecipeError, match=r"retain\.max_drop"):
        load_recipe(path, ["retain.max_drop=-1"])
    with pytest.raises(RecipeError, match=r"retain\.suites"):
        load_recipe(path, ["retain.suites=[]"])
