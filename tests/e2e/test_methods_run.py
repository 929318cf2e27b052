"""The whole story with the methods that keep another base or whole weights, and `burnish merge` at its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish import pipeline
from burnish.errors import DataError, RecipeError
from burnish.models import load_trained, weights_hash
from burnish.recipe import Recipe, build_recipe
from burnish.run import Run
from conftest import colour_rows

IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40]])


@pytest.fixture
def recipe_for(tiny_folder: Path, wide_folder: Path, write_rows: Callable[..., Path]) -> Callable[..., Recipe]:
    def make(method: str, **training: Any) -> Recipe:
        return build_recipe(
            {
                "model": {"name": str(wide_folder if method == "qlora" else tiny_folder), "dtype": "float32"},
                "data": {"train": str(write_rows(colour_rows(160))), "test_rows": 8, "validation_rows": 8},
                "training": {"method": method, "max_steps": 6, "learning_rate": 5e-3, "micro_batch_size": 8, **training},
                "evaluation": {"candidates": ["base", "tuned"], "max_new_tokens": 4, "prompt_forms": ["as_is"], "selection_rows": 4},
            }
        )

    return make


def test_full_on_the_last_layer(recipe_for: Callable[..., Recipe], tiny_folder: Path, tmp_path: Path) -> None:
    job = pipeline.run_recipe(recipe_for("full", layers="last-1"), folder=tmp_path / "run")
    summary = job.read_json(job.training_file)
    assert (summary["method"], summary["layers"]) == ("full", "last-1")
    base, trained = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_folder, job.adapter_folder))
    changed = {name for name, value in trained.items() if not torch.equal(value, base[name])}
    assert changed
    assert all(name.startswith("model.layers.2.") for name in changed)
    assert {row["name"] for row in job.read_json(job.comparison_file)["candidates"]} == {"base", "tuned"}
    with pytest.raises(RecipeError, match="exists already"):
        pipeline.merge(job, job.adapter_folder)


def test_qlora_tells_its_base_and_is_evaluated_on_it(recipe_for: Callable[..., Recipe], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    told: list[str] = []
    job = pipeline.run_recipe(
        recipe_for("qlora", layers=[1, 2]), folder=tmp_path / "run", tell=lambda *parts: told.append(f"{parts[0]}: {parts[3]}")
    )
    assert "4-bit base: nf4 by bitsandbytes, 4.13 bits a weight" in told
    summary, manifest = job.read_json(job.training_file), job.read_json(job.adapter_folder / "burnish.json")
    for facts in (summary, manifest):
        assert (facts["quantizer"], facts["bits"]) == ("bitsandbytes", 4)
    assert manifest["base_sha256"] == weights_hash(job.recipe().model.name)
    layer = load_trained(job.recipe(), job.adapter_folder).get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert type(layer).__name__ == "Linear4bit"


def test_merge_from_the_command_line(
    recipe_for: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from burnish import cli

    recipe = recipe_for("lora")
    fresh = Run.create(tmp_path / "run", recipe)
    with pytest.raises(DataError, match="burnish train"):
        pipeline.merge(fresh, tmp_path / "merged")
    with fresh.lock():
        pipeline.prepare(fresh)
        pipeline.train(fresh)
    monkeypatch.setattr("sys.argv", ["burnish", "merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged"), "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error"] < 1e-4 < found["effect"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, load_trained(recipe, fresh.adapter_folder)(IDS).logits, rtol=1e-4, atol=1e-4)
