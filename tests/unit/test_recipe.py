from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from burnish.errors import RecipeError
from burnish.pipeline import DEMO, demo_recipe
from burnish.recipe import MAX_LEAVES, PEERS_NAMES, build_recipe, differences, dump_recipe, explain, leaves, load_recipe, schema

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_two_lines_suffice(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "model: gemma-3-270m\ndata: rows.jsonl\n"))
    assert recipe.model.name == "gemma-3-270m"
    assert recipe.data.train == str(tmp_path / "rows.jsonl"), "paths count from the recipe's folder"


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d.jsonl\ntraining:\n  epochs: 2\n  learnin_rate: 1e-4\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert f"{path}:5 training.learnin_rate" in str(caught.value)
    assert "did you mean `training.learning_rate`?" in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "modl: m\ntraining:\n  epochs: -1\n  schedule: sine\nevaluation:\n  shots: [0]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert all(
        part in text
        for part in ("recipe.yaml:1 modl", "training.epochs", "training.schedule", "evaluation.shots", "model — missing", "data — missing")
    )


@pytest.mark.parametrize("peer", PEERS_NAMES)
def test_peers_names_are_translated(peer: str) -> None:
    assert PEERS_NAMES[peer] in dict(leaves()), f"{PEERS_NAMES[peer]} is no key"
    with pytest.raises(RecipeError) as caught:
        build_recipe({"model": "m", "data": "d", "training": {peer: 1}})
    if peer not in {key.rsplit(".", 1)[-1] for key in dict(leaves()) if key.startswith("training.")}:
        assert f"`{PEERS_NAMES[peer]}`" in str(caught.value)


def test_overrides_beat_the_file_and_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndata: d.jsonl\n")
    recipe = load_recipe(path, ["training.learning_rate=2e-4", "data.test_rows=50", "model.dtype=float32"])
    assert (recipe.training.learning_rate, recipe.data.test_rows, recipe.model.name, recipe.model.dtype) == (2e-4, 50, "m", "float32")
    with pytest.raises(RecipeError, match=r"unknown key `training\.nothing`"):
        load_recipe(path, ["training.nothing=1"])
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        load_recipe(path, ["training.epochs"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "mapping"),
        ("- a\n", "mapping"),
        ("model: [\n", "not valid YAML"),
        ("model: m\nmodel: n\ndata: d\n", "given twice"),
        ("model: m\ndata: {train: d, prompt_column: q}\n", "go together"),
        ("name: ../escape\nmodel: m\ndata: d\n", "name"),
    ],
)
def test_broken_recipes_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe(write(tmp_path, text))


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="burnish init"):
        load_recipe(tmp_path / "none.yaml")


def test_scientific_numbers_are_numbers(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "model: m\ndata: d\ntraining: {learning_rate: 1e-5}\n")).training.learning_rate == 1e-5


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    recipe = build_recipe({"model": "m", "data": str(tmp_path / "d.jsonl"), "training": {"learning_rate": 3e-5, "epochs": 2}})
    assert not differences(recipe, load_recipe(write(tmp_path, dump_recipe(recipe))))
    other = build_recipe({"model": "m", "data": str(tmp_path / "d.jsonl"), "seed": 1})
    assert differences(recipe, other) == {"seed": (0, 1), "training.learning_rate": (3e-5, "auto"), "training.epochs": (2.0, 3.0)}


def test_a_knob_is_a_debt() -> None:
    rows = explain()
    assert len(rows) == len(list(leaves())) <= MAX_LEAVES
    assert all(row["meaning"] and row["meaning"] != "None" for row in rows)
    assert explain("training.epochs")[0]["default"] == "3.0"
    with pytest.raises(RecipeError, match="did you mean"):
        explain("training.epoch_count")


def test_schema_takes_the_short_forms() -> None:
    import jsonschema

    content = schema()
    jsonschema.validate({"model": "m", "data": "d.jsonl"}, content)
    jsonschema.validate({"model": {"name": "m"}, "data": {"train": "d"}, "training": {"epochs": 2}}, content)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": "m", "data": "d", "trainng": {}}, content)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_golden_recipes_are_valid_short_and_explained(path: Path) -> None:
    load_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines) <= 12
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "Hardware" in header
    assert "Expect" in header


def test_the_demo_recipe_is_the_golden_one() -> None:
    assert yaml.safe_load((RECIPES / "demo.yaml").read_text(encoding="utf-8")) == DEMO
    assert demo_recipe("de").data.train == "demo:home-assistant/de"
