"""kill −9 in a chain of stages: no finished stage is trained again, and every stage ends with the losses and the adapter of an undisturbed chain (F1, F19)."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import Reference, events, finish, forked, kill_after, log_of, outcome, reference, stages_of

from burnish.run import Run
from conftest import colour_rows

FIRST, SECOND, THIRD = "broad", "same-shape", "other-shape"


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Three stages with a seam of each kind: the second goes on with the adapter, the third begins on a merged base."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "broad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in colour_rows(48, start=200)))
    stages: list[dict[str, Any]] = [
        {"name": FIRST, "data": {"train": str(folder / "broad.jsonl")}, "training": {"epochs": 1}},
        {"name": SECOND, "training": {"epochs": 1}, "gate": {"measure": "validation_loss", "min_gain": -5.0}},
        {"name": THIRD, "lora": {"rank": 2}, "training": {"epochs": 1}},
    ]
    return reference(tiny_folder, folder, sections={"stages": stages})


def done(run: Path) -> dict[str, int]:
    """The stages that are done, and when the adapter of each was written."""
    state = {
        path: json.loads((path / "run.json").read_text())["steps"].get("train", {}).get("state") for path in (run / "stages").glob("*")
    }
    return {path.name: (path / "adapter").stat().st_mtime_ns for path, found in state.items() if found == "done"}


@pytest.mark.parametrize(("stage", "step", "expected"), [(FIRST, 5, 4), (SECOND, 5, 3), (SECOND, 1, 0), (THIRD, 4, 3)])
def test_killed_in_a_stage(stage: str, step: int, expected: int, whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[step, "KILL", f"stages/{stage}/"]) == -signal.SIGKILL, log_of(run)
    before = done(run)
    assert len(before) == [FIRST, SECOND, THIRD].index(stage)
    finish(run, whole)
    assert [event["at_step"] for event in events(run / "stages" / stage, "resumed")] == [expected]
    assert before.items() <= done(run).items(), "a finished stage is not trained again"


def test_stopped_five_times_across_the_stages(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    for stage, step in ((FIRST, 2), (FIRST, 6), (SECOND, 1), (SECOND, 7), (THIRD, 3)):
        assert forked().run("train", run, recipe=whole.recipe, at_step=[step, "TERM", f"stages/{stage}/"]) == 143, log_of(run)
        assert json.loads((run / "run.json").read_text())["steps"]["train"]["state"] == "stopped"
    finish(run, whole)
    assert [[event["at_step"] for event in events(run / "stages" / name, "resumed")] for name in (FIRST, SECOND, THIRD)] == [
        [2, 6], [1, 7], [3],
    ]  # fmt: skip


@pytest.mark.long
def test_killed_at_random_moments_of_a_chain(whole: Reference, tmp_path: Path) -> None:
    """While a stage trains, while states are measured, while an adapter is merged: twenty chains, each killed twice; more where few kills met a training."""
    moments, resumed = random.Random(20), 0
    for number in range(60):
        if number >= 20 and resumed >= 10:
            break
        run = whole.copy(tmp_path / f"run-{number}")
        kill_after(whole.seconds * (number % 20 + moments.random()) / 20, run, whole)
        kill_after(whole.seconds * moments.random(), run, whole)
        finish(run, whole)
        resumed += sum(len(events(path, "resumed")) for path in (run / "stages").glob("*"))
    assert resumed >= 10


# ------------------------------------------------------------------------------------------------------------------ --allow-change


@pytest.fixture
def stopped(whole: Reference, tmp_path: Path) -> Path:
    """A chain that was stopped in its second stage."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[5, "TERM", f"stages/{SECOND}/"]) == 143, log_of(run)
    return run


def with_rate(whole: Reference, rate: float, *, in_stage: bool) -> dict[str, Any]:
    recipe = json.loads(json.dumps(whole.recipe))
    place = recipe["stages"][1] if in_stage else recipe
    place["training"]["learning_rate"] = rate
    return dict(recipe)


@pytest.mark.parametrize("in_stage", [False, True])
def test_another_rate_goes_on_where_it_is_allowed(in_stage: bool, whole: Reference, stopped: Path) -> None:
    recipe, before = with_rate(whole, 0.002, in_stage=in_stage), done(stopped)
    key = f"stages.{SECOND}.training.learning_rate" if in_stage else "training.learning_rate"
    assert forked().run("train", stopped, recipe=recipe) == 2
    assert f"holds a run of another recipe ({key}: " in log_of(stopped)
    assert forked().run("train", stopped, recipe=recipe, allow=["training.learning_rate"]) == 0, log_of(stopped)
    assert before.items() <= done(stopped).items(), "what is done stays as it was trained"
    assert stages_of(stopped)[FIRST] == whole.stages[FIRST]
    second = Run(stopped / "stages" / SECOND)
    assert events(second.path, "conditions_changed")[0]["changed"] == {"training.learning_rate": [0.01, 0.002]}
    rows, expected = [[row for row in found if "loss" in row] for found in (outcome(second.path)[0], whole.stages[SECOND][0])]
    assert rows[:5] == expected[:5]
    assert rows[5]["learning_rate"] == pytest.approx(expected[5]["learning_rate"] / 5)
    third = [row["learning_rate"] for row in outcome(stopped / "stages" / THIRD)[0] if "loss" in row]
    assert max(third) == pytest.approx(0.01 if in_stage else 0.002), "a stage to come trains as the recipe now says"
    # Done: the next steps need no leave.
    assert forked().run("train", stopped, recipe=recipe) == 0, log_of(stopped)


def test_what_cannot_change_is_refused_in_a_chain_too(whole: Reference, stopped: Path) -> None:
    """The shape of a stage that is under way; the order of the stages; a gate."""
    recipe = json.loads(json.dumps(whole.recipe))
    recipe["stages"][1]["lora"] = {"rank": 8}
    assert forked().run("train", stopped, recipe=recipe, allow=["training"]) == 2
    assert f"stages.{SECOND}.lora.rank: None → 8" in log_of(stopped)
    assert forked().run("train", stopped, recipe=recipe, allow=["lora"]) == 2
    assert "lora.rank — 4 when the training began, now 8" in log_of(stopped)
    recipe = json.loads(json.dumps(whole.recipe))
    recipe["stages"][1:] = recipe["stages"][:0:-1]
    assert forked().run("train", stopped, recipe=recipe, allow=["training", "lora", "data"]) == 2
    assert "stages: ['broad', 'same-shape', 'other-shape'] → ['broad', 'other-shape', 'same-shape']" in log_of(stopped)
