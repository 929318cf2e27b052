"""Checks in a whole run on a tiny model: drawn answers, the numbers in comparison.json, the section of the report."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest
from test_pipeline import tiny_recipe

from burnish import pipeline
from burnish.errors import DataError
from burnish.run import Run
from conftest import colour_rows

CHECKS = [{"regex": "^[a-z]+ [a-z]+"}, {"repetition": True}, {"self_consistency": {"samples": 3, "rows": 6}}, {"tone": True}]


@pytest.fixture(scope="module")
def checked(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("checked")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(120)))
    recipe = tiny_recipe(tiny_folder, data, evaluation={"candidates": ["base", "tuned"], "checks": CHECKS})
    return pipeline.run_recipe(recipe, folder=folder / "run")


def test_the_numbers_are_those_of_the_answers(checked: Run) -> None:
    content = checked.read_json(checked.comparison_file)["consistency"]
    measures = {measure["key"]: measure for measure in content["measures"]}
    assert list(measures) == ["regex", "repetition", "self_consistency"]
    assert content["refused"][0]["check"] == "tone"
    assert "too short" in content["refused"][0]["reason"]
    for name in ("base", "tuned"):
        drawn: dict[str, list[str]] = {}
        for row in checked.read_jsonl(checked.samples_file(name)):
            if "draw" in row:
                drawn.setdefault(row["example"], []).append(" ".join(row["text"].split()))
        assert len(drawn) == 6
        assert all(len(texts) == 3 for texts in drawn.values())
        agreed = [sum(a == b for a, b in combinations(texts, 2)) / 3 for texts in drawn.values()]
        assert measures["self_consistency"]["candidates"][name]["value"] == pytest.approx(sum(agreed) / 6, abs=1e-6)
    assert set(measures["regex"]["comparisons"]) == {"tuned"}


def test_draws_are_not_made_again(checked: Run) -> None:
    before = {name: checked.samples_file(name).read_bytes() for name in ("base", "tuned")}
    lines = before["tuned"].splitlines(keepends=True)
    checked.samples_file("tuned").write_bytes(b"".join(lines[:-5]))  # a run that was cut off
    status = checked.status()
    del status["steps"]["evaluate"]
    checked.write_json(checked.status_file, status)
    pipeline.evaluate(checked)
    assert checked.samples_file("base").read_bytes() == before["base"]
    assert sorted(checked.samples_file("tuned").read_bytes().splitlines(keepends=True)) == sorted(lines), "the same draws as before"


def test_a_broken_file_is_told_before_the_rows_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(60)))
    recipe = tiny_recipe(tiny_folder, data, evaluation={"checks": [{"glossary": str(tmp_path / "none.csv")}]})
    with pytest.raises(DataError, match=r"none\.csv"):
        pipeline.prepare(Run.create(tmp_path / "run", recipe))
