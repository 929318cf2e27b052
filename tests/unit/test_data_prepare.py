"""Checking, de-duplicating, splitting, overlap."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish import data
from burnish.data.check import check_examples, statistics
from burnish.data.formats import make_example
from burnish.data.split import find_overlap, share, split_by_group, take
from burnish.errors import DataError
from burnish.models import Chat
from burnish.recipe import DataSection, build_recipe
from burnish.types import Dataset, Example
from conftest import colour_rows


def example(question: str, answer: str = "a", *, group: str | None = None, source: str = "f:1") -> Example:
    return make_example([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source=source, group=group)


def prepared(path: Path, **settings: Any) -> Dataset:
    recipe = build_recipe({"model": "m", "data": {"train": str(path), **settings}})
    loaded = data.load(recipe)
    return data.prepare(loaded, data.check(loaded, recipe), recipe)


def test_adding_rows_never_moves_old_ones(write_rows: Callable[..., Path]) -> None:
    before = prepared(write_rows(colour_rows(200), "a.jsonl"), overlap_ngram=0)
    rows = colour_rows(200) + colour_rows(150, start=1000)
    random.Random(0).shuffle(rows)
    after = prepared(write_rows(rows, "b.jsonl"), overlap_ngram=0)
    for split in data.SPLITS:
        old, new = ({e.id for e in getattr(part, split)} for part in (before, after))
        assert old <= new
    assert 0.03 < len(before.test) / 200 < 0.2


def test_groups_stay_together() -> None:
    rows = [example(f"q{i}", group=f"user{i % 30}") for i in range(600)]
    parts = split_by_group(rows, {"test": 0.2, "validation": 0.2}, seed=1)
    homes = {name: {e.group for e in part} for name, part in parts.items()}
    assert not homes["test"] & homes["train"]
    assert not homes["test"] & homes["validation"]
    assert sum(map(len, parts.values())) == 600


def test_share_is_uniform_and_depends_on_the_seed() -> None:
    values = [share(str(i), 0) for i in range(2000)]
    assert all(0 <= v < 1 for v in values)
    assert 0.47 < sum(values) / 2000 < 0.53
    assert values != [share(str(i), 1) for i in range(2000)]


def test_take_is_a_nested_sample() -> None:
    rows = [example(f"q{i}") for i in range(50)]
    small, large = ({e.id for e in take(rows, n, 0)} for n in (10, 30))
    assert small <= large
    assert len(small) == 10
    assert take(rows, None, 0) == rows


def test_duplicates_are_counted_and_contradictions_told() -> None:
    rows = [example("q", "a", source="f:1"), example("q", "a", source="f:2"), example("q", "b", source="f:3")]
    checked = check_examples(rows, DataSection(train="x"))
    assert len(checked.examples) == 2
    assert [str(w) for w in checked.warnings] == [
        "f:2 — duplicate of f:1 — nothing: the first is kept, this one is left out",
        "f:3 — another answer to the same prompt as f:1 — decide which is right: a model can learn only one",
    ]
    assert statistics(checked, 3)["duplicate_fraction"] == pytest.approx(1 / 3, abs=1e-6)


def test_overlap_exact_and_by_ngram() -> None:
    words = [f"w{i}" for i in range(30)]
    test = [example("Turn ON the light!"), example(" ".join(words))]
    train = [
        example("turn on the  light", "b"),
        example("x " + " ".join(words[5:18]) + " y"),  # 13 in a row
        example("x " + " ".join(words[5:17]) + " y"),  # 12 in a row
        example("something else"),
    ]
    found = find_overlap(train, test, 13)
    assert [e.id in found for e in train] == [True, True, False, False]
    assert len(find_overlap(train, test, 0)) == 1
    assert len(find_overlap(train, test, 12)) == 3


def test_what_every_row_begins_with_is_no_leak() -> None:
    instruction = " ".join(f"word{i}" for i in range(20))
    rows = [example(f"{instruction} {i} end") for i in range(20)]
    assert not find_overlap(rows[:10], rows[10:], 13)
    assert len(find_overlap(rows[:10], rows[10:13], 13)) == 10, "in fewer than five rows it counts"


def test_overlapping_training_rows_give_way(write_rows: Callable[..., Path]) -> None:
    test = write_rows(colour_rows(20), "test.jsonl")
    dataset = prepared(write_rows(colour_rows(120), "train.jsonl"), test=str(test), validation_fraction=0.2)
    assert len(dataset.test) == 20
    counts = dataset.manifest["removed_counts"]
    assert counts["overlap with test or validation"] + counts.get("overlap with test", 0) == 20
    assert not {e.question for e in dataset.train} & {e.question for e in dataset.test}


def test_the_manifest_adds_up(write_rows: Callable[..., Path]) -> None:
    rows = colour_rows(150) + colour_rows(7)
    dataset = prepared(write_rows(rows), test_fraction=0.2, validation_fraction=0.2)
    manifest = dataset.manifest
    assert sum(manifest["removed_counts"].values()) + sum(part["rows"] for part in manifest["splits"].values()) == len(rows)
    assert manifest["removed_counts"]["duplicate"] == 7
    assert manifest["sources"][0]["rows"] == len(rows)


def test_seven_rows_are_one_clear_error(write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        prepared(write_rows(colour_rows(7)))
    assert "too few rows: 7 in all" in str(caught.value)
    assert "collect more rows" in str(caught.value)


def test_forty_rows_get_the_fraction_they_need(write_rows: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"set data.test_fraction: 0\.\d+"):
        prepared(write_rows(colour_rows(50)))


def test_all_problems_of_all_rows_at_once(write_rows: Callable[..., Path]) -> None:
    rows: list[Any] = [*colour_rows(60), {"prompt": "q"}, "{broken", {"prompt": "", "completion": "a"}, {"prompt": "q", "completion": 3.5}]
    with pytest.raises(DataError) as caught:
        prepared(write_rows(rows))
    text = str(caught.value)
    assert text.startswith("3 problems")
    assert all(f"rows.jsonl:{line}" in text for line in (61, 62, 63))


def test_control_tokens_in_text_are_refused(chat: Chat) -> None:
    rows = [example("fine"), example("bad <eos> text", source="f:9"), example("a < b | c [d]")]
    checked = check_examples(rows, DataSection(train="x"), tokenize=chat.training_tokens, find_control=chat.find_control)
    assert len(checked.examples) == 2
    assert "f:9:messages[0].content — the control token <eos>" in str(checked.problems[0])


@pytest.mark.parametrize("policy", ["error", "drop", "truncate-prompt"])
def test_over_long_rows(policy: str, chat: Chat) -> None:
    long = example("start " + "a red cat " * 60 + "end", "cat red", source="f:2")
    section = DataSection(train="x", max_length=60, over_length=policy)
    checked = check_examples([example("a red cat"), long], section, tokenize=chat.training_tokens)
    if policy == "error":
        assert "over data.max_length 60" in str(checked.problems[0])
    elif policy == "drop":
        assert [reason for _, reason in checked.removed] == ["over-long"]
    else:
        kept = checked.examples[1]
        assert kept.reference == "cat red", "the answer is never cut"
        assert kept.question.endswith("end")
        assert not kept.question.startswith("start")
        (tokens,) = chat.training_tokens(kept)
        assert 40 < len(tokens.input_ids) <= 60
    assert policy == "error" or checked.warnings


def test_an_answer_too_long_for_truncation_is_left_out_and_said(chat: Chat) -> None:
    section = DataSection(train="x", max_length=20, over_length="truncate-prompt")
    checked = check_examples([example("q", "cat " * 80)], section, tokenize=chat.training_tokens)
    assert not checked.examples
    assert checked.removed[0][1] == "over-long even without its prompt"
