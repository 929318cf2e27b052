"""Single checks: counted by hand, or by the reference library."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.errors import DataError, RecipeError
from burnish.recipe import build_recipe, load_recipe
from burnish.tasks import CHECKS, Material, Measure, Row, Unfit, find_metric, verify_checks
from burnish.tasks.behaviour import has_loop
from burnish.tasks.glossary import Glossary, read_glossary, stem
from burnish.tasks.json_schema import read_schema
from burnish.tasks.meaning import read_representation, slot_f1
from burnish.tasks.metrics import Unreadable
from burnish.tasks.tone import auc_interval, learn_tone


def made(name: str, settings: Any = True, **changes: Any) -> list[Measure]:
    given = {"kind": "text", "metric": find_metric("exact_match"), "train": ["x"] * 50, **changes}
    return CHECKS[name].measures(settings, Material(stack=ExitStack(), **given))


def value(measure: Measure, answer: str, reference: str = "r", **changes: Any) -> float | None:
    return measure.score(Row(0, changes.pop("prompt", ""), reference, answer, **changes)).value


# Functional representations


def test_slot_f1_by_hand() -> None:
    expected = read_representation("inform(name[Dirt: Showdown], esrb[E 10+ (for Everyone 10 and Older)], genres[driving/racing, sport])")
    assert expected.name == "inform"
    assert expected.slots == {
        ("name", "Dirt: Showdown"): 1,
        ("esrb", "E 10+ (for Everyone 10 and Older)"): 1,
        ("genres", "driving/racing, sport"): 1,
    }
    given = read_representation("inform(genres[sport, driving/racing], name[Dirt])")  # 1 of 2 right, 3 expected: F1 = 2/5
    assert slot_f1(given, expected) == pytest.approx(2 * 1 / (2 + 3))
    assert slot_f1(expected, expected) == 1.0
    twice = read_representation("inform(name[a], name[a])")  # 1 of 2, 1 expected: F1 = 2/3
    assert slot_f1(twice, read_representation("inform(name[a])")) == pytest.approx(2 / 3)
    assert slot_f1(read_representation("request()"), read_representation("request()")) == 1.0
    assert slot_f1(read_representation("request()"), expected) == 0.0
    assert read_representation("f(a[x[1], y])").slots == {("a", "x[1], y"): 1}


@pytest.mark.parametrize(
    "text",
    ["", "inform", "inform(", "inform(name)", "inform(name[a)", "inform(name[a] rating[b])", "inform(name[a]) and more", "(name[a])"],
)
def test_what_is_no_representation(text: str) -> None:
    with pytest.raises(Unreadable):
        read_representation(text)


def test_the_measures_of_representations() -> None:
    name, slots = made("meaning_representation")
    assert value(name, "confirm(name[a])", "inform(name[a])") == 0.0
    assert value(slots, "confirm(name[a])", "inform(name[a])") == 1.0
    assert name.score(Row(0, "", "inform(name[a])", "It is a.")).reason == "prediction is no name(slot[value], …)"


# JSON Schema


SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["on", "off"]},
        "level": {"type": "integer", "minimum": 0, "multipleOf": 5},
        "code": {"pattern": "^[A-Z]{2}$"},
    },
    "patternProperties": {"^x_": {"type": "string"}},
    "additionalProperties": False,
    "required": ["intent"],
}


def test_json_schema_agrees_with_jsonschema_itself(tmp_path: Path) -> None:
    import itertools

    import jsonschema

    path = tmp_path / "schema.json"
    pieces: list[dict[str, Any]] = [{"intent": "on"}, {"intent": "x"}, {"level": 5}, {"level": 5.0}, {"level": 7}, {"level": True}, {"code": "AB"}, {"code": "abc"},
                                    {"x_a": "b"}, {"x_a": 1}, {"other": 1}]  # fmt: skip
    for additional in (False, True, {"type": "integer"}):
        schema = {**SCHEMA, "additionalProperties": additional}
        path.write_text(json.dumps(schema))
        score = read_schema(path)
        reference = jsonschema.Draft202012Validator(schema)
        seen = set()
        for parts in itertools.combinations(pieces, 3):
            instance = {key: item for part in parts for key, item in part.items()}
            expected = reference.is_valid(instance)
            seen.add(expected)
            assert score(json.dumps(instance)).value == float(expected), instance
        assert seen == {True, False}
    assert score('```json\n{"intent": "on"}\n```').value == 1.0
    assert score("[1]").value == 0.0
    assert score("on").reason == "prediction is not JSON (Expecting value)"


def test_a_pattern_that_would_run_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.tasks import json_schema

    monkeypatch.setattr(json_schema, "PATTERN_SECONDS", 0.02)
    path = tmp_path / "schema.json"
    bomb = "a" * 60 + "!"
    for schema, text in (
        ({"pattern": "^(a|aa)+$"}, json.dumps(bomb)),
        ({"patternProperties": {"^(a|aa)+$": {}}}, json.dumps({bomb: 1})),
        ({"additionalProperties": False, "patternProperties": {"^(a|aa)+$": {}}}, json.dumps({bomb: 1})),
        ({"propertyNames": {"pattern": "^(a|aa)+$"}}, json.dumps({bomb: 1})),
    ):
        path.write_text(json.dumps(schema))
        assert "busy" in str(read_schema(path)(text).reason)
    (measure,) = made("regex", "^(a|aa)+$")
    assert "busy" in str(measure.score(Row(0, "", "", bomb)).reason)


def test_wrong_schemas_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    for text, words in (
        ("{", "cannot be read as JSON"),
        ('{"type": "objekt"}', "not a JSON Schema"),
        ('{"$ref": "http://127.0.0.1:9/x.json"}', "must point into the file"),
        ('{"patternProperties": {"a": {}}, "unevaluatedProperties": false}', "unevaluatedProperties"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_schema(path)


# Glossary


def glossary(tmp_path: Path, text: str) -> Glossary:
    path = tmp_path / "terms.csv"
    path.write_text(text, encoding="utf-8")
    return Glossary(read_glossary(path))


@pytest.mark.parametrize(
    ("forms", "language"),
    [
        (("invoice", "Invoices", "invoiced", "invoicing"), "en"),
        (("policy", "policies"), "en"),
        (("ship", "ships", "shipped", "shipping"), "en"),
        (("Vertrag", "Verträge", "Vertrages", "Verträgen"), "de"),
        (("Rechnung", "Rechnungen"), "de"),
        (("général", "générale", "généraux"), "fr"),
        (("factura", "facturas"), "es"),
    ],
)
def test_forms_of_a_word_have_one_stem(forms: tuple[str, ...], language: str) -> None:
    assert len({stem(form, language) for form in forms}) == 1


@pytest.mark.parametrize(("a", "b"), [("business", "busy"), ("bus", "but"), ("rating", "ration"), ("policy", "police")])
def test_other_words_have_other_stems(a: str, b: str) -> None:
    assert stem(a, "en") != stem(b, "en")


def test_preferred_and_forbidden_terms(tmp_path: Path) -> None:
    terms = glossary(
        tmp_path,
        "preferred,forbidden,context,language\ncredit card,card; plastic money,Kreditkarte,en\ncustomer,client;patron,Kunde,en\nE-Mail,Email,,de\nLogin,log-in,,en\n",
    )
    preferred = lambda answer, reference, prompt="": terms.preferred(answer, reference, prompt).value  # noqa: E731
    forbidden = lambda answer, reference="": terms.forbidden(answer, reference).value  # noqa: E731
    assert preferred("Our customers pay.", "The customer pays by credit card.") == 0.5
    assert preferred("They pay by credit cards, the customer does.", "The customer pays by credit card.") == 1.0
    assert preferred("The client pays.", "nothing", "Der Kunde zahlt") == 0.0
    assert preferred("x", "nothing") is None
    assert forbidden("He pays by credit card.") == 1.0, "a part of the preferred term is none of its own"
    assert forbidden("He pays by credit card; the card is new.") == 0.0
    assert forbidden("Two clients.") == 0.0
    assert forbidden("Two clients.", "a client") == 1.0, "the reference says it, too"
    assert forbidden("Eine Email") == 0.0
    assert forbidden("Eine E-Mail an clientele") == 1.0
    assert forbidden("log-in") == 0.0
    assert forbidden("Login") == 1.0


def test_a_forbidden_form_of_the_preferred_word(tmp_path: Path) -> None:
    terms = glossary(tmp_path, "preferred,forbidden,language\nGitHub,Github;github,en\n")
    assert terms.forbidden("on Github", "").value == 0.0
    assert terms.forbidden("on GitHub", "").value == 1.0
    assert terms.preferred("on Github", "on GitHub", "").value == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "columns preferred"),
        ("term,bad\na,b\n", "columns preferred"),
        ("preferred,forbidden\n", "0 terms"),
        ("preferred,forbidden\na,b,c\n", "terms.csv:2 — more cells"),
        ("preferred,forbidden\n,\n", "terms.csv:2 — neither"),
        ("preferred,forbidden\na,x;a\n", "preferred and forbidden"),
        ("preferred,forbidden,language\na,b,xx\n", "language 'xx'"),
    ],
)
def test_a_wrong_glossary_names_its_lines(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        glossary(tmp_path, text)


# Form and behaviour


def test_sections_stand_in_order() -> None:
    (measure,) = made("sections", ["Findings", "Impression"])
    for text in (
        "Findings: a\nImpression: b",
        "## Findings\na\n\n## IMPRESSION\nb",
        "1. **Findings**\na\n**Impression:** b",
        "Findings:a\n\nImpression\n",
    ):
        assert value(measure, text) == 1.0, text
    for text in ("Impression: b\nFindings: a", "Findings: a", "The findings: a\nThe impression: b", ""):
        assert value(measure, text) == 0.0, text


def test_numbers_as_the_references_give_them() -> None:
    (measure,) = made("number", train=["2 + 2 = 4\n#### 4"] * 20)
    assert [value(measure, text) for text in ("so\n#### 4", "it is 4", "#### none", "no")] == [1.0, 0.0, 0.0, 0.0]
    (measure,) = made("number", train=["about 4"] * 20)
    assert [value(measure, text) for text in ("it is 4", "no")] == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I have no view.",
        "I cannot answer this.",
        "Es tut mir leid, das geht nicht.",
        "Lo siento, no puedo ayudar.",
    ],
)
def test_refusals(text: str) -> None:
    (measure,) = made("refusal")
    assert value(measure, text) == 1.0
    assert value(measure, "x", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "The door can't be opened from outside.",
        "SELECT apology FROM t",
        "I can see two of them.",
        "I'm sorry to hear that your card was lost. You can order a new one.",
        "Es tut mir leid, dass Sie warten mussten.",
        "x" * 300 + "I'm sorry",
    ],
)
def test_no_refusals(text: str) -> None:
    (measure,) = made("refusal")
    assert value(measure, text) == 0.0


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("no no no no no no no no", True),
        ("very very good", False),
        ("I see the cat. " * 4, True),
        ("I see the cat. " * 3, False),
        ("ab" * 40, True),
        ("-" * 59, False),
        ("-" * 60, True),
        ("one two three four five six seven eight nine ten", False),
        ("start then a b c " + "a b c " * 4 + "and an end", True),
        ("1 2 1 2 1 2 1 3 1 2 1 2 1 2", False),
    ],
)
def test_loops_by_hand(text: str, loops: bool) -> None:
    assert has_loop(text) is loops


def test_length_and_finish() -> None:
    (measure,) = made("length")
    assert [value(measure, "a" * n, "r" * 100) for n in (39, 40, 210, 211)] == [0.0, 1.0, 1.0, 0.0]
    (measure,) = made("finished")
    assert [value(measure, "a", finish_reason=reason) for reason in ("stop", "length", "stop_text")] == [0.0, 1.0, 0.0]


def test_self_consistency_counts_pairs() -> None:
    (measure,) = made("self_consistency", has_samples=True)
    assert value(measure, "a", samples=("x", "x", "x ", "y")) == pytest.approx(3 / 6)  # xx xx xx of six pairs
    assert value(measure, "a", samples=("x",) * 5) == 1.0
    assert value(measure, "a") is None
    with pytest.raises(Unfit, match="no answers were drawn"):
        made("self_consistency")


# Tone


def voices(n: int) -> tuple[list[str], list[str]]:
    random = np.random.default_rng(1)
    things = ["the lamp", "the door", "a kettle", "my bicycle", "our garden", "the printer", "this chair", "her phone"]
    pick = lambda: f"{random.choice(things)} number {random.integers(99)}"  # noqa: E731
    formal = [f"We kindly confirm that {pick()} has been inspected and found in order." for _ in range(n)]
    casual = [f"yeah so {pick()} looks ok to me i guess, lol" for _ in range(n)]
    return formal, casual


def test_tone_tells_two_voices_apart() -> None:
    formal, casual = voices(120)
    tone = learn_tone(formal[:80], casual[:40], references=formal[80:], groups=list(map(str, range(40))))
    assert tone.auc == 1.0
    assert tone.references_pass >= 0.95
    assert [tone.reads_like_training(formal[0], row) for row in range(5)] == [True] * 5
    assert not any(tone.reads_like_training(text, row) for row, text in enumerate(casual[40:80]))


def test_tone_refuses_where_there_is_none() -> None:
    formal, _ = voices(160)
    groups = list(map(str, range(60)))
    with pytest.raises(Unfit, match="read alike"):
        learn_tone(formal[:100], formal[100:160], references=formal[40:100], groups=groups)
    with pytest.raises(Unfit, match="too short"):
        learn_tone(["yes"] * 30, ["no"] * 30, references=["yes"] * 30, groups=groups[:30])
    with pytest.raises(Unfit, match="are needed"):
        learn_tone(formal[:5], formal[:5], references=formal[:5], groups=groups[:5])
    with pytest.raises(Unfit, match="one group"):
        learn_tone(formal[:100], formal[100:160], references=formal[:60], groups=["a"] * 60)


def test_no_row_is_judged_by_what_was_fitted_on_it() -> None:
    """Random texts: a classifier that had seen a row's own untrained answer would know it again; held out, it cannot."""
    random = np.random.default_rng(0)
    texts = [" ".join("".join(random.choice(list("abcdefgh"), 6)) for _ in range(8)) for _ in range(180)]
    with pytest.raises(Unfit, match="read alike"):
        learn_tone(texts[:60], texts[60:120], references=texts[120:], groups=list(map(str, range(60))))


