"""`burnish curve` on a tiny model: the test rows stay unread, a killed curve goes on, a budget says what is missing, the page shows it."""

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
from burnish.pipeline import CurvePlan
from burnish.pipeline.curve import read_points
from burnish.recipe import load_recipe
from burnish.run import Run
from conftest import colour_rows

PLAN = CurvePlan(seeds=2, objective="validation_loss")


def bare(job: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_points(job.curve_points_file)]


@pytest.fixture(scope="module")
def curved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("curved")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    job = Run.create(folder / "curve", tiny_recipe(tiny_folder, data))
    with job.lock():
        pipeline.curve(job, plan=PLAN)
    return job


def test_every_part_is_trained_once_for_each_seed(curved: Run) -> None:
    found, rows = curved.read_json(curved.curve_file), read_points(curved.curve_points_file)
    train = found["rows"]["train"]
    assert [(row["fraction"], row["seed"]) for row in rows] == [(f, seed) for seed in (0, 1) for f in (0.125, 0.25, 0.5, 1.0)]
    assert [row["rows"] for row in rows[:4]] == [round(f * train) for f in (0.125, 0.25, 0.5, 1.0)]
    for row in rows:
        assert row["value"] == pytest.approx(sum(row["sums"]) / sum(row["counts"]), abs=1e-5)
        assert row["value"] == pytest.approx(row["validation_loss"], rel=1e-4)  # the loop's own number of its best checkpoint
    assert rows[3]["steps"] == 2 * -(-train // 8)
    assert found["missing"] == []
    assert found["sentence"]
    assert not list(curved.path.rglob("*.safetensors"))


def test_all_rows_train_as_the_run_does(curved: Run, tmp_path: Path) -> None:
    """The point at 100 % with the recipe's own seed is what `burnish train` reaches."""
    job = Run.create(tmp_path / "run", curved.recipe_as_asked())
    pipeline.train(job, dataset=pipeline.prepare(job))
    point = next(row for row in read_points(curved.curve_points_file) if (row["fraction"], row["seed"]) == (1.0, 0))
    assert job.read_json(job.training_file)["best_validation_loss"] == pytest.approx(point["validation_loss"], rel=1e-6)


def test_a_killed_curve_goes_on_with_the_same_points(curved: Run, tmp_path: Path) -> None:
    """kill −9 in the third training, at its first validation; resumed, the points equal those of the curve that was not killed."""
    folder = tmp_path / "curve"
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
        os.kill(os.getpid(), signal.SIGKILL)
    return loop(*arguments, **named)
trial.run_loop = dies
with Run.working({str(folder)!r}, load_recipe({str(curved.recipe_file)!r})) as job:
    pipeline.curve(job, plan=pipeline.CurvePlan(seeds=2, objective="validation_loss"))
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_points(Run(folder).curve_points_file)) == 2
    with Run.working(folder, load_recipe(curved.recipe_file)) as job:
        pipeline.curve(job, plan=PLAN)
    assert bare(job) == bare(curved)


def test_the_test_rows_are_never_read(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny_folder, write_rows(colour_rows(120)), training={"epochs": 1}, evaluation={"max_new_tokens": 8})
    job = Run.create(tmp_path / "run", recipe)
    pipeline.prepare(job)
    job.split_file("test").write_text("{poison")
    job.split_file("test").chmod(0)
    found = pipeline.curve(job, plan=CurvePlan((0.25, 0.5, 1.0), 1))
    assert found["objective"] == "exact_match"
    assert found["trustworthy"] is False  # one seed
    job.split_file("test").chmod(0o644)
    with pytest.raises(DataError, match="changed since"):
        pipeline.dataset_of(job)


def test_a_budget_says_what_is_missing_and_goes_on_later(curved: Run, tmp_path: Path) -> None:
    with Run.working(tmp_path / "curve", load_recipe(curved.recipe_file)) as job:
        found = pipeline.curve(job, plan=CurvePlan(seeds=2, objective="validation_loss", seconds=1e-3))
        assert [point["rows"] for point in found["points"]] == [read_points(curved.curve_points_file)[0]["rows"]]
        assert len(found["missing"]) == 7
        assert all(point["reason"] == "the budget was spent" for point in found["missing"])
        assert found["gain"] is None
        assert "1 size measured" in found["sentence"]
        assert "7 of 8 trainings are missing" in found["sentence"]
        pipeline.curve(job, plan=PLAN)
    assert bare(job) == bare(curved)


def test_another_measure_in_the_same_folder_is_refused(curved: Run) -> None:
    with pytest.raises(RecipeError, match=r"other settings \(equal: epochs → steps\).*--fresh"):
        pipeline.curve(curved, plan=CurvePlan(objective="validation_loss", equal="steps"))


def test_equal_steps(curved: Run, tmp_path: Path) -> None:
    with Run.working(tmp_path / "curve", load_recipe(curved.recipe_file)) as job:
        pipeline.curve(job, plan=CurvePlan((0.25, 0.5, 1.0), 1, equal="steps", objective="validation_loss"))
    rows = read_points(job.curve_points_file)
    assert len({row["steps"] for row in rows}) == 1
    assert len({row["rows"] for row in rows}) == 3


def test_a_corpus_metric_is_drawn_as_a_whole(curved: Run, tmp_path: Path) -> None:
    with Run.working(tmp_path / "curve", load_recipe(curved.recipe_file)) as job:
        found = pipeline.curve(job, plan=CurvePlan((0.25, 0.5, 1.0), 2, objective="bleu"))
    assert found["objective"] == "bleu"
    assert len(read_points(job.curve_points_file)[0]["answers"]) == found["rows"]["validation"]
    assert "answers" not in found["points"][0]


def test_too_few_rows_and_stages(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    few = tiny_recipe(tiny_folder, write_rows(colour_rows(50)))
    with pytest.raises(DataError, match=r"fewer than 4: collect more rows"):
        pipeline.curve(Run.create(tmp_path / "few", few), plan=CurvePlan((0.05, 0.5, 1.0)))
    staged = tiny_recipe(tiny_folder, write_rows(colour_rows(50)), stages=[{"name": "a"}, {"name": "b"}])
    with pytest.raises(RecipeError, match="without `stages:`"):
        pipeline.curve(Run.create(tmp_path / "staged", staged))


def test_the_page(curved: Run) -> None:
    page = curved.curve_report_file.read_text()
    assert page.count("<svg") == 2
    assert "<script" not in page


def test_the_command(curved: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A finished curve trains nothing again; the exit code says whether it can be trusted."""
    before = curved.curve_points_file.read_bytes()
    arguments = ["curve", str(curved.recipe_file), "--run", str(curved.path), "--seeds", "2", "--objective", "validation_loss"]
    code = cli(monkeypatch, *arguments, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert code == (0 if shown["trustworthy"] else 4)
    assert curved.curve_points_file.read_bytes() == before
    assert cli(monkeypatch, *arguments) == code
    assert shown["sentence"][:40] in capsys.readouterr().out.replace("\n", " ")
    assert cli(monkeypatch, *arguments, "--at", "100") == 4  # of what is there already, one size
    assert cli(monkeypatch, "curve", str(curved.recipe_file), "--run", str(tmp_path / "x"), "--equal", "rows") == 2
    assert "expected epochs or steps" in capsys.readouterr().err
