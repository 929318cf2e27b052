"""Documents become passages, passages and rows are found, neighbours vote: no model is asked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.data import Passage, read_passages
from burnish.data.formats import make_example
from burnish.data.passages import answer_column, split_text
from burnish.errors import DataError
from burnish.evaluation.candidates import Setting, make_context
from burnish.evaluation.predict import Options, predict
from burnish.evaluation.retrieve import BY_MEANING, BY_WORDS, Library, Meanings
from burnish.evaluation.select import choose_ways
from burnish.models import Limits
from burnish.tasks import METRICS, detect_task
from burnish.types import Example


def example(question: str, answer: str) -> Example:
    return make_example([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source="x")


def test_paragraphs_stay_whole_and_long_ones_are_cut_at_sentences() -> None:
    short = "one two three.\n\nfour five six.\n\nseven eight nine."
    assert split_text(short, 6) == ["one two three.\nfour five six.", "four five six.\nseven eight nine."]
    long = "a b c. d e f. g h i. j k l."
    passages = split_text(long, 6)
    assert passages[0] == "a b c.\nd e f."
    assert passages[1] == "d e f.\ng h i.", "each begins with the last sentence of the one before"
    assert all(len(passage.split()) <= 6 for passage in passages)
    words = [word for passage in passages for word in passage.split()]
    assert list(dict.fromkeys(words)) == long.split(), "nothing is lost, nothing out of order"


def test_a_sentence_longer_than_a_passage_is_cut_at_words() -> None:
    assert [len(passage.split()) for passage in split_text("word " * 25, 10)] == [10, 10, 5]
    assert split_text("  \n\n \n") == []


def test_a_column_that_holds_the_answers_makes_passages_that_know_theirs(tmp_path: Path) -> None:
    rows = [{"code": "A1", "text": "cholera"}, {"code": "B2", "text": "measles"}, {"code": "C3", "text": "gout", "note": "old"}]
    path = tmp_path / "codes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert answer_column(rows, ["A1", "B2", "B2"]) == "code"
    assert answer_column(rows, ["A1", "Z9", "Y8"]) is None, "a third of the answers is not the column of answers"
    found = read_passages(str(path), ["A1", "C3"])
    assert [(passage.key, passage.answer) for passage in found] == [("cholera", "A1"), ("measles", "B2"), ("gout old", "C3")]
    assert found[0].text == "cholera: A1"
    assert [passage.answer for passage in read_passages(str(path))] == [None] * 3


def test_a_folder_of_texts_and_bad_documents(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Title\n\nFirst.\n")
    (folder / "b.txt").write_text("Second.")
    assert [passage.text for passage in read_passages(str(folder))] == ["# Title\nFirst.", "Second."]
    (folder / "c.jsonl").write_text('{"text": "x"}\n{broken\n')
    with pytest.raises(DataError, match=r"c\.jsonl:2"):
        read_passages(str(folder))
    with pytest.raises(DataError, match="no such file"):
        read_passages(str(tmp_path / "nowhere"))
    (tmp_path / "empty.jsonl").write_text('{"n": null}\n')
    with pytest.raises(DataError, match="no text"):
        read_passages(str(tmp_path / "empty.jsonl"))


def planted(texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """The first letter decides: texts that begin alike are alike."""
    vectors = np.zeros((len(texts), 384), dtype=np.float32)
    for row, text in enumerate(texts):
        vectors[row, ord(text[0]) % 26] = 1.0
        vectors[row, 100 + len(text) % 50] = 0.1 * len(text)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_nearest_by_meaning_are_those_of_a_sort_of_all(tmp_path: Path) -> None:
    texts = [f"{letter}{'x' * n}" for letter in "abc" for n in range(8)]
    found = Meanings(texts, planted).nearest("bxxx", 5)
    alike = planted(texts) @ planted(["bxxx"])[0]
    assert [index for index, _ in found] == sorted(range(len(texts)), key=lambda i: (-alike[i], i))[:5]
    assert found[0][1] == pytest.approx(1.0)


def test_vectors_are_kept_and_a_file_of_another_size_is_not_taken(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        asked.append(len(texts))
        return planted(texts)

    for _ in range(2):
        Meanings(["aa", "bb", "cc"], counting, tmp_path / "v.f32").nearest("aa", 1)
    assert asked == [3, 1, 1], "the texts once, the question each time"
    (tmp_path / "v.f32").write_bytes(b"123")
    assert Meanings(["aa", "bb", "cc"], counting, tmp_path / "v.f32").nearest("bb", 1)[0][0] == 1


def test_votes_are_counted_by_nearness() -> None:
    """Hand count: two far ones (0.5 each) lose against one at 1.2; at equal weight the nearest one's answer stands."""

    class Fixed:
        def nearest(self, question: str, k: int) -> list[tuple[int, float]]:
            return [(0, 1.2), (1, 0.5), (2, 0.5)][:k]

    library = Library([example("q", "near"), example("r", "far"), example("s", "far")])
    library._made["examples", BY_WORDS] = Fixed()
    assert library.vote("?", 3) == "near"
    library._made["examples", BY_WORDS].nearest = lambda question, k: [(0, 0.5), (1, 0.5), (2, 0.4)][:k]  # type: ignore[method-assign]
    assert library.vote("?", 2) == "near"
    assert library.vote("?", 3) == "far"
    assert Library(()).vote("?", 3) == ""


