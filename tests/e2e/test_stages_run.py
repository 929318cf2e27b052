"""Chains on the tiny model: what each stage begins with, what stops them, what is told of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import cli, tiny_recipe

from burnish import pipeline
from burnish.errors import DataError, GateError, RecipeError
from burnish.models import load_adapter, load_chat, load_model, weights_hash
from burnish.recipe import Recipe, build_recipe, dump_recipe
from burnish.run import Run
from burnish.training import measure_losses, tokenize_all
from conftest import colour_rows

GENERAL = {"name": "general", "training": {"epochs": 2, "learning_rate": 0.02}}
DOMAIN = {"name": "domain", "training": {"epochs": 2}}
TASK = {"name": "task", "training": {"epochs": 4}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three files; `general` asks sixty questions of the task, too, with other answers: their hashes fall into other splits."""
    folder = tmp_path_factory.mktemp("rows")
    turned = [{"prompt": f"turn {row['prompt']}", "completion": row["completion"]} for row in colour_rows(80, start=300)]
    content = {
        "general": [*turned, *({**row, "completion": "a thing"} for row in colour_rows(60))],
        "domain": colour_rows(80, start=500),
        "task": colour_rows(120),
    }
    for name, rows in content.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in content}


def chain(folder: Path, files: dict[str, str], *stages: dict[str, Any], **changes: Any) -> Recipe:
    changes["evaluation"] = {"candidates": ["base", "tuned"], **changes.get("evaluation", {})}
    plain = tiny_recipe(folder, Path(files["task"]), lora={"rank": 4, "alpha": 8}, **changes)
    own = [{**stage, "data": stage.get("data", files[stage["name"]] if stage["name"] in ("general", "domain") else {})} for stage in stages]
    return build_recipe({**plain.to_dict(), "stages": own})


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """general → domain with the same adapter → task with an adapter of another shape: one seam of each kind."""
    wider = {**TASK, "lora": {"rank": 8}}
    gated = {**DOMAIN, "gate": {"measure": "validation_loss", "min_gain": -1.0}}
    return pipeline.run_recipe(chain(tiny_folder, files, GENERAL, gated, wider), folder=tmp_path_factory.mktemp("chain") / "run")


def test_the_chain_hangs_together(finished: Run, tiny_folder: Path) -> None:
    """The numbers of the table, measured again from the folders: base, then base + adapter, then merged base + adapter."""
    told = finished.read_json(finished.stages_file)
    assert [stage["name"] for stage in told["stages"]] == ["general", "domain", "task"]
    assert [stage["continues"] for stage in told["stages"]] == ["a fresh adapter", "the adapter before", "a fresh adapter"]
    assert [state["after"] for state in told["states"]] == [None, "general", "domain", "task"]
    recipe = finished.recipe()
    chat = load_chat(recipe.model)
    task = Run(finished.stage_folder("task"))
    rows = {"task": tokenize_all(chat, pipeline.dataset_of(task).validation)}
    places = [(recipe.model, Run(finished.stage_folder(name)).adapter_folder) for name in ("general", "domain")]
    merged = recipe.model.model_copy(update={"name": str(task.path / "base")})
    for state, (section, adapter) in zip(told["states"][1:], [*places, (merged, task.adapter_folder)], strict=True):
        model = load_adapter(load_model(section), adapter, weights_hash(section.name))
        assert measure_losses(model, rows, at_once=8)["task"] == pytest.approx(state["losses"]["task"], rel=1e-5)
    base = measure_losses(load_model(recipe.model), rows, at_once=8)["task"]
    assert base == pytest.approx(told["states"][0]["losses"]["task"], rel=1e-5)
    # What a stage begins with is what the one before left: merged, it has the same loss.
    assert told["stages"][2]["before"] == pytest.approx(told["states"][2]["losses"]["task"], rel=1e-3)
    summaries = [Run(finished.stage_folder(name)).read_json(Run(finished.stage_folder(name)).training_file) for name in ("domain", "task")]
    assert summaries[0]["base_validation_loss"] == pytest.approx(told["stages"][1]["before"], rel=1e-4), "domain began where general ended"
    assert summaries[1]["base_validation_loss"] == pytest.approx(told["stages"][2]["before"], rel=1e-4)
    assert told["stages"][2]["after"] < told["stages"][2]["before"]


def test_the_last_adapter_is_the_runs_and_is_judged_on_its_own_base(finished: Run) -> None:
    task = Run(finished.stage_folder("task"))
    summary = finished.read_json(finished.training_file)
    assert summary["base_folder"] == "stages/task/base"
    assert (finished.adapter_folder / "adapter_model.safetensors").read_bytes() == (
        task.adapter_folder / "adapter_model.safetensors"
    ).read_bytes()
    assert {row["name"] for row in finished.read_json(finished.comparison_file)["candidates"]} == {"base", "tuned"}
    page = finished.report_file.read_text()
    assert "What each stage brought" in page
    assert "stages/task" not in page or "<script" not in page
    moved = Run(shutil.copytree(finished.path, finished.path.parent / "moved"))
    moved.predictions_file("tuned").unlink()
    pipeline.evaluate(moved)
    answers = [[p["text"] for p in run.read_jsonl(run.predictions_file("tuned")) if "example" in p] for run in (moved, finished)]
    assert answers[0] == answers[1], "the base is found beside the adapter, wherever the run stands"