def test_the_interval_of_an_area_is_that_of_hanley_and_mcneil() -> None:
    """Against simulation: for exponential scores, on which their formula rests, it is exact."""
    random = np.random.default_rng(0)
    positives, negatives, scale = 51, 58, 4.0
    ours = scale * random.exponential(size=(3000, positives, 1))
    areas = (ours > random.exponential(size=(3000, 1, negatives))).mean(axis=(1, 2))
    low, high = auc_interval(scale / (1 + scale), positives, negatives, z=1.0)
    assert areas.mean() == pytest.approx(scale / (1 + scale), abs=0.005)
    assert (high - low) / 2 == pytest.approx(areas.std(), rel=0.05)


# The recipe


def test_checks_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: rows.jsonl\nevaluation:\n  checks:\n    - glossary: terms.csv\n    - sql: {database: shop.sqlite}\n    - tone: true\n"
    )
    recipe = load_recipe(path)
    checks = recipe.evaluation.checks
    assert checks is not None
    assert [(check.name, check.settings) for check in checks][::2] == [("glossary", str(tmp_path / "terms.csv")), ("tone", True)]
    assert checks[1].settings.database == str(tmp_path / "shop.sqlite")
    assert build_recipe(recipe.to_dict()) == recipe


def test_wrong_checks_name_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: rows.jsonl\nevaluation:\n  checks:\n    - json: true\n    - regexx: a\n    - sql: {databas: b}\n"
        "    - regex: a\n      json: true\n    - self_consistency: {samples: 1}\n    - hello\n    - tone: false\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    lines = str(caught.value).splitlines()[1:]
    for number, words in (
        (6, "did you mean `regex`"),
        (7, "sql.databas"),
        (8, "found json and regex"),
        (10, "greater than or equal to 2"),
        (11, "hello"),
        (12, "tone"),
    ):
        assert any(f"recipe.yaml:{number} " in line and words in line for line in lines), (number, words, lines)


def test_broken_files_are_found_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "x.sqlite").write_text("no")
    sql = build_recipe(
        {"model": "m", "data": "d.jsonl", "evaluation": {"checks": [{"sql": {"database": str(tmp_path / "x.sqlite")}}]}}
    ).evaluation.checks
    assert sql is not None
    for name, settings in (("sql", sql[0].settings), ("glossary", str(tmp_path / "no.csv")), ("json_schema", str(tmp_path / "no.json"))):
        with pytest.raises(DataError):
            verify_checks([(name, settings)])
    with pytest.raises(RecipeError, match="no regular expression"):
        verify_checks([("regex", "(")])
