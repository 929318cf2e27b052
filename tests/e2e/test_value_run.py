"""`burnish value` on a tiny model: planted wrong labels are found, the proof is made, a cut-off goes on, kept.jsonl is data for a recipe."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import cli, tiny_recipe

from burnish import pipeline, training
from burnish.errors import DataError, RecipeError
from burnish.pipeline import ValuePlan
from burnish.recipe import build_recipe
from burnish.run import Run, append_line, read_lines
from burnish.training import ShortTrainings, Trained
from conftest import colour_rows

WORDS = {
    "red": ("card", "plastic", "chip", "wallet"), "blue": ("loan", "interest", "rate", "borrow"), "green": ("abroad", "travel", "foreign", "trip"),
    "black": ("password", "login", "code", "locked"),
}  # fmt: skip


def labelled_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions of three words that go with a label and two that go with none."""
    draw = random.Random(seed)
    rows = []
    for index in range(n):
        label = list(WORDS)[index % len(WORDS)]
        words = [*draw.sample(WORDS[label], 3), *draw.sample(("please", "help", "my", "the", "about", "now", "today", "again"), 2)]
        draw.shuffle(words)
        rows.append({"prompt": f"{' '.join(words)} {index}", "completion": label})
    return rows


def plant(rows: list[dict[str, str]], share: float = 0.2, seed: int = 1) -> set[int]:
    """Give a share of the rows another label, in place; returns their places."""
    draw = random.Random(seed)
    wrong = set(draw.sample(range(len(rows)), round(share * len(rows))))
    for place in wrong:
        rows[place]["completion"] = draw.choice([label for label in WORDS if label != rows[place]["completion"]])
    return wrong


@pytest.fixture(scope="module")
def valued(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, set[str]]:
    folder = tmp_path_factory.mktemp("valued")
    rows = labelled_rows(120)
    wrong = plant(rows)
    for name, part in {"train": rows, "validation": labelled_rows(32, seed=5), "test": labelled_rows(12, seed=6)}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {name: str(folder / f"{name}.jsonl") for name in ("validation", "test")}
    recipe = tiny_recipe(
        folder=tiny_folder, rows=folder / "train.jsonl", data=data, training={"epochs": 4, "learning_rate": 0.01}, task={"metric": "auto"}
    )
    job = Run.create(folder / "value", recipe)
    with job.lock():
        pipeline.prepare(job)
        job.split_file("test").write_text("{poison")  # whoever reads it fails
        pipeline.value(job, plan=ValuePlan(drop=0.3, seeds=2, objective="validation_loss"))
    return job, {f"{folder / 'train.jsonl'}:{place + 1}" for place in wrong}


def test_planted_wrong_labels_are_among_the_worst(valued: tuple[Run, set[str]]) -> None:
    """20 % wrong labels; at least 80 % of them stand among the worst 30 %."""
    job, wrong = valued
    ranked = job.read_jsonl(job.value_rows_file)
    assert len(ranked) == 120
    worst = {row["source"] for row in ranked[:36]}
    assert len(worst & wrong) >= 0.8 * len(wrong)
    assert [row["rank"] for row in ranked] == list(range(1, 121))
    assert [row["badness"] for row in ranked] == sorted((row["badness"] for row in ranked), reverse=True)
    assert all(row["kept"] is (row["rank"] > 36) for row in ranked)
    assert all("nearest rows answer otherwise" in row["reason"] for row in ranked[:5])


def test_each_row_is_judged_by_a_model_that_has_not_seen_it(valued: tuple[Run, set[str]]) -> None:
    """The work's lines: a base, three folds that share out the rows, two trainings for each arm."""
    job, _ = valued
    lines = list(read_lines(job.value_work_file))
    names = [line["part"].split()[0] for line in lines]
    assert sorted(names) == ["base", "fold", "fold", "fold", "kept", "kept", "random", "random"]
    folds = [line for line in lines if line["part"].startswith("fold")]
    assert sum(len(line["losses"]) for line in folds) == 120
    assert all(-1 <= cosine <= 1 for line in folds for cosine in line["cosines"])
    found = job.read_json(job.value_file)
    assert found["rows"] == {"train": 120, "kept": 84, "guides": 16, "judges": 16}
    assert found["signals"] == {"held_out_loss": True, "not_learnt": True, "disagreement": True, "gradient": True, "duplicate": False}


def test_the_proof(valued: tuple[Run, set[str]]) -> None:
    job, _ = valued
    found = job.read_json(job.value_file)
    proof = found["proof"]
    arms = {arm: [one["value"] for one in proof["trainings"] if one["arm"] == arm] for arm in ("kept", "random")}
    assert proof["difference"] == pytest.approx(sum(arms["random"]) / 2 - sum(arms["kept"]) / 2)
    assert proof["low"] <= proof["difference"] <= proof["high"]
    assert proof["difference"] > 0  # a fifth of the random rows is wrong
    assert proof["verdict"] in found["sentence"]