def test_rows_of_an_earlier_stage_that_are_test_rows_are_left_out(finished: Run) -> None:
    test, validation = (getattr(pipeline.dataset_of(finished), split) for split in ("test", "validation"))
    held = {example.question for example in (*test, *validation)}
    general = Run(finished.stage_folder("general"))
    assert not held & {example.question for example in pipeline.dataset_of(general).train}
    reasons = general.read_json(general.manifest_file)["removed_counts"]
    assert sum(count for reason, count in reasons.items() if "the run's" in reason) > 5


def test_a_finished_chain_is_not_trained_again(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.training.run_loop", lambda *_, **__: pytest.fail("trained again"))
    before = finished.read_json(finished.comparison_file)
    pipeline.run_recipe(finished.recipe_as_asked(), folder=finished.path)
    assert finished.read_json(finished.comparison_file) == before


def test_a_chain_that_was_cut_off_repeats_no_stage(
    tiny_folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the second stage; afterwards the first is not trained again, and the last adapter is that of an uninterrupted chain."""
    recipe = chain(tiny_folder, files, GENERAL, DOMAIN)
    whole = Run.create(tmp_path / "whole", recipe)
    pipeline.train(whole, dataset=pipeline.prepare(whole))
    import burnish.training as room

    real, calls = room.run_loop, []

    def cut(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr("burnish.training.run_loop", cut)
    run = Run.create(tmp_path / "cut", recipe)
    with pytest.raises(KeyboardInterrupt):
        pipeline.train(run, dataset=pipeline.prepare(run))
    pipeline.train(run, dataset=pipeline.prepare(run))
    assert len(calls) == 3
    digests = [r.read_json(r.training_file)["adapter_sha256"] for r in (whole, run)]
    assert digests[0] == digests[1]
    measured = [r.read_json(r.stages_file)["states"] for r in (whole, run)]
    assert measured[0] == measured[1]


@pytest.mark.parametrize("measure", ["validation_loss", "validation_score", "retention_loss"])
def test_a_gate_stops_the_chain(
    measure: str, tiny_folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that asks for too much: exit code 3 with the numbers, no adapter of the run, the stage's own kept; a second try says the same."""
    rows = {"data": files["task"]} if measure == "retention_loss" else {}
    gate = {"measure": measure, "min_gain": 50, **rows}
    recipe = chain(tiny_folder, files, {**GENERAL, "gate": gate}, TASK, evaluation={"max_new_tokens": 8})
    run = Run.create(tmp_path / "run", recipe)
    for _ in range(2):
        with pytest.raises(GateError, match=r"general did not pass its gate.*→.*it gained") as caught:
            pipeline.train(run, dataset=pipeline.prepare(run))
        assert caught.value.exit_code == 3
        monkeypatch.setattr("burnish.training.run_loop", lambda *_, **__: pytest.fail("trained again"))
    assert not run.adapter_folder.exists()
    assert (Run(run.stage_folder("general")).adapter_folder / "adapter_model.safetensors").exists()
    assert not Run(run.stage_folder("task")).training_file.exists()
    told = run.read_json(run.stages_file)
    assert told["stopped_at"] == "general"
    assert told["stages"][0]["gate"]["passed"] is False
    assert run.status()["steps"]["train"]["state"] == "failed"


def test_the_exit_code_of_a_gate(tiny_folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(dump_recipe(chain(tiny_folder, files, {**GENERAL, "gate": {"min_gain": 50}}, TASK)))
    assert cli(monkeypatch, "train", str(file), "--run", str(tmp_path / "run")) == 3


def test_bad_rows_of_the_last_stage_stop_the_chain_before_the_first_step(
    tiny_folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("burnish.training.run_loop", lambda *_, **__: pytest.fail("trained"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x", "completion": ""}\n' * 30)
    run = Run.create(tmp_path / "run", chain(tiny_folder, files, GENERAL, {**TASK, "data": str(bad)}))
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        pipeline.train(run, dataset=pipeline.prepare(run))


def test_several_processes_are_refused(tiny_folder: Path, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", chain(tiny_folder, files, GENERAL, TASK))
    dataset = pipeline.prepare(run)
    monkeypatch.setattr("burnish.training.distributed.asked_size", lambda: 2)
    monkeypatch.setattr("burnish.training.distributed.join", lambda *, work=True: work)
    with pytest.raises(RecipeError, match="one process"):
        pipeline.train(run, dataset=dataset)


def test_a_second_process_cannot_work_in_a_stage(finished: Run) -> None:
    code = f"from burnish.run import Run\nwith Run({str(finished.stage_folder('task'))!r}).lock(): pass"
    with Run(finished.stage_folder("task")).lock():
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by process" in held.stderr
