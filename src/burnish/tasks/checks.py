"""CHECKS: what an answer must keep to besides being right, each check turned into measures of single answers.

To add a check: write a function (settings, Material) → measures, add a line to CHECKS, and its key to `recipe/checks.py`. A measure follows the
rule of all scores: what cannot be judged is unscored with a reason; a reason that begins with "reference" leaves the row out for every
candidate alike, any other counts as 0 and is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import regex

from burnish.errors import DataError, RecipeError, missing_extra
from burnish.tasks.behaviour import has_loop, is_refusal
from burnish.tasks.glossary import Glossary, read_glossary
from burnish.tasks.json_schema import PATTERN_SECONDS, read_schema, search
from burnish.tasks.meaning import read_representation, slot_f1
from burnish.tasks.metrics import Metric, Unreadable, metric_from, number_of, parse_json
from burnish.tasks.sql import TIME_LIMIT_SECONDS, check_database, open_runner, score_parse, score_rows_found
from burnish.tasks.tone import Unfit, learn_tone
from burnish.types import Score

MOST = 0.95  # share of training answers that must fit for a check to be chosen by itself
SHORTEST_LENGTH_CHARACTERS = 20  # median; shorter answers have no length to keep to
_LOOK = 2_000  # training answers looked at


@dataclass(frozen=True, slots=True)
class Row:
    """One answer and what it answers."""

    index: int  # among the test rows
    prompt: str  # all messages before the answer
    reference: str
    answer: str
    finish_reason: str = "stop"
    samples: tuple[str, ...] | None = None  # further answers, drawn at a temperature


@dataclass(frozen=True, slots=True)
class Measure:
    key: str
    title: str
    reads: str  # one sentence for the report
    score: Callable[[Row], Score]
    binary: bool = True
    lower_is_better: bool = False
    note: str | None = None  # what the reader must know of this data


@dataclass(frozen=True, slots=True)
class Material:
    """What checks are made from. `stack` closes what they open."""

    kind: str  # a key of TASKS
    metric: Metric
    train: Sequence[str]  # training answers
    references: Sequence[str] = ()  # of the test rows
    groups: Sequence[str] = ()
    untrained: Sequence[str] | None = None  # what the base model wrote to the test rows, zero-shot
    has_samples: bool = False
    seed: int = 0
    stack: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, slots=True)
class Check:
    measures: Callable[[Any, Material], list[Measure]]  # (settings of the recipe, …); Unfit: this data says nothing about it
    chosen: Callable[[Material], bool] = lambda material: False  # whether it is measured where the recipe names no checks
    verify: Callable[[Any], object] = lambda settings: None  # finds what is wrong with its files before anything is computed


def chosen_checks(material: Material) -> list[tuple[str, Any]]:
    """What is measured where the recipe names no checks: what the training answers show, and costs nothing."""
    return [(name, True) for name, check in CHECKS.items() if check.chosen(material)]


def verify_checks(checks: Sequence[tuple[str, Any]]) -> None:
    """Read the files that checks need: a broken glossary should not be found after the training. Raises DataError, RecipeError."""
    for name, settings in checks:
        CHECKS[name].verify(settings)


# Form


def _json(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        return Score(float(_reads(parse_json, row.answer)))

    return [Measure("json", "valid JSON", "The whole answer is one JSON value; one Markdown fence around it is looked through.", score)]


def _json_schema(settings: Any, material: Material) -> list[Measure]:
    fits = read_schema(Path(settings))
    reads = f"The answer is JSON and fits the schema {Path(settings).name}."
    return [Measure("json_schema", "fits the JSON Schema", reads, lambda row: fits(row.answer))]


def _regex(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        try:
            return Score(float(search(settings, row.answer)))
        except TimeoutError:
            return Score(None, f"prediction keeps the pattern busy for more than {PATTERN_SECONDS:g} s")

    return [Measure("regex", f"matches {settings}", "The pattern is found in the answer.", score)]


def _verify_regex(settings: Any) -> None:
    try:
        regex.compile(settings)
    except regex.error as problem:
        raise RecipeError(f"evaluation.checks: regex {settings!r} is no regular expression: {problem}") from None


def _sections(settings: Any, material: Material) -> list[Measure]:
    # A heading: alone on its line, or before a colon; in Markdown, bold, numbered, or bare.
    patterns = [
        re.compile(
            rf"^[ \t]*(?:#{{1,6}}[ \t]*)?(?:\d+[.)][ \t]*)?[*_]{{0,3}}{re.escape(name)}[*_]{{0,3}}[ \t]*(?::|$)",
            re.IGNORECASE | re.MULTILINE,
        )
        for name in settings
    ]

    def score(row: Row) -> Score:
        place = 0
        for pattern in patterns:
            found = pattern.search(row.answer, place)
            if found is None:
                return Score(0.0)
            place = found.end()
        return Score(1.0)

    reads = f"The headings {', '.join(settings)} all stand in the answer, in this order."
    return [Measure("sections", "required sections", reads, score)]


def _number(settings: Any, material: Material) -> list[Measure]:
    marked = _share(material.train, lambda text: "####" in text) >= MOST

    def score(row: Row) -> Score:
        return Score(float(_reads(number_of, row.answer) and ("####" in row.answer or not marked)))

    reads = "The answer gives a number" + (" after ####, as the references do." if marked else ".")
    return [Measure("number", "gives a number", reads, score)]


def _meaning(settings: Any, material: Material) -> list[Measure]:
    name = metric_from(read_representation, lambda given, expected: float(given.name == expected.name))
    slots = metric_from(read_representation, slot_f1)
    return [
        Measure("function_name", "function name right", "The name before the parenthesis is the reference's.", lambda row: name(row.answer, row.reference)),
        Measure("slot_f1", "slot F1", "F1 of the slots, each a name and its value; the order of slots and of lists is free.",
                lambda row: slots(row.answer, row.reference), binary=False),
    ]  # fmt: skip


def _sql(settings: Any, material: Material) -> list[Measure]:
    database = getattr(settings, "database", None)
    limit = float(getattr(settings, "time_limit_seconds", TIME_LIMIT_SECONDS))
    runner = material.stack.enter_context(open_runner(database, time_limit_seconds=limit))
    parses = Measure(
        "sql_parses", "SQL parses", "SQLite takes the statement, on the tables of the database or of the row's CREATE TABLE.",
        lambda row: score_parse(runner, row.answer, row.reference, "" if database else row.prompt),
    )  # fmt: skip
    if database is None:
        return [parses]
    runs = Measure(
        "sql_rows", "SQL finds the same rows", f"On {Path(database).name} the statement finds the rows that the reference finds.",
        lambda row: score_rows_found(runner, row.answer, row.reference),
    )  # fmt: skip
    return [parses, runs]


def _verify_sql(settings: Any) -> None:
    if settings.database is not None:
        check_database(Path(settings.database))


# Words


def _glossary(settings: Any, material: Material) -> list[Measure]:
    glossary = Glossary(read_glossary(Path(settings)))
    return [
        Measure("preferred_terms", "preferred terms used",
                "Of the glossary's terms that reference or input call for, the share that the answer uses, in any regular form.",
                lambda row: glossary.preferred(row.answer, row.reference, row.prompt), binary=False),
        Measure("forbidden_terms", "no forbidden term", "The answer has no forbidden term of the glossary that its reference has not, too.",
                lambda row: glossary.forbidden(row.answer, row.reference)),
    ]  # fmt: skip


def _verify_tone(settings: Any) -> None:
    with missing_extra("checks", "the check tone", DataError):
        import sklearn  # noqa: F401


def _tone(settings: Any, material: Material) -> list[Measure]:
    if material.untrained is None:
        raise Unfit("the base model did not answer: there is no other voice to tell from (evaluation.candidates without base)")
    tone = learn_tone(material.train, material.untrained, references=material.references, groups=material.groups, seed=material.seed)
    note = (
        f"The classifier tells references from untrained answers with AUC {tone.auc:.2f} [{tone.low:.2f}, {tone.high:.2f}]; "
        f"{100 * tone.references_pass:.0f} % of the references themselves pass."
    )

    def score(row: Row) -> Score:
        return Score(float(tone.reads_like_training(row.answer, row.index)))

    return [Measure("tone", "house tone", "It reads like the training answers rather than like the untrained model.", score, note=note)]


# Behaviour


def _refusal(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        if is_refusal(row.reference):
            return Score(None, "reference refuses, too")
        return Score(float(is_refusal(row.answer)))

    reads = "The answer begins by saying that it cannot answer (phrases in English, German, French and Spanish)."
    return [Measure("refusal", "refusals", reads, score, lower_is_better=True)]


def _repetition(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        if has_loop(row.reference):
            return Score(None, "reference repeats itself, too")
        return Score(float(has_loop(row.answer)))

    return [
        Measure("repetition", "loops", "The answer says the same words or characters four times in a row.", score, lower_is_better=True)
    ]


def _finished(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        return Score(float(row.finish_reason == "length"))

    return [Measure("unfinished", "never-ending answers", "The answer was cut at evaluation.max_new_tokens.", score, lower_is_better=True)]


def _length(settings: Any, material: Material) -> list[Measure]:
    def score(row: Row) -> Score:
        given, expected = len(row.answer.strip()), len(row.reference.strip())
        return Score(float(expected / 2 - 10 <= given <= 2 * expected + 10))

    reads = "The answer is between half and twice as long as its reference (in characters, give or take 10)."
    return [Measure("length", "length of the references", reads, score)]


def _self_consistency(settings: Any, material: Material) -> list[Measure]:
    if not material.has_samples:
        raise Unfit("no answers were drawn: `burnish evaluate` draws them where the recipe's checks ask for self_consistency")

    def same(left: str, right: str) -> float:
        return material.metric.score(left, right).value or 0.0

    def score(row: Row) -> Score:
        if not row.samples:
            return Score(None, "reference row was not among those asked several times")
        pairs = list(combinations(row.samples, 2))
        return Score(sum(same(left, right) for left, right in pairs) / len(pairs))

    reads = (
        f"How far two drawn answers to the same question agree ({material.metric.title.lower()} of one against the other, over all pairs)."
    )
    return [Measure("self_consistency", "agrees with itself", reads, score, binary=False)]


def _judge(settings: Any, material: Material) -> list[Measure]:
    raise Unfit("`burnish judge RUN` asks the endpoint; what it found stands in a section of its own")


def _share(texts: Sequence[str], fits: Callable[[str], bool]) -> float:
    looked = texts[:_LOOK]
    return sum(map(fits, looked)) / len(looked) if looked else 0.0


def _reads(read: Callable[[str], Any], text: str) -> bool:
    try:
        read(text)
    except Unreadable:
        return False
    return True


def _is_sql(material: Material) -> bool:
    return _share(material.train, lambda text: re.match(r"\s*(select|with)\b", text, re.IGNORECASE) is not None) >= MOST


def _is_meaning(material: Material) -> bool:
    return _share(material.train, lambda text: _reads(read_representation, text)) >= MOST


def _has_length(material: Material) -> bool:
    lengths = sorted(map(len, material.train[:_LOOK]))
    return bool(lengths) and lengths[len(lengths) // 2] >= SHORTEST_LENGTH_CHARACTERS


# In the order of the report.
CHECKS: dict[str, Check] = {
    "json": Check(_json, chosen=lambda material: material.kind == "json"),
    "json_schema": Check(_json_schema, verify=lambda path: read_schema(Path(path))),
    "regex": Check(_regex, verify=_verify_regex),
    "sections": Check(_sections),
    "number": Check(_number, chosen=lambda material: material.kind == "numeric"),
    "sql": Check(_sql, chosen=_is_sql, verify=_verify_sql),
    "meaning_representation": Check(_meaning, chosen=_is_meaning),
    "glossary": Check(_glossary, verify=lambda path: read_glossary(Path(path))),
    "tone": Check(_tone, verify=_verify_tone),
    "self_consistency": Check(_self_consistency),
    "judge": Check(_judge),
    "refusal": Check(_refusal, chosen=lambda material: True),
    "repetition": Check(_repetition, chosen=lambda material: True),
    "finished": Check(_finished, chosen=lambda material: True),
    "length": Check(_length, chosen=_has_length),
}
