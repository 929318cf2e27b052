"""The whole story on a tiny random model: files, resume, errors, exit codes. Minutes of real training are in `make demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish import pipeline
from burnish.cli import main
from burnish.errors import DataError, ModelError, RecipeError
from burnish.recipe import Recipe, build_recipe
from burnish.run import Run, list_runs
from conftest import colour_rows


def tiny_recipe(folder: Path, rows: Path, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": str(rows), "validation_fraction": 0.15, "test_fraction": 0.25, "overlap_ngram": 0},
        "task": {"metric": "exact_match"},
        "training": {"epochs": 2, "learning_rate": 0.02},
        "evaluation": {"shots": [2], "selection_rows": 4, "resamples": 400},
    }
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    return build_recipe(content)


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    return pipeline.run_recipe(tiny_recipe(tiny_folder, data, training={"epochs": 10}), folder=folder / "run")


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_everything_is_in_the_folder(finished: Run) -> None:
    for name in (
        "recipe.yaml", "recipe.resolved.yaml", "run.json", "events.jsonl", "data/train.jsonl", "data/validation.jsonl", "data/test.jsonl",
        "data/manifest.json", "candidates/selection.json", "candidates/base.jsonl", "candidates/few_shot.jsonl", "candidates/few_shot_retrieved.jsonl",
        "candidates/tuned.jsonl", "training/metrics.jsonl", "training/summary.json", "adapter/adapter_model.safetensors", "adapter/chat_template.jinja",
        "adapter/burnish.json", "adapter/README.md", "comparison.json", "report.html", "report.json", "model_card.md",
    ):  # fmt: skip
        assert (finished.path / name).stat().st_size > 0, name
    assert {step["state"] for step in finished.status()["steps"].values()} == {"done"}
    assert not [p for p in finished.path.rglob("*") if p.name.endswith(".tmp")]


def test_the_numbers_hang_together(finished: Run) -> None:
    """The table recomputed from the answers; the training summary from its metrics rows."""
    content = finished.read_json(finished.comparison_file)
    test = {e.id: e for e in pipeline.dataset_of(finished).test}
    for row in content["candidates"]:
        answers = [p for p in finished.read_jsonl(finished.predictions_file(row["name"])) if "example" in p]
        assert {p["example"] for p in answers} == set(test)
        right = sum(" ".join(p["text"].split()) == " ".join(test[p["example"]].reference.split()) for p in answers)
        assert row["score"] == pytest.approx(right / len(test), abs=1e-6)
        assert row["low"] <= row["score"] <= row["high"]
    summary = finished.read_json(finished.training_file)
    rows = finished.read_jsonl(finished.metrics_file)
    steps = [row for row in rows if "loss" in row]
    assert summary["steps"] == len(steps)
    assert summary["stopped_early"] == (summary["steps"] < summary["planned_steps"])
    best = min((row for row in rows if row.get("validation_loss") is not None and row["step"] > 0), key=lambda row: row["validation_loss"])
    assert summary["best_step"] == best["step"]
    assert best["validation_loss"] < 0.7 * rows[0]["validation_loss"], "the tiny model learns its tiny task"
    assert (
        summary["adapter_sha256"]
        == finished.read_json(finished.adapter_folder / "burnish.json")["files"]["adapter_model.safetensors"]["sha256"]
    )


def test_auto_became_numbers(finished: Run) -> None:
    recipe = finished.recipe()
    assert (recipe.model.device, recipe.model.dtype, recipe.model.chat_template) == ("cpu", "float32", "plain")
    assert isinstance(recipe.evaluation.max_new_tokens, int)
    left = {key for key, value in _flat(recipe.to_dict()) if value == "auto"}
    # What depends on the moment (free memory, the clock, the disk) is decided by the step itself and told in its summary.
    assert left == {"data.format", "training.checkpoint_steps", "engine.gradient_checkpointing", "engine.frozen_cache", "engine.compile"}


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


def test_detectable_difference_was_told_before_training(finished: Run) -> None:
    kinds = [(e["event"], e.get("step")) for e in finished.read_jsonl(finished.events_file)]
    assert kinds.index(("detectable_difference", None)) < kinds.index(("step_started", "train"))
    assert kinds.index(("step_done", "baselines")) < kinds.index(("step_started", "train"))


def test_a_second_run_does_nothing_again(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.path.glob("candidates/*")} | {
        p: p.stat().st_mtime_ns for p in finished.path.glob("adapter/*")
    }
    monkeypatch.setattr("burnish.training.run_loop", lambda *_, **__: pytest.fail("trained again"))
    pipeline.run_recipe(finished.recipe_as_asked(), folder=finished.path)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_that_was_cut_off_goes_on(finished: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the middle of answering; the answers that were there are kept, and the result is the same."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    recipe = tiny_recipe(tiny_folder, data, training={"epochs": 10}, evaluation={"batch_size": 8})
    predict_module = sys.modules["burnish.evaluation.predict"]
    real, calls = predict_module.append_line, {"n": 0}

    def cut(path: Path, row: Any, *, sync: bool = False) -> None:
        calls["n"] += path.name == "few_shot.jsonl"
        if calls["n"] == 14:
            raise KeyboardInterrupt
        real(path, row, sync=sync)

    monkeypatch.setattr(predict_module, "append_line", cut)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_recipe(recipe, folder=tmp_path / "run")
    monkeypatch.setattr(predict_module, "append_line", real)
    run = Run(tmp_path / "run")
    kept = run.predictions_file("few_shot").read_text().splitlines()
    assert sum('"example"' in line for line in kept) == 11  # of a head, answers, and a line a batch
    assert run.status()["steps"]["baselines"]["state"] == "failed"
    with run.predictions_file("few_shot").open("a") as file:
        file.write('{"example": "torn')  # and a line torn by the crash
    pipeline.run_recipe(recipe, folder=run.path)
    assert run.predictions_file("few_shot").read_text().splitlines()[: len(kept)] == kept
    scores = [{row["name"]: row["score"] for row in r.read_json(r.comparison_file)["candidates"]} for r in (run, finished)]
    assert scores[0] == scores[1]


def test_another_recipe_in_the_same_folder_is_refused(finished: Run) -> None:
    other = build_recipe(finished.recipe_as_asked().to_dict(), overrides=["training.epochs=4"])
    with pytest.raises(RecipeError, match=r"training.epochs: 10.0 → 4.0.*--fresh"):
        pipeline.run_recipe(other, folder=finished.path)


def test_fresh_deletes_runs_only(finished: Run, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not a run"):
        Run.create(tmp_path, finished.recipe_as_asked(), fresh=True)
    assert (tmp_path / "precious.txt").exists()


def test_two_processes_cannot_share_a_run(finished: Run) -> None:
    code = f"from burnish.run import Run\nwith Run({str(finished.path)!r}).lock(): pass"
    with finished.lock():
        held = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is in use by process" in held.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_commands_on_a_finished_run(finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = finished.read_json(finished.comparison_file)["verdict"]
    code = {"BETTER": 0, "WORSE": 3, "CAN'T TELL": 4}[verdict]
    assert cli(monkeypatch, "compare", str(finished.path), "--json") == code
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] == verdict
    assert "rows_detail" not in shown
    assert cli(monkeypatch, "runs", "show", str(finished.path)) == 0
    assert verdict in capsys.readouterr().out
    assert cli(monkeypatch, "report", str(finished.path)) == 0
    assert cli(monkeypatch, "runs", "list", str(finished.path.parent), "--json") == 0
    capsys.readouterr()
    (row,) = list_runs(finished.path.parent)
    assert (row["state"], row["verdict"]) == ("done", verdict)


def test_runs_diff(
    finished: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = build_recipe(finished.recipe_as_asked().to_dict(), overrides=["training.max_steps=1", "evaluation.candidates=[base, tuned]"])
    other = pipeline.run_recipe(recipe, folder=tmp_path / "other")
    assert cli(monkeypatch, "runs", "diff", str(finished.path), str(other.path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["recipe"]) == {"training.max_steps", "evaluation.candidates"}
    assert not found["data"]
    rows = {row["candidate"]: row for row in found["scores"]}
    assert rows["base"]["difference"]["difference"] == 0
    assert rows["tuned"]["rows_in_common"] == len(pipeline.dataset_of(finished).test)
    assert rows["few_shot"]["note"] == "measured in one run only"
    assert cli(monkeypatch, "runs", "diff", str(finished.path), str(other.path)) == 0
    assert "training.max_steps" in capsys.readouterr().out


def test_check_names_everything_and_leaves_with_2(
    tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(
        [*colour_rows(30), "{broken", {"prompt": "q <eos>", "completion": "a"}, {"prompt": "", "completion": "a"}, colour_rows(1)[0]]
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: {data}\n")
    assert cli(monkeypatch, "check", str(recipe)) == 2
    shown = capsys.readouterr()
    assert "duplicate of" in shown.out
    for line in (31, 32, 33):
        assert f"rows.jsonl:{line}" in shown.err
    good = write_rows([*colour_rows(30), colour_rows(1)[0]], "good.jsonl")
    recipe.write_text(f"model: {tiny_folder}\ndata: {good}\n")
    assert cli(monkeypatch, "check", str(recipe), "--show", "2") == 0
    assert "⟦ cat red<eos>⟧" in capsys.readouterr().out, "without colours, what is trained stands in brackets"
    assert cli(monkeypatch, "check", str(recipe), "--strict") == 2


def test_init_writes_a_recipe_that_works(
    tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = colour_rows(40)
    csv = tmp_path / "sub folder" / "rows.csv"
    csv.parent.mkdir()
    csv.write_text("question,answer\n" + "".join(f'"{r["prompt"]}",{r["completion"]}\n' for r in rows))
    recipe = tmp_path / "made.yaml"
    assert cli(monkeypatch, "init", str(csv), "--output", str(recipe), "--model", str(tiny_folder)) == 0
    assert cli(monkeypatch, "check", str(recipe)) == 0
    assert cli(monkeypatch, "init", str(csv), "--output", str(recipe)) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty"),
        ('{"prompt": "q"}\n' * 30, "no known format fits the keys found: prompt"),
        ('{"text": "q", "other": "x", "third": 1}\n' * 30, "keys found: text, other, third"),
    ],
)
def test_data_errors_are_one_clear_line(
    content: str, expected: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: rows.jsonl\n")
    assert cli(monkeypatch, "run", str(recipe), "--run", str(tmp_path / "run")) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run" / "data").exists()


def test_missing_labels(tiny_folder: Path, write_rows: Callable[..., Path]) -> None:
    data = write_rows([{"prompt": f"q{i}", "completion": ""} for i in range(40)])
    with pytest.raises(DataError, match="completion — empty"):
        pipeline.run_recipe(tiny_recipe(tiny_folder, data), folder=data.parent / "run")


@pytest.mark.parametrize("what", ["nothing", "no weights", "pickle", "remote code", "bad json", "torn weights"])
def test_models_that_are_refused(what: str, tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    weights = model / "model.safetensors"
    if what == "nothing":
        shutil.rmtree(model)
        model.mkdir()
    elif what == "no weights":
        weights.unlink()
    elif what == "pickle":
        weights.rename(model / "pytorch_model.bin")
    elif what == "remote code":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    elif what == "bad json":
        (model / "config.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    expected = {
        "nothing": "no config.json", "no weights": r"no weights there", "pickle": "pickled weights can run code", "remote code": "auto_map",
        "bad json": "not JSON", "torn weights": "cannot be read",
    }[what]  # fmt: skip
    with pytest.raises(ModelError, match=expected):
        pipeline.run_recipe(tiny_recipe(model, write_rows(colour_rows(120))), folder=tmp_path / "run")


def test_without_validation_rows_of_its_own_the_test_file_stays_whole(
    tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    train, test = write_rows(colour_rows(120), "train.jsonl"), write_rows(colour_rows(20, start=900), "test.jsonl")
    run = Run.create(tmp_path / "run", tiny_recipe(tiny_folder, train, data={"test": str(test)}))
    assert len(pipeline.prepare(run).test) == 20


def test_rows_changed_by_hand_are_noticed(finished: Run, tmp_path: Path) -> None:
    import shutil

    copy = Run(shutil.copytree(finished.path, tmp_path / "copy"))
    path = copy.split_file("test")
    path.write_text(path.read_text().replace("cat", "dog", 1))
    with pytest.raises(DataError, match="changed since"):
        pipeline.compare(copy)


def test_evaluate_before_training_measures_the_baselines(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    told: list[str] = []
    run = Run.create(tmp_path / "run", tiny_recipe(tiny_folder, write_rows(colour_rows(120))))
    pipeline.prepare(run)
    pipeline.evaluate(run, tell=lambda what, done, total, detail: told.append(f"{what}: {detail}"))
    assert run.predictions_file("base").exists()
    assert not run.predictions_file("tuned").exists()
    assert any("`burnish train` comes first" in line for line in told)


def test_other_weights_in_the_same_folder_are_noticed(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """The base is replaced under a run that has its baselines: they are measured again."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    run = Run.create(tmp_path / "run", tiny_recipe(model, write_rows(colour_rows(120)), evaluation={"candidates": ["base"]}))
    pipeline.prepare(run)
    pipeline.evaluate(run)
    before = run.predictions_file("base").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.normal_(0, 0.2)
    loaded.save_pretrained(model)
    pipeline.evaluate(run)
    assert run.predictions_file("base").read_text() != before


