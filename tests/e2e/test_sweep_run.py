"""`burnish sweep` on a tiny model: the winner is a recipe, the test rows stay unread, a killed sweep goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import cli, tiny_recipe

from burnish import pipeline
from burnish.errors import DataError, RecipeError
from burnish.recipe import load_recipe
from burnish.run import Run
from burnish.training import trial_runner
from burnish.types import Dataset
from conftest import colour_rows

pytest.importorskip("optuna")

OVER = ("training.learning_rate=1e-3..1e-1", "lora.rank=2,4,8")


def bare(job: Run) -> list[dict[str, Any]]:
    rows = [row for row in pipeline.read_trials(job.trials_file) if row["state"] != "failed"]
    return [{key: value for key, value in row.items() if key not in ("seconds", "trial")} for row in rows]


@pytest.fixture(scope="module")
def swept(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("swept")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    job = Run.create(folder / "sweep", tiny_recipe(tiny_folder, data, training={"learning_rate": "auto"}))
    with job.lock():
        pipeline.sweep(job, over=OVER, aim=pipeline.Aim(trials=4))
    return job


def test_the_winner_is_a_recipe_that_trains_to_the_same_loss(swept: Run, tmp_path: Path) -> None:
    found = swept.read_json(swept.sweep_file)
    rows = pipeline.read_trials(swept.trials_file)
    assert len(rows) == 4
    assert found["best"]["value"] == min(row["value"] for row in rows if row["state"] == "complete")
    winner = load_recipe(swept.best_recipe_file)
    for key, value in found["best"]["values"].items():
        section, name = key.split(".")
        assert getattr(getattr(winner, section), name) == value
    header = [line for line in swept.best_recipe_file.read_text().splitlines() if line.startswith("#")]
    assert any(f"{found['best']['value']:.4f}" in line for line in header)
    job = Run.create(tmp_path / "run", winner)
    pipeline.train(job, dataset=pipeline.prepare(job))
    assert job.read_json(job.training_file)["best_validation_loss"] == pytest.approx(found["best"]["value"], rel=1e-6)
    page = swept.sweep_report_file.read_text()
    assert page.count("<svg") == 6
    assert "never read" in page
    assert "<script" not in page


def test_the_test_rows_are_never_read(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """The test file is poisoned after `prepare`: a sweep by loss and one by score go through; whoever reads the file fails."""
    recipe = tiny_recipe(tiny_folder, write_rows(colour_rows(120)), training={"epochs": 1}, evaluation={"max_new_tokens": 8})
    for objective in ("validation_loss", "validation_score"):
        job = Run.create(tmp_path / objective, recipe)
        pipeline.prepare(job)
        job.split_file("test").write_text("{poison")
        job.split_file("test").chmod(0)
        found = pipeline.sweep(job, over=("lora.rank=2,4",), aim=pipeline.Aim(objective, trials=2))
        assert found["best"]["value"] >= 0
        assert job.split_file("test").stat().st_mode & 0o777 == 0
        job.split_file("test").chmod(0o644)
        with pytest.raises(DataError, match="changed since"):
            pipeline.dataset_of(job)
    with pytest.raises(ValueError, match="test rows"):
        trial_runner(Dataset((), (), (object(),), {}), None, folder=tmp_path, reference=tmp_path)  # type: ignore[arg-type]


def test_a_killed_sweep_goes_on_with_the_same_trials(swept: Run, tmp_path: Path) -> None:
    """kill −9 in the third trial, at its first validation; resumed, the four trials equal those of the sweep that was not killed."""
    folder = tmp_path / "sweep"
    recipe = swept.recipe_file
    code = f"""
import os, signal
from burnish import pipeline
from burnish.recipe import load_recipe
from burnish.run import Run
import burnish.training.trial as trial
loop, calls = trial.run_loop, []
def dies(*arguments, **named):
    calls.append(1)
    if len(calls) == 3:
        hooks = named["hooks"]
        def log(row, inner=hooks.log):
            inner(row)
            if row.get("validation_loss") is not None and row["step"] > 0:
                os.kill(os.getpid(), signal.SIGKILL)
        import dataclasses
        named["hooks"] = dataclasses.replace(hooks, log=log)
    return loop(*arguments, **named)
trial.run_loop = dies
with Run.working({str(folder)!r}, load_recipe({str(recipe)!r})) as job:
    pipeline.sweep(job, over={OVER!r}, aim=pipeline.Aim(trials=4))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    job = Run(folder)
    assert [row["state"] for row in pipeline.read_trials(job.trials_file)][2:] == ["running"]
    with Run.working(folder, load_recipe(recipe)) as job:
        pipeline.sweep(job, over=OVER, aim=pipeline.Aim(trials=4))
    assert [row["state"] for row in pipeline.read_trials(job.trials_file)].count("failed") == 1
    assert bare(job) == bare(swept)


def test_another_space_in_the_same_folder_is_refused(swept: Run) -> None:
    with pytest.raises(RecipeError, match=r"other values \(space.*--fresh"):
        pipeline.sweep(swept, over=("lora.rank=2,4",), aim=pipeline.Aim(trials=4))


def test_the_base_is_untouched_between_trials(swept: Run) -> None:
    """Trials share one base model: each saw the same loss before its first step."""
    rows = [row for row in pipeline.read_trials(swept.trials_file) if row["state"] == "complete"]
    assert len({row["base_validation_loss"] for row in rows}) == 1


def test_the_command(swept: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A finished sweep does nothing again; more trials go on from it."""
    arguments = ["sweep", str(swept.recipe_file), "--run", str(swept.path), *(part for over in OVER for part in ("--over", over))]
    before = swept.trials_file.read_bytes()
    assert cli(monkeypatch, *arguments, "--trials", "4", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert swept.trials_file.read_bytes() == before
    assert len(shown["trials"]) == 4
    assert shown["recipe"] == str(swept.best_recipe_file)
    assert cli(monkeypatch, *arguments, "--trials", "4") == 0
    assert "best: trial" in capsys.readouterr().out
    assert cli(monkeypatch, "sweep", str(swept.recipe_file), "--run", str(tmp_path / "x"), "--budget", "5") == 2
    assert cli(monkeypatch, "sweep", str(swept.recipe_file), "--run", str(tmp_path / "x"), "--over", "lora.rnk=1,2") == 2
    assert "did you mean `lora.rank`" in capsys.readouterr().err
