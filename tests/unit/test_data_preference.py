"""Preference pairs and replayed rows: forms, problems by line, identity, splits, and what the recipe refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish import data
from burnish.data.check import check_examples
from burnish.data.formats import make_example, recognise, to_examples
from burnish.data.read import Row
from burnish.errors import DataError, RecipeError
from burnish.models import Chat
from burnish.recipe import DataSection, Recipe, build_recipe, load_recipe
from burnish.types import Dataset, Example
from conftest import COLOURS, THINGS, colour_rows

USER, GOOD, BAD = {"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
SECTION = DataSection(train="x")


def converted(content: dict[str, Any], section: DataSection = SECTION) -> tuple[list[Example], list[str]]:
    examples, problems = to_examples([Row("f:7", content)], "preference", section)
    return examples, [str(problem) for problem in problems]


def pair(question: str, chosen: str = "good", rejected: str = "bad", source: str = "f:1") -> Example:
    return make_example([{"role": "user", "content": question}, {"role": "assistant", "content": chosen}], source=source, rejected=rejected)


def pair_rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"no {r['completion']}"} for r in colour_rows(n)]


def loaded(path: Path, *, training: dict[str, Any] | None = None, **settings: Any) -> tuple[Recipe, data.Loaded]:
    content = {"model": "m", "data": {"train": str(path), "overlap_ngram": 0, **settings}, "training": training or {}}
    recipe = build_recipe(content)
    return recipe, data.load(recipe)


def prepared(path: Path, **settings: Any) -> Dataset:
    recipe, rows = loaded(path, **settings)
    return data.prepare(rows, data.check(rows, recipe), recipe)


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.5},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
    ],
)
def test_the_forms_in_use_mean_the_same(row: dict[str, Any]) -> None:
    assert recognise([Row("f:7", row)], SECTION, "f") == "preference"
    (example,), problems = converted(row)
    assert not problems
    assert example.messages == (USER, GOOD)
    assert (example.reference, example.rejected) == ("good", "bad")
    assert example.worse is not None
    assert example.worse.messages == (USER, BAD)
    assert example == pair("q", source="f:7")


def test_a_system_prompt_and_earlier_turns_are_context() -> None:
    talk = [SYSTEM, USER, {"role": "assistant", "content": "first"}, {"role": "user", "content": "again"}]
    (example,), problems = converted({"prompt": talk, "chosen": [GOOD], "rejected": [BAD]})
    assert not problems
    assert [m["content"] for m in example.prompt] == ["s", "q", "first", "again"]
    assert example.messages[2]["weight"] == 0, "a preference is about the last answer"
    (example,), _ = converted({"prompt": "q", "chosen": "good", "rejected": "bad"}, DataSection(train="x", system="s"))
    assert example.messages == (SYSTEM, USER, GOOD)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": " good "}, "f:7:rejected — the same text as the chosen answer"),
        ({"prompt": "q", "chosen": "good", "rejected": ""}, "f:7:rejected — empty"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, "f:7:chosen — empty"),
        ({"prompt": "q", "chosen": "good", "rejected": None}, "f:7:rejected — missing"),
        ({"prompt": "q", "chosen": "good"}, "f:7:rejected — missing"),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, "f:7:prompt — empty"),
        ({"chosen": "good", "rejected": "bad"}, "no user message before the answer"),
        ({"chosen": [USER], "rejected": [USER]}, "f:7:chosen — not one assistant message"),
        ({"chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, "f:7:chosen — not one assistant message"),
        ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "f:7:rejected — follows another conversation"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "f:7:prompt — not what the answers"),
        ({"input": "q", "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "f:7:input.messages — not a list of messages"),
        (
            {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [GOOD]},
            "f:7:non_preferred_output — the same",
        ),
        ({"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": []}, "f:7:non_preferred_output — empty"),
    ],
)
def test_a_pair_that_teaches_nothing_is_named_by_its_line(row: dict[str, Any], expected: str) -> None:
    examples, problems = converted(row)
    assert not examples
    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith("f:7") for problem in problems)


def test_a_pair_keeps_its_identity_in_a_run() -> None:
    one, other = pair("q"), pair("q", rejected="worse")
    assert one.id != other.id, "the rejected answer is part of what a row is"
    assert one.id != make_example([USER, GOOD], source="f:1").id
    assert one.group == other.group, "pairs on one prompt never part at a split"
    assert one.group != pair("another").group
    assert data.row_to_example(json.loads(json.dumps(data.example_to_row(one)))) == one
    assert "rejected" not in data.example_to_row(make_example([USER, GOOD], source="f:1"))


def test_duplicates_are_left_out_and_opposites_told() -> None:
    rows = [
        pair("q", source="f:1"),
        pair("q", source="f:2"),
        pair("q", rejected="worse", source="f:3"),
        pair("q", "bad", "good", source="f:4"),
    ]
    checked = check_examples(rows, SECTION)
    assert [example.source for example in checked.examples] == ["f:1", "f:3", "f:4"]
    assert [str(w).split(" — ")[:2] for w in checked.warnings] == [["f:2", "duplicate of f:1"], ["f:4", "prefers the opposite of f:1"]]


def test_both_answers_count_for_length_and_control_tokens(chat: Chat) -> None:
    long = pair("a red cat", "cat red", "dog " * 60, source="f:2")
    (problem,) = check_examples([long], DataSection(train="x", max_length=50), tokenize=chat.training_tokens).problems
    assert "f:2" in str(problem)
    assert "over data.max_length 50" in str(problem)
    checked = check_examples([pair("a red cat", "cat red", "cat " * 9)], SECTION, tokenize=chat.training_tokens)
    (tokens,) = chat.training_tokens(checked.examples[0])
    length, targets = checked.lengths[checked.examples[0].id]
    assert length > len(tokens.input_ids), "the longer of the two"
    assert targets == tokens.target_tokens, "the chosen answer's: max_new_tokens comes from it"
    found = check_examples([pair("q", rejected="bad <eos>", source="f:5")], SECTION, find_control=chat.find_control).problems
    assert "f:5:rejected — the control token <eos>" in str(found[0])
    section = DataSection(train="x", max_length=60, over_length="truncate-prompt")
    (cut,) = check_examples([pair("red " * 80 + "end", "cat", "dog " * 20)], section, tokenize=chat.training_tokens).examples
    assert (cut.reference, cut.rejected) == ("cat", "dog " * 20)
    assert max(len(t.input_ids) for side in (cut, cut.worse) for t in chat.training_tokens(side)) <= 60


def test_splits_carry_the_pairs_and_keep_prompts_together(write_rows: Callable[..., Path]) -> None:
    rows = [
        {"prompt": f"a {c} {t} {n}", "chosen": f"{t} {c}", "rejected": f"no {k}"}
        for n, (c, t) in enumerate((c, t) for c in COLOURS for t in THINGS)
        for k in range(3)
    ]
    dataset = prepared(write_rows(rows), training={"objective": "preference"}, test_fraction=0.2, validation_fraction=0.2)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sum(map(len, parts)) == len(rows), "no row is lost to an overlap with its own prompt"
    assert all(example.rejected is not None for part in parts for example in part)


def test_preference_needs_rejected_answers(write_rows: Callable[..., Path]) -> None:
    path = write_rows(colour_rows(60))
    recipe, rows = loaded(path, training={"objective": "preference"})
    with pytest.raises(DataError, match=r"no row has a rejected answer \(read as `completion`\).*chosen"):
        data.prepare(rows, data.check(rows, recipe), recipe)
    test = write_rows(colour_rows(30, 500), "test.jsonl")
    train = write_rows(pair_rows(90), "pairs.jsonl")
    dataset = prepared(train, training={"objective": "preference"}, test=str(test), validation_fraction=0.2)
    assert len(dataset.test) == 30, "test rows need a reference only"


def test_supervised_on_pairs_trains_the_chosen_answers_and_says_so(write_rows: Callable[..., Path]) -> None:
    dataset = prepared(write_rows(pair_rows(120)), test_fraction=0.2, validation_fraction=0.2)
    assert "120 rows have a rejected answer, which training.objective supervised does not use" in dataset.manifest["warnings"][0]


@pytest.mark.parametrize(
    ("training", "settings", "expected"),
    [
        ({"objective": "preference"}, {"format": "chat"}, "chosen and a rejected"),
        ({"objective": "preference"}, {"train": "demo:home-assistant/en"}, "chosen and a rejected"),
        ({"objective": "preference", "kl_weight": 0.1}, {}, "training.kl_weight goes with"),
        ({"objective": "preference", "replay_data": "g.jsonl"}, {}, "training.replay_data goes with"),
        ({"method": "full", "kl_weight": 0.1}, {}, "training.kl_weight compares with the base model"),
    ],
)
def test_what_does_not_go_together_is_refused(training: dict[str, Any], settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        build_recipe({"model": "m", "data": {"train": "d.jsonl", **settings}, "training": training})


@pytest.mark.parametrize("training", [{"objective": "preference", "method": "full"}, {"kl_weight": 0.1}, {"replay_data": "g.jsonl"}])
def test_what_goes_together_is_taken(training: dict[str, Any]) -> None:
    build_recipe({"model": "m", "data": "d.jsonl", "training": training})


def test_replay_is_anchored_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d.jsonl\ntraining: {replay_data: general.jsonl}\n")
    assert load_recipe(tmp_path / "recipe.yaml").training.replay_data == str((tmp_path / "general.jsonl").resolve())
    assert build_recipe({"model": "m", "data": "d", "training": {"replay_data": "hub:a/b"}}).training.replay_data == "hub:a/b"


def test_replayed_rows_have_a_form_of_their_own_and_give_way(write_rows: Callable[..., Path]) -> None:
    rows = [{"ask": r["prompt"], "say": r["completion"]} for r in colour_rows(120)]
    general = [
        {"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": f"number {n}"}]} for n in range(40)
    ]
    same = [{"messages": [{"role": "user", "content": r["ask"]}, {"role": "assistant", "content": "other"}]} for r in rows]
    path = write_rows([*general, general[0], *same], "general.jsonl")
    settings = {"prompt_column": "ask", "completion_column": "say", "system": "s", "test_fraction": 0.2, "validation_fraction": 0.2}
    dataset = prepared(write_rows(rows), training={"replay_data": str(path)}, **settings)
    questions = {e.question for e in (*dataset.validation, *dataset.test)}
    assert not questions & {e.question for e in dataset.replay}
    counts = dataset.manifest["removed_counts"]
    assert counts["replay overlap with test or validation"] == len(questions)
    assert counts["duplicate"] == 1
    assert len(dataset.replay) == 40 + 120 - len(questions)
    assert all(e.messages[0]["role"] == "user" for e in dataset.replay), "the task's system prompt is not theirs"
    manifest = dataset.manifest["splits"]["replay"]
    assert manifest["rows"] == len(dataset.replay)
    assert [s["split"] for s in dataset.manifest["sources"]] == ["train", "replay"]
    assert dataset.manifest["token_lengths"]["replay"] == {}
    total = sum(part["rows"] for part in dataset.manifest["splits"].values()) + sum(counts.values())
    assert total == len(rows) + 41 + len(same)


def test_replay_of_nothing_but_the_tasks_own_rows_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows(colour_rows(120))
    with pytest.raises(DataError, match=r"training\.replay_data: none of its"):
        prepared(path, training={"replay_data": str(path)}, test_fraction=0.2, validation_fraction=0.2)


def test_a_broken_replay_row_is_named(write_rows: Callable[..., Path]) -> None:
    general = write_rows([{"prompt": "q", "completion": "a"}, {"prompt": "q2", "completion": ""}], "general.jsonl")
    with pytest.raises(DataError, match=r"general\.jsonl:2:completion — empty"):
        prepared(write_rows(colour_rows(120)), training={"replay_data": str(general)})


def test_plain_text_may_be_replayed_beside_plain_text(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "general").mkdir()
    (tmp_path / "general" / "a.txt").write_text("a general text")
    documents = write_rows([{"text": f"document {n}"} for n in range(30)], "documents.jsonl")
    texts = write_rows([{"text": "another general text"}], "texts.jsonl")
    answers = write_rows([{"prompt": "q", "completion": "a"}], "answers.jsonl")
    for general, kind in ((tmp_path / "general", "text"), (texts, "text"), (answers, None)):
        _, rows = loaded(documents, training={"objective": "text", "replay_data": str(general)})
        assert [example.metadata.get("kind") for example in rows.splits[data.REPLAY]] == [kind]


def test_embedded_rows_may_be_replayed(write_rows: Callable[..., Path]) -> None:
    pytest.importorskip("hassil", reason="needs the extra `demo`")
    _, rows = loaded(write_rows(colour_rows(120)), training={"replay_data": "demo:home-assistant/en"})
    assert len(rows.splits[data.REPLAY]) == 3000
    assert rows.attribution


def test_the_rows_of_the_guide_are_pairs() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    lines = guide.partition("```jsonl\n")[2].partition("```")[0].splitlines()
    rows = [Row(f"guide:{number}", json.loads(line)) for number, line in enumerate(lines, 1)]
    assert recognise(rows, SECTION, "guide") == "preference"
    examples, problems = to_examples(rows, "preference", SECTION)
    assert (len(examples), problems) == (3, [])
