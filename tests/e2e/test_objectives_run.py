"""Whole runs of a tiny model with preferences, with replayed rows and with the KL term: what is in the folder, what is logged, what is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish import pipeline
from burnish.evaluation.diff import diff_runs
from burnish.recipe import build_recipe
from burnish.run import Run
from conftest import colour_rows


def trained(folder: Path, rows: Path, path: Path, **training: Any) -> Run:
    """Prepared and trained; no candidate is answered."""
    content = {
        "name": "tiny",
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": str(rows), "validation_fraction": 0.15, "test_fraction": 0.25, "overlap_ngram": 0},
        "task": {"metric": "exact_match"},
        "training": {"epochs": 3, "learning_rate": 0.01, **training},
        "evaluation": {"shots": [2], "selection_rows": 4, "resamples": 400},
    }
    with Run.working(path, build_recipe(content)) as job:
        dataset = pipeline.prepare(job)
        pipeline.train(job, dataset=dataset)
    return job


def steps_of(job: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of steps, rows of validations)."""
    rows = job.read_jsonl(job.metrics_file)
    return [row for row in rows if "loss" in row], [row for row in rows if "validation_loss" in row]


def test_preferences_are_learnt(tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"no {r['completion']}"} for r in colour_rows(120)]
    job = trained(tiny_folder, write_rows(pairs), tmp_path / "run", objective="preference", preference_beta=0.5)
    steps, validations = steps_of(job)
    assert validations[0]["validation_loss"] == pytest.approx(0.693147, abs=1e-4), "before the first step the model is its own reference"
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["reward_margin"] > 0.5
    summary = job.read_json(job.training_file)
    assert summary["objective"] == "preference"
    assert summary["loss_unit"] == "pair"
    assert summary["best_validation_loss"] < 0.3
    assert summary["best_validation_preference_accuracy"] > 0.9
    best = next(row for row in validations if row["step"] == summary["best_step"])
    assert best["validation_preference_accuracy"] == summary["best_validation_preference_accuracy"]
    rows = len(pipeline.dataset_of(job).train) + len(pipeline.dataset_of(job).validation)
    assert len(json.loads(job.reference_file.read_text())["gaps"]) == rows
    pipeline.evaluate(job, trained=True)
    answers = [row for row in job.read_jsonl(job.predictions_file("tuned")) if "example" in row]
    assert {row["example"] for row in answers} == {example.id for example in pipeline.dataset_of(job).test}


def test_replayed_rows_are_mixed_in_and_counted(tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    rows = write_rows(colour_rows(120))
    general = write_rows([{"question": f"what is {n}", "answer": f"number {n}"} for n in range(30)], "general.jsonl")
    with pytest.raises(Exception, match=r"general\.jsonl: no known format"):
        trained(tiny_folder, rows, tmp_path / "other", replay_data=str(general))
    general = write_rows([{"prompt": f"what is {n}", "completion": f"number {n}"} for n in range(30)], "general.jsonl")
    job = trained(tiny_folder, rows, tmp_path / "run", replay_data=str(general), replay_fraction=0.2)
    dataset, summary = pipeline.dataset_of(job), job.read_json(job.training_file)
    assert len(dataset.replay) == summary["replay_rows"] == len(job.read_jsonl(job.split_file("replay"))) == 30
    n = len(dataset.train)
    assert summary["replayed_per_epoch"] == round(n / 4)
    assert summary["examples"] == 3 * (n + round(n / 4))
    assert summary["epochs"] == pytest.approx(3, abs=0.01)
    plain = trained(tiny_folder, rows, tmp_path / "plain")
    assert plain.read_json(plain.training_file)["replay_rows"] == 0
    last, without = (steps_of(run)[1][0]["validation_loss"] for run in (job, plain))
    assert last == pytest.approx(without, rel=1e-5), "the same validation rows"
    # The run is whole by itself, and a changed copy is seen.
    kept = list(dataset.replay)
    general.unlink()
    with Run.working(job.path, job.recipe_as_asked()) as again:
        assert list(pipeline.prepare(again).replay) == kept
    job.split_file("replay").write_text("")
    with pytest.raises(Exception, match=r"replay\.jsonl: changed"):
        pipeline.dataset_of(job)


def test_the_kl_term_holds_the_model_near_its_base(tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    rows = write_rows(colour_rows(120))
    moved = {}
    for weight in (0.001, 5.0):
        job = trained(tiny_folder, rows, tmp_path / str(weight), kl_weight=weight)
        steps, validations = steps_of(job)
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-4)
        moved[weight] = (steps[-1]["kl"], validations[-1]["validation_loss"])
    assert moved[5.0][0] < 0.3 * moved[0.001][0]
    assert moved[5.0][1] > moved[0.001][1], "what holds it also slows the learning"


def test_runs_with_and_without_replay_can_be_compared(tmp_path: Path) -> None:
    def run(name: str, splits: dict[str, Any]) -> Run:
        path = tmp_path / name
        recipe = build_recipe({"model": "m", "data": "d"})
        with Run.working(path, recipe) as job:
            job.write_json(job.manifest_file, {"splits": splits})
            job.write_json(job.comparison_file, {"metric": "exact_match", "verdict": "BETTER", "candidates": []})
        return job

    train = {"rows": 3, "sha256": "a" * 16}
    found = diff_runs(run("a", {"train": train}), run("b", {"train": train, "replay": {"rows": 5, "sha256": "b" * 16}}))
    assert found["data"] == {"replay": ["none", "5 rows, bbbbbbbb"]}