def test_the_rows_that_stay_are_data_for_a_recipe(valued: tuple[Run, set[str]], tiny_folder: Path, tmp_path: Path) -> None:
    job, wrong = valued
    kept = job.read_jsonl(job.kept_file)
    assert len(kept) == 84
    assert len({row["source"] for row in kept} & wrong) <= 0.2 * len(wrong)
    recipe = build_recipe(
        {"model": {"name": str(tiny_folder), "dtype": "float32"}, "data": {"train": str(job.kept_file), "overlap_ngram": 0}}
    )
    dataset = pipeline.prepare(Run.create(tmp_path / "run", recipe))
    assert {row["messages"][0]["content"] for row in kept} == {
        example.question for example in (*dataset.train, *dataset.validation, *dataset.test)
    }


def test_the_table_and_the_page(valued: tuple[Run, set[str]]) -> None:
    job, _ = valued
    with job.value_table_file.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in table] == list(range(1, 121))
    assert float(table[0]["held_out_loss"]) == job.read_jsonl(job.value_rows_file)[0]["signals"]["held_out_loss"]
    page = job.value_report_file.read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page


def test_what_is_done_is_not_done_again_and_what_is_missing_is(valued: tuple[Run, set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the line of one fold, only that fold is trained again, to the same numbers; it is trained on all rows but those whose losses it takes."""
    job, _ = valued
    lines = list(read_lines(job.value_work_file))
    before = job.read_jsonl(job.value_rows_file)
    job.value_work_file.unlink()
    for line in lines:
        if line["part"] != "fold 1":
            append_line(job.value_work_file, line)
    trained_on: list[set[int]] = []
    judged: list[set[int]] = []
    run, items = ShortTrainings.run, training.train_items

    def spied_run(self: ShortTrainings, *arguments: Any, rows: Any, **named: Any) -> Any:
        trained_on.append(set(rows))
        return run(self, *arguments, rows=rows, **named)

    def spied_items(trained: Trained, rows: Any) -> Any:
        judged.append(set(rows))
        return items(trained, rows)

    monkeypatch.setattr(ShortTrainings, "run", spied_run)
    monkeypatch.setattr(training, "train_items", spied_items)
    pipeline.value(job, plan=ValuePlan(drop=0.3, seeds=2, objective="validation_loss"))
    assert len(trained_on) == 1
    assert judged
    for places in judged:
        assert not places & trained_on[0]
        assert places | trained_on[0] == set(range(120))
    after = list(read_lines(job.value_work_file))
    assert [line["part"] for line in after[len(lines) - 1 :]] == ["fold 1"]
    assert job.read_jsonl(job.value_rows_file) == before


def test_what_cannot_be_valued(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    pairs = [{"prompt": f"a cat {n}", "chosen": "cat", "rejected": "dog"} for n in range(40)]
    recipe = tiny_recipe(tiny_folder, write_rows(pairs, "pairs.jsonl"), training={"objective": "preference"})
    with pytest.raises(RecipeError, match="chosen answers"):
        pipeline.value(Run.create(tmp_path / "pairs", recipe))
    grouped = [{**row, "g": str(index % 3)} for index, row in enumerate(colour_rows(90))]
    parts = {
        name: str(write_rows([{**row, "g": name} for row in colour_rows(20, start)], f"{name}.jsonl"))
        for start, name in ((900, "validation"), (800, "test"))
    }
    recipe = tiny_recipe(tiny_folder, write_rows(grouped, "grouped.jsonl"), data={**parts, "group_column": "g"})
    with pytest.raises(DataError, match="one group"):
        pipeline.value(Run.create(tmp_path / "grouped", recipe))


def test_plain_text(tiny_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> None:
    """Documents have no answers: losses, gradients and copies rank them; two that are nearly the same are told."""
    texts: list[dict[str, Any]] = [
        {"text": f"a {row['prompt']} is a {row['completion']} and so on {n * n}"} for n, row in enumerate(colour_rows(60))
    ]
    recipe = tiny_recipe(
        tiny_folder,
        write_rows(texts, "texts.jsonl"),
        training={"objective": "text", "epochs": 1},
        task={"metric": "auto"},
        evaluation={"candidates": ["base"]},
    )
    job = Run.create(tmp_path / "text", recipe)
    found = pipeline.value(job, plan=ValuePlan(seeds=0))
    assert found["signals"]["disagreement"] is False
    assert found["signals"]["held_out_loss"] is True
    assert "was not tried" in found["sentence"]


def test_the_command(valued: tuple[Run, set[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job, _ = valued
    arguments = ["value", str(job.recipe_file), "--run", str(job.path), "--drop", "30", "--seeds", "2", "--objective", "validation_loss"]
    code = cli(monkeypatch, *arguments, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert code == {"BETTER": 0, "WORSE": 3, "CAN'T TELL": 4}[shown["proof"]["verdict"]]
    assert cli(monkeypatch, *arguments) == code
    assert "the worst rows" in capsys.readouterr().out
    assert cli(monkeypatch, *arguments[:-2], "--drop", "100") == 2
    assert cli(monkeypatch, "value", str(job.recipe_file), "--run", str(job.path), "--drop", "30", "--seeds", "0") == 0
