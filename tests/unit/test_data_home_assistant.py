"""The sampler of the embedded data: repeatable, split by template, unambiguous, and true to hassil's own reading."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.data import home_assistant
from burnish.errors import BurnishWarning, DataError

hassil = pytest.importorskip("hassil", reason="extra `demo`: hassil is not installed")
intents_package = pytest.importorskip("home_assistant_intents", reason="extra `demo`: home-assistant-intents is missing")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return home_assistant.sample(seed=0)


@pytest.fixture(scope="module")
def content() -> Any:
    path = Path(intents_package.__file__).parent / "data" / "en.json"
    return json.loads(path.read_text(encoding="utf-8"))


def said(row: Row) -> str:
    return str(row["messages"][0]["content"])


def meaning(row: Row) -> dict[str, Any]:
    return dict(json.loads(row["messages"][1]["content"]))


def of(rows: list[Row], split: str) -> list[Row]:
    return [row for row in rows if row["split"] == split]


def test_delivers_what_was_asked(rows: list[Row]) -> None:
    assert [len(of(rows, split)) for split in home_assistant.SPLITS] == [3000, 200, 400]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert "CC BY 4.0" in home_assistant.ATTRIBUTION


def test_fewer_than_asked_is_said() -> None:
    with pytest.warns(BurnishWarning, match=r"\d+ of 3000 train rows") as caught:
        found = home_assistant.sample(language="mn", train=3000, validation=0, test=0)
    assert 0 < len(found) < 3000
    assert f"{len(found)} of 3000" in str(caught[0].message)


def test_same_bytes_in_every_process() -> None:
    script = (
        "import hashlib, json; from burnish.data.home_assistant import sample; "
        "print(hashlib.sha256(json.dumps(sample(train=300, validation=20, test=40, seed=3)).encode()).hexdigest())"
    )
    here = home_assistant.sample(train=300, validation=20, test=40, seed=3)
    digests = {hashlib.sha256(json.dumps(here).encode()).hexdigest()}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout.strip())
    assert len(digests) == 1
    other = home_assistant.sample(train=300, validation=20, test=40, seed=4)
    assert [said(row) for row in here] != [said(row) for row in other]


def test_a_template_lives_in_one_split(rows: list[Row]) -> None:
    groups = [{row["group"] for row in of(rows, split)} for split in home_assistant.SPLITS]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_every_intent_is_trained(rows: list[Row], content: Any) -> None:
    assert {row["metadata"]["intent"] for row in of(rows, "train")} == set(content["intents"])


def test_an_utterance_has_one_split_and_one_meaning(rows: list[Row]) -> None:
    loose = [re.sub(r"\b(the|my|our|an?|please|can you|could you)\b|\s", "", said(row).casefold()) for row in rows]
    first: dict[str, Row] = {}
    for key, row in zip(loose, rows, strict=True):
        other = first.setdefault(key, row)
        assert (other["split"], meaning(other)) == (row["split"], meaning(row)), said(row)
    assert len({said(row) for row in rows}) == len(rows)


def test_utterances_are_clean(rows: list[Row]) -> None:
    for row in rows:
        text = said(row)
        assert text == " ".join(text.split())
        assert not re.search(r"[\[\]{}()<>|‹›]", text), text
        assert len(text.split()) <= home_assistant.MAX_WORDS


def test_every_slot_can_be_heard(rows: list[Row], content: Any) -> None:
    """A value is a word or number of the sentence, or a list's `out`; never something only the home knows."""
    outs = {value["out"] for described in content["lists"].values() for value in described.get("values", [])}
    fixed = {"cover", "light", "fan", "switch", "lock", "person"}
    for row in rows:
        line = row["messages"][1]["content"]
        answer = meaning(row)
        assert "\n" not in line
        assert next(iter(answer)) == "intent"
        for key, value in answer.items():
            if key == "intent" or value in outs or (key == "domain" and value in fixed):
                continue
            shown = str(abs(value)) if isinstance(value, int | float) else value
            assert re.search(rf"(?<![\w.]){re.escape(shown)}(?![^\Wk])", said(row)), row


def test_words_of_the_test_split_are_unseen(rows: list[Row]) -> None:
    def words(split: str, key: str) -> set[str]:
        return {str(meaning(row)[key]) for row in of(rows, split) if key in meaning(row)}

    for key in ("area", "name", "floor"):
        known = words("train", key) | words("validation", key)
        assert words("test", key) - known, key
        assert words("test", key) & known, key
    fresh = [row for row in of(rows, "test") if row["metadata"]["unseen_words"]]
    assert 0.2 < len(fresh) / len(of(rows, "test")) < 0.7
    assert not any(row["metadata"]["unseen_words"] for row in rows if row["split"] != "test")


def test_hassil_reads_the_same_meaning(rows: list[Row], content: Any) -> None:
    """The second source: hassil's own recogniser, given our words, finds our meaning in our sentence."""
    from hassil.intents import Intents, TextSlotList
    from hassil.recognize import recognize_all

    for row in rows[::23]:
        answer = meaning(row)
        blocks = content["intents"][answer["intent"]]["data"]
        anywhere = [{key: value for key, value in block.items() if key != "requires_context"} for block in blocks]
        intents = Intents.from_dict({**content, "intents": {answer["intent"]: {"data": anywhere}}})
        lists = {key: TextSlotList.from_strings([str(answer.get(key, "nothing"))]) for key in ("name", "area", "floor")}
        found = recognize_all(said(row), intents, slot_lists=lists)
        readings = [{name: entity.value for name, entity in result.entities.items()} for result in found]
        wanted = {key: value for key, value in answer.items() if key != "intent"}
        assert any(wanted.items() <= plain(reading).items() for reading in readings), (row, readings)


def plain(reading: dict[str, Any]) -> dict[str, Any]:
    return {key: value.strip() if isinstance(value, str) else value for key, value in reading.items()}


def test_german_and_a_language_without_own_words() -> None:
    for language in ("de", "fr"):
        found = home_assistant.sample(language=language, train=100, validation=10, test=20)
        assert len(found) == 130
        assert all(said(row) and meaning(row)["intent"] for row in found)


def test_an_unknown_language_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"'xx'.*de, .*en, "):
        home_assistant.sample(language="xx")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "home_assistant_intents", None)
    with pytest.raises(DataError, match=r"burnish\[demo\]"):
        home_assistant.sample()
