"""Every entry of FORMATS: its own example converts, is recognised alone, and a broken row is named by place."""

from __future__ import annotations

import json

import pytest

from burnish.data.formats import FORMATS, recognise, to_examples
from burnish.data.read import Row
from burnish.errors import DataError
from burnish.recipe import DataSection

ROWS = {
    "chat": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "columns": {"ask": "q", "say": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "text": {"text": "a"},
}


def section(name: str) -> DataSection:
    columns = {"prompt_column": "ask", "completion_column": "say"} if name == "columns" else {}
    return DataSection(train="rows.jsonl", **columns, **({} if FORMATS[name].objective == "supervised" else {"format": name}))


@pytest.mark.parametrize("name", FORMATS)
def test_recognised_and_converted(name: str) -> None:
    rows = [Row(f"rows.jsonl:{n}", ROWS[name]) for n in (1, 2)]
    assert recognise(rows, section(name), "rows.jsonl") == name
    (example, _), problems = to_examples(rows, name, section(name))
    assert not problems
    if FORMATS[name].objective == "supervised":
        assert [m["role"] for m in example.messages] == ["user", "assistant"]
        assert example.question == "q"
    assert example.reference == "a"
    assert example.source == "rows.jsonl:1"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "broken", [{}, {"messages": None}, {"messages": [1]}, {"prompt": 1}, {"conversations": []}, {"instruction": "", "output": None}]
)
def test_a_broken_row_is_a_problem_with_its_place(name: str, broken: dict) -> None:
    examples, problems = to_examples([Row("rows.jsonl:7", broken)], name, section(name))
    assert not examples
    assert problems
    assert all(str(problem).startswith("rows.jsonl:7:") for problem in problems)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].keys])
def test_the_printed_example_is_a_row_of_the_format(name: str) -> None:
    row = json.loads(FORMATS[name].example.replace('"…"', '"text"'))
    examples, problems = to_examples([Row("x:1", row)], name, section(name))
    assert examples, problems


def test_plain_text_is_never_taken_for_rows_to_be_answered() -> None:
    with pytest.raises(DataError, match=r"keys found: text, label.*prompt_column: text, data.completion_column: label"):
        recognise([Row("x:1", {"text": "q", "label": "a"})], section("chat"), "x")


def test_no_format_and_two_formats_are_errors_that_name_the_keys() -> None:
    with pytest.raises(DataError, match=r"keys found: utterance, sql.*prompt_column"):
        recognise([Row("x:1", {"utterance": "q", "sql": "a"})], section("chat"), "x")
    with pytest.raises(DataError, match="two formats"):
        recognise([Row("x:1", {**ROWS["chat"], **ROWS["completion"]})], section("chat"), "x")
    with pytest.raises(DataError, match=r"prompt_column: input, data.completion_column: output"):
        recognise([Row("x:1", {"input": "q", "output": "a", "id": 3})], section("chat"), "x")