def test_a_changed_template_trains_again(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    text = "{% for m in messages %}{% if m.role == 'user' %}Q {{ m.content }}{% else %} A {{ m.content }}<eos>{% endif %}{% endfor %}"
    template.write_text(text + "{% if add_generation_prompt %} A{% endif %}")
    recipe = tiny_recipe(
        tiny_folder, write_rows(colour_rows(120)), model={"chat_template": str(template)}, evaluation={"candidates": ["base", "tuned"]}
    )
    first = pipeline.run_recipe(recipe, folder=tmp_path / "run")
    before = first.read_json(first.training_file)["adapter_sha256"]
    template.write_text(text.replace("Q ", "Question ") + "{% if add_generation_prompt %} A{% endif %}")
    again = pipeline.run_recipe(recipe, folder=tmp_path / "run")
    assert again.read_json(again.training_file)["adapter_sha256"] != before


def test_training_again_withdraws_the_verdict(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = Run(shutil.copytree(finished.path, tmp_path / "copy"))
    with copy.step("train", "other inputs"):
        pass
    assert not copy.comparison_file.exists()
    assert not copy.report_file.exists()
    assert list_runs(tmp_path)[0]["state"] == "train done"
    assert cli(monkeypatch, "compare", str(copy.path)) == 2
    assert "no longer hold" in capsys.readouterr().err


def test_an_adapter_that_was_swapped_is_refused(finished: Run, tmp_path: Path) -> None:
    import shutil

    copy = Run(shutil.copytree(finished.path, tmp_path / "copy"))
    weights = copy.adapter_folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    copy.predictions_file("tuned").unlink()
    with pytest.raises(ModelError, match="SHA-256 differs"):
        pipeline.evaluate(copy)


def test_lost_answers_are_made_again(finished: Run, tmp_path: Path) -> None:
    import shutil

    copy = Run(shutil.copytree(finished.path, tmp_path / "copy"))
    lines = copy.predictions_file("base").read_text().splitlines(keepends=True)
    copy.predictions_file("base").write_text("".join(lines[:-6]))
    pipeline.evaluate(copy)
    scores = [
        [row["score"] for row in content["candidates"]]
        for content in (pipeline.compare(copy), finished.read_json(finished.comparison_file))
    ]
    assert scores[0] == scores[1]
    assert len([row for row in copy.read_jsonl(copy.predictions_file("base")) if "example" in row]) == len(pipeline.dataset_of(copy).test)


def test_relative_overrides_count_from_where_the_user_stands(
    tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(colour_rows(120), "a.jsonl")
    write_rows(colour_rows(20, start=900), "b.jsonl")
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "r.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: ../a.jsonl\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time is the same recipe, not another one
        assert cli(monkeypatch, "prepare", "recipes/r.yaml", "--set", "data.test=b.jsonl", "--run", "run") == 0
    assert len(pipeline.dataset_of(Run(tmp_path / "run")).test) == 20


def test_a_source_that_is_gone_does_not_end_the_run(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    rows = write_rows(colour_rows(120))
    run = Run.create(tmp_path / "run", tiny_recipe(tiny_folder, rows))
    before = pipeline.prepare(run)
    rows.unlink()
    told: list[str] = []
    assert tuple(pipeline.prepare(run, tell=lambda what, done, total, detail: told.append(detail)).train) == tuple(before.train)
    assert "own copy" in told[0]


def test_the_context_window_counts(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny model reads 512 tokens; data.max_length allows 1024."""
    rows = [*colour_rows(60), {"prompt": "x y z " * 300, "completion": "a"}]
    with pytest.raises(DataError, match=r"over data\.max_length 512"):
        pipeline.prepare(Run.create(tmp_path / "run", tiny_recipe(tiny_folder, write_rows(rows))))
