"""What every entry of CHECKS keeps to."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import pytest

from burnish.recipe import CHECK_NAMES, CheckSection
from burnish.tasks import CHECKS, Material, Row, Unfit, chosen_checks, find_metric, verify_checks
from burnish.types import Score

TRAIN = [f"The colour of thing number {n} is a deep and quiet blue, we are glad to say." for n in range(60)]
HOSTILE = ["", " ", "\x00", "\ud800", "a" * 200_000, "[" * 50_000, "(" * 5000, "```json\n```", "SELECT", "inform(", "inform(name[a]", "1e999999", "<script>", "%s%n", "𝔘𝔫𝔦", "\n" * 1000]  # fmt: skip


def settings_of(name: str, folder: Path) -> Any:
    (folder / "schema.json").write_text('{"type": "object"}')
    (folder / "terms.csv").write_text("preferred,forbidden\nblue,navy\n")
    given: dict[str, Any] = {
        "json_schema": str(folder / "schema.json"), "glossary": str(folder / "terms.csv"), "regex": "^The", "sections": ["One", "Two"],
        "judge": {"rubric": "r.md"},
    }  # fmt: skip
    return CheckSection.model_validate({name: given.get(name, True)}).settings


def material(stack: ExitStack) -> Material:
    untrained = [f"Sure! Thing {n}? I guess it might be blue or so, who knows!!" for n in range(30)]
    return Material(
        "text", find_metric("rouge_l"), TRAIN, references=TRAIN[:30], groups=list(map(str, range(30))), untrained=untrained, has_samples=True,
        stack=stack,
    )  # fmt: skip


def test_the_recipe_knows_the_same_checks() -> None:
    assert sorted(CHECKS) == sorted(CHECK_NAMES)
    assert get_args(CheckSection.model_fields["tone"].annotation)


@pytest.mark.parametrize("name", CHECKS)
def test_no_text_makes_a_check_raise(name: str, tmp_path: Path) -> None:
    settings = settings_of(name, tmp_path)
    if name != "judge":
        verify_checks([(name, settings)])
    with ExitStack() as stack:
        try:
            measures = CHECKS[name].measures(settings, material(stack))
        except Unfit:
            measures = []
        assert bool(measures) == (name != "judge")
        for measure in measures:
            assert measure.title
            assert measure.reads.endswith(".")
            for text in HOSTILE:
                for row in (Row(0, text, "The colour is blue.", text, samples=(text, text)), Row(1, "q", text, "The colour is blue.")):
                    score = measure.score(row)
                    assert isinstance(score, Score)
                    assert (score.value is None) == (score.reason is not None)
                    assert score.value is None or 0 <= score.value <= 1
                    assert not measure.binary or score.value in (None, 0.0, 1.0)


@pytest.mark.parametrize("name", CHECKS)
def test_whether_a_row_counts_depends_on_reference_and_input_alone(name: str, tmp_path: Path) -> None:
    """Else two candidates would not be compared on the same rows."""
    with ExitStack() as stack:
        try:
            measures = CHECKS[name].measures(settings_of(name, tmp_path), material(stack))
        except Unfit:
            return
        for measure in measures:
            for reference in (TRAIN[0], "I'm sorry, but I cannot help.", "a b " * 40, "inform(name[a])", "SELECT 1", "{}", ""):
                out = set()
                for answer in (TRAIN[1], "", "SELECT 1", "navy blue", '{"a": 1}', "inform(name[a])"):
                    reason = measure.score(Row(0, "blue?", reference, answer, samples=(answer, answer))).reason
                    out.add(reason is not None and reason.startswith("reference"))
                assert len(out) == 1


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([json.dumps({"intent": "on", "n": n}) for n in range(50)], {"json"}),
        ([f"SELECT a FROM t WHERE b = {n}" for n in range(50)], {"sql"}),
        ([f"inform(name[Game {n}], rating[good])" for n in range(50)], {"meaning_representation"}),
        ([f"Add them: {n} + 1.\n#### {n + 1}" for n in range(50)], {"number"}),
        (["yes", "no"] * 25, set()),
        (TRAIN, set()),
    ],
)
def test_chosen_by_the_training_answers(references: list[str], expected: set[str]) -> None:
    from burnish.tasks import detect_task

    task = detect_task(references)
    names = [name for name, _ in chosen_checks(Material(task.kind, find_metric(task.metric), references))]
    assert {"refusal", "repetition", "finished"} <= set(names)
    assert set(names) - {"refusal", "repetition", "finished", "length"} == expected
    assert ("length" in names) == (references[0] != "yes")
