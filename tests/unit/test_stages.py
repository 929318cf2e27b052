"""The recipe of a chain and what its gates say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.errors import RecipeError
from burnish.recipe import GateSection, Recipe, build_recipe, dump_recipe, load_recipe, stage_recipes
from burnish.training import carries_on, judge_gate


def chain(*stages: dict[str, Any], **changes: Any) -> Recipe:
    content = {"model": "m", "data": {"train": "/task.csv", "prompt_column": "q", "completion_column": "a", "max_length": 64}, **changes}
    return build_recipe({**content, "stages": list(stages)})


def test_a_stage_changes_what_it_names_and_keeps_the_rest() -> None:
    general, task = stage_recipes(
        chain(
            {"name": "general", "data": "/general.jsonl", "training": {"method": "lora", "epochs": 1}, "lora": {"rank": 4}},
            {"name": "task", "training": {"learning_rate": 1e-4}},
            training={"epochs": 5, "micro_batch_size": 2},
        )
    )
    assert (general.data.train, general.data.prompt_column, general.data.max_length) == ("/general.jsonl", None, 64), (
        "columns are the file's"
    )
    assert (general.training.epochs, general.training.micro_batch_size, general.lora.rank) == (1, 2, 4)
    assert (task.data.train, task.data.prompt_column, task.training.epochs, task.training.learning_rate) == ("/task.csv", "q", 5, 1e-4)
    assert (task.name, task.stages, task.lora.rank) == ("task", None, 16)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"name": "a", "training": {"learnin_rate": 1}}, "did you mean `training.learning_rate`"),
        ({"name": "a", "training": {"epochs": -1}}, "stages.a training.epochs"),
        ({"name": "a", "data": {"trian": "x"}}, "unknown key `data.trian`"),
        ({"name": "../a"}, "name"),
        ({"name": "a", "gate": {}}, "asks for `max_increase` or `min_gain`"),
        ({"name": "a", "gate": {"measure": "validation_score", "max_increase": 1}}, "is about a loss"),
        ({"name": "a", "gate": {"measure": "retention_loss", "max_increase": 0}}, "retention_loss needs rows"),
        ({"name": "b"}, "given twice"),
    ],
)
def test_what_is_wrong_with_a_stage_is_told(stage: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        chain(stage, {"name": "b"})
    assert expected in str(caught.value)


def test_paths_of_stages_count_from_the_recipes_folder(tmp_path: Path) -> None:
    text = """
model: m
data: task.jsonl
stages:
  - {name: one, data: general.jsonl, gate: {measure: retention_loss, data: kept.jsonl, max_increase: 0.1}}
  - {name: two, data: {train: ../more.jsonl}}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.stages is not None
    first, second = recipe.stages
    assert first.data == {"train": str(tmp_path / "general.jsonl")}
    assert first.gate is not None
    assert first.gate.data == str(tmp_path / "kept.jsonl")
    assert second.data == {"train": str(tmp_path.parent / "more.jsonl")}
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("gate", "before", "after", "passed"),
    [
        ({"min_gain": 0.5}, 3.0, 2.4, True),
        ({"min_gain": 0.5}, 3.0, 2.6, False),
        ({"max_increase": 0.1}, 3.0, 3.05, True),
        ({"max_increase": 0.1}, 3.0, 3.2, False),
        ({"max_increase": 0.0}, 3.0, 2.9, True),
        ({"measure": "validation_score", "min_gain": 0.1}, 0.2, 0.35, True),
        ({"measure": "validation_score", "min_gain": 0.1}, 0.2, 0.25, False),
        ({"measure": "validation_score", "min_gain": -0.1}, 0.2, 0.15, True),
        ({"min_gain": 0.1, "max_increase": 0.0}, 3.0, 3.1, False),
    ],
)
def test_gates(gate: dict[str, Any], before: float, after: float, passed: bool) -> None:
    said = judge_gate(GateSection.model_validate(gate), before, after)
    assert said["passed"] is passed
    assert f"{before:.4f} → {after:.4f}" in said["sentence"]
    assert said["gain"] == pytest.approx(after - before if "measure" in gate else before - after)


def test_adapters_are_carried_on_where_they_have_the_same_shape() -> None:
    same, rank, method, full = stage_recipes(
        chain(
            {"name": "same", "training": {"learning_rate": 1e-5}},
            {"name": "rank", "lora": {"rank": 8}},
            {"name": "method", "training": {"method": "dora"}},
            {"name": "full", "training": {"method": "full"}},
        )
    )
    assert carries_on(same, same)
    assert not any(carries_on(same, other) for other in (rank, method, full))
    assert not carries_on(full, full), "whole weights are loaded, not carried on as an adapter"