def test_the_way_of_looking_up_is_chosen_by_what_it_finds() -> None:
    """By words every row is as far as any other; by meaning (the first letter) each finds its like."""
    train = [example(f"a{i} lorem", "A") for i in range(4)] + [example(f"b{i} lorem", "B") for i in range(4)]
    rows = [example("azz", "A"), example("bzz", "B"), example("ayy", "A"), example("byy", "B")]
    library = Library(train, [Passage("alpha beta", "d:1", "alpha beta")], embed=planted)
    ways = choose_ways(library, rows, METRICS["exact_match"])
    assert ways["examples"]["chosen"] == BY_MEANING
    assert ways["examples"]["scores"] == {BY_WORDS: 0.5, BY_MEANING: 1.0}
    assert ways["passages"]["chosen"] == BY_WORDS, "a tie goes to words"
    assert choose_ways(Library(train), rows, METRICS["exact_match"])["passages"]["chosen"] == BY_WORDS


def test_one_index_serves_to_read_and_to_vote_where_every_passage_knows_its_answer() -> None:
    asked: list[int] = []

    def counting(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        asked.append(len(texts))
        return planted(texts)

    labelled = [Passage(f"{name}: {code}", "d:1", name, code) for name, code in (("alpha", "A"), ("beta", "B"), ("gamma", "C"))]
    library = Library((), labelled, embed=counting)
    assert library.read("beta", 1, BY_MEANING)[0].answer == library.vote("beta", 1, BY_MEANING, "labelled") == "B"
    assert asked == [3, 1], "the keys once, the question once"
    mixed = Library((), [*labelled, Passage("delta", "d:4", "delta")], embed=planted)
    assert mixed.read("delta", 1, BY_MEANING)[0].text == "delta"


def test_a_vote_is_taken_again_where_a_row_has_changed(tmp_path: Path, chat: Any) -> None:
    """Answers on the disk hold for the rows that voted; and a question's own embedding is part of its wait, each time."""
    embedded: list[int] = []

    def counting(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        embedded.append(len(texts))
        return planted(texts)

    def answers(train: list[Example]) -> list[str]:
        context = make_context(chat, detect_task(["A", "B"] * 20), Library(train, embed=counting), instruction="", prompt_limit=100)
        options = Options(8, keep=tmp_path / "neighbours.jsonl")
        setting = Setting(shots=1, way=BY_MEANING)
        made = predict(None, "neighbours", [example("ax", "?")], setting=setting, context=context, limits=Limits(4), options=options)
        return [prediction.text for prediction in made]

    assert answers([example("ay", "A"), example("by", "B")]) == ["A"]
    assert answers([example("ay", "A"), example("by", "B")]) == ["A"]
    assert embedded == [2, 1], "kept on the disk"
    assert answers([example("ay", "C"), example("by", "B")]) == ["C"]
    assert embedded == [2, 1, 2, 1]
