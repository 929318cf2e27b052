"""`burnish retain` on a tiny model: before and after, every repair, the published adapter, a call that is cut off, the exit codes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_pipeline import cli, tiny_recipe
from transformers import AutoModelForCausalLM

from burnish import pipeline
from burnish.advice import choose, halves
from burnish.errors import DataError, RecipeError
from burnish.evaluation import read_suites, retention
from burnish.models import Limits, generate, load_chat, load_model
from burnish.pipeline import RetainOptions
from burnish.pipeline.retention import pairs_of
from burnish.recipe import build_recipe, differences
from burnish.run import Run
from conftest import colour_rows

IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40]])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written_by_the_base(job: Run, folder: Path) -> Path:
    """Prompts that work: what is expected is what the base answers."""
    recipe = job.recipe()
    chat, model = load_chat(recipe.model), load_model(recipe.model)
    asked = [f"a {n} of the red" for n in range(40)]
    answers: dict[int, str] = {}
    for batch in generate(model, chat, [chat.prompt_ids([{"role": "user", "content": text}]) for text in asked], Limits(12)):
        answers |= {index: answer.text for index, answer in batch}
    return write(
        folder / "written.jsonl", [{"prompt": text, "must_contain": answers[n][:24]} for n, text in enumerate(asked) if answers[n].strip()]
    )


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small suite of each local kind."""
    folder = tmp_path_factory.mktemp("suites")
    write(
        folder / "pick.jsonl",
        [{"query": f"Question: which is number {n}?", "choices": [f"a{n}", f"b {n}", "none"], "gold": n % 3} for n in range(12)],
    )
    write(folder / "last.jsonl", [{"context": f"He had {n} cats and a", "continuation": "dog" if n % 2 else "house"} for n in range(10)])
    write(folder / "plain.jsonl", [{"text": f"The {n}th passage tells of a red house and of nothing else, {n} times."} for n in range(10)])
    write(folder / "mine.jsonl", [{"prompt": f"say {n}", "must_contain": chr(97 + n)} for n in range(10)])
    return folder


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has learnt a little in a few steps."""
    folder = tmp_path_factory.mktemp("retained")
    data = write(folder / "rows.jsonl", colour_rows(160))
    recipe = tiny_recipe(
        tiny_folder,
        data,
        training={"epochs": 4, "max_steps": 16},
        task={"metric": "edit_similarity"},
        evaluation={"candidates": ["base", "tuned"], "max_new_tokens": 8, "prompt_forms": ["as_is"]},
    )
    job = Run.create(folder / "run", recipe)
    with job.lock():
        dataset = pipeline.prepare(job)
        pipeline.evaluate(job, trained=False, dataset=dataset)
        pipeline.train(job, dataset=dataset)
        pipeline.evaluate(job, trained=True, dataset=dataset)
        pipeline.compare(job)
    return job


def OPTIONS(suites: Path) -> RetainOptions:
    return RetainOptions(suites=(str(suites),), repairs=("scale", "replay", "kl", "layers", "rank"), scales=(0.5, 1.25), task_rows=20)


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says."""
    content = json.loads(json.dumps(found))
    for point in (content["repair"] or {}).get("points", ()):
        point.pop("seconds"), point.pop("training_seconds", None)
    return content


@pytest.fixture(scope="module")
def repaired(trained: Run, suites: Path) -> dict[str, Any]:
    with trained.lock():
        return pipeline.retain(trained, OPTIONS(suites))


def test_nothing_is_measured_twice_and_every_row_once(repaired: dict[str, Any], trained: Run, suites: Path) -> None:
    """The same call again reads everything from the disk (no model is loaded) and says the same."""
    before = trained.retain_rows_file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("burnish.pipeline.retention.Scaled", None)
        patch.setattr("burnish.pipeline.retention.load_trained", None)
        patch.setattr("burnish.pipeline.repair._publish", lambda seen, chosen: repaired["repair"]["published"])
        with trained.lock():
            again = pipeline.retain(trained, OPTIONS(suites))
    assert trained.retain_rows_file.read_bytes() == before
    assert timeless(again) == timeless(repaired)
    rows = [row for row in trained.read_jsonl(trained.retain_rows_file) if "item" in row]
    assert len({(row["key"], row["item"]) for row in rows}) == len(rows)
    assert {row["suite"]: row["n"] for row in repaired["suites"]} == {"pick": 12, "last": 10, "plain": 10, "mine": 10}


def test_every_repair_is_a_point_or_is_told(repaired: dict[str, Any], trained: Run) -> None:
    found = repaired["repair"]
    names = [point["name"] for point in found["points"]]
    further = [name for name in names[4:] if name.startswith("scale")]
    assert names == ["base", "tuned", "scale 0.5", "scale 1.25", *further, "replay", "kl", "layers", "rank"]
    assert len(further) <= 2, "where the smallest scale that keeps enough must lie"
    assert found["left_out"] == []
    changed = {point["name"]: point["changed"] for point in found["points"] if "changed" in point}
    assert changed["layers"] == {"training.layers": "last-1"}
    assert changed["rank"] == {"lora.rank": 4, "lora.alpha": 8.0}
    asked = trained.recipe_as_asked()
    for name, values in changed.items():
        own = Run(trained.retain_folder / name).recipe_as_asked()
        assert set(differences(asked, own)) == set(values), f"{name} differs from the run's recipe in nothing else"
    rows = trained.read_jsonl(trained.replay_file)
    assert rows
    assert all(row["completion"] for row in rows)
    assert {point["name"] for point in found["points"]} >= set(found["reported"])
    points = {point["name"]: point for point in found["points"]}
    assert points["tuned"]["task"] > points["base"]["task"] + 0.05
    assert (points["base"]["change"], points["tuned"]["gain_kept"]) == (0, 1)
    assert (points["base"]["change_low"], points["base"]["change_high"]) == (0, 0), "the base is certain not to have changed"


def test_chosen_on_one_half_and_told_on_the_other(repaired: dict[str, Any], trained: Run, suites: Path) -> None:
    """A point that is not chosen has seen one half of each suite; base, tuned and the chosen one have seen both."""
    found = repaired["repair"]
    chosen_on = {item for suite in read_suites([str(suites)]) for item in halves([item.id for item in suite.items])[0]}
    assert found["rows"]["choosing"] == len(chosen_on) == 21
    seen: dict[str, set[str]] = {}
    for row in trained.read_jsonl(trained.retain_rows_file):
        if "item" in row and not row["item"].startswith("task"):
            seen.setdefault(row["key"], set()).add(row["item"])
    whole = len(set(found["reported"]))
    per_suite = [items <= chosen_on for items in seen.values()]
    assert per_suite.count(False) == 4 * whole, "four suites for each point that is reported"
    assert per_suite.count(True) == 4 * (len(found["points"]) - whole), "and half of each for those that are not"
    assert found["rows"]["test"] == len(pipeline.dataset_of(trained).test)


def test_nothing_is_told_of_rows_that_were_chosen_on(repaired: dict[str, Any], trained: Run, suites: Path) -> None:
    """Until a point is chosen only the one half of a suite is compared; from then on only the other."""
    parts = {suite.name: halves([item.id for item in suite.items]) for suite in read_suites([str(suites)])}
    compared: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:

        def choosing(points: Any) -> Any:
            compared.append(set())
            return choose(points)

        def pairs(given: Any, before: Any, after: Any, only: Any = None) -> Any:
            found = pairs_of(given, before, after, only)
            for pair, suite in zip(found, given, strict=True):
                items = [item for item in before[suite.name] if item in after[suite.name] and (only is None or item in only[suite.name])]
                assert pair.before == tuple(before[suite.name][item].value for item in items)
                compared.append(set(items) & parts[suite.name][0])
                compared[-1] |= {f"other {item}" for item in set(items) & parts[suite.name][1]}
            return found

        patch.setattr("burnish.pipeline.repair.choose", choosing)
        patch.setattr("burnish.pipeline.repair.pairs_of", pairs)
        with trained.lock():
            pipeline.retain(trained, OPTIONS(suites))
    at = compared.index(set())
    assert at == 4 * len(repaired["repair"]["points"])
    assert not any(item.startswith("other") for items in compared[:at] for item in items)
    assert all(item.startswith("other") for items in compared[at + 1 :] for item in items)
    assert compared[at + 1 :]


def test_the_published_adapter_is_the_chosen_point(tiny_folder: Path, trained: Run, suites: Path) -> None:
    """Chosen by hand, since a tiny model's choice is noise: plain PEFT gives W + 0.5·BA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "burnish.pipeline.repair.choose",
            lambda points: {
                "chosen": "scale 0.5",
                "why": "asked",
                "rule": "",
                "kept": {p.name: {"gain": 0.5, "loss": 0.5} for p in points},
            },
        )
        with trained.lock():
            found = pipeline.retain(trained, RetainOptions(suites=(str(suites),), repairs=("scale",), scales=(0.5,), task_rows=20))
    published = found["repair"]["published"]
    assert published["logits_error"] <= 1e-3 * published["logits_spread"]
    config, own = (json.loads((folder / "adapter_config.json").read_text()) for folder in (trained.repaired_folder, trained.adapter_folder))
    assert config["lora_alpha"] == own["lora_alpha"] / 2
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), str(trained.repaired_folder)
    ).eval()
    half = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), str(trained.adapter_folder)
    ).eval()
    for module in half.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 0.5
    with torch.inference_mode():
        assert torch.allclose(again(input_ids=IDS).logits, half(input_ids=IDS).logits, atol=1e-5)
    page = trained.report_file.read_text()
    for words in ("What was forgotten", "Between task and retention", "chosen: scale 0.5", "adapter-repaired", "Suite by suite"):
        assert words in page, words
    assert 'gid="chosen"' in page or "-chosen" in page
    assert json.loads(trained.report_json_file.read_text())["retain"]["repair"]["chosen"] == "scale 0.5"


def test_a_call_that_is_cut_off_goes_on(trained: Run, suites: Path, tmp_path: Path) -> None:
    """Cut in the third suite of the tuned model: what was measured stays, the rest is made, the numbers are those of the whole call."""
    copy = Run(shutil.copytree(trained.path, tmp_path / "run"))
    shutil.rmtree(copy.retain_folder)
    calls: list[str] = []
    inner = retention.SUITES["continuation"].measure

    def dies(*arguments: Any) -> Any:
        calls.append("continuation")
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*arguments)

    options = RetainOptions(suites=(str(suites),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(retention.SUITES, "continuation", dataclasses.replace(retention.SUITES["continuation"], measure=dies))
        with pytest.raises(KeyboardInterrupt):
            pipeline.retain(copy, options)
    assert copy.status()["steps"]["retain"]["state"] == "failed"
    kept = copy.retain_rows_file.read_bytes()
    found = pipeline.retain(copy, options)
    assert copy.retain_rows_file.read_bytes().startswith(kept)
    with trained.lock():
        assert timeless(found) == timeless(pipeline.retain(trained, options))


def test_the_time_is_a_budget(trained: Run, suites: Path, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(trained.path, tmp_path / "run"))
    shutil.rmtree(copy.retain_folder / "kl", ignore_errors=True)
    found = pipeline.retain(
        copy, RetainOptions(suites=(str(suites),), repairs=("scale", "kl"), scales=(0.5,), task_rows=20, budget_seconds=1e-9)
    )
    assert {left["name"] for left in found["repair"]["left_out"]} == {"scale 0.5", "kl"}
    assert found["repair"]["chosen"] == "tuned"
    assert not copy.repaired_folder.exists()


def test_refusals(trained: Run, suites: Path, tmp_path: Path, tiny_folder: Path) -> None:
    for options, expected in (
        (RetainOptions(repairs=("scales",)), "--try scales: expected some of scale, replay, kl, layers, rank"),
        (RetainOptions(scales=(0.0,)), "--scales 0"),
        (RetainOptions(suites=("nothing.jsonl",)), "no such file or folder"),
        (RetainOptions(replay_data="nothing.jsonl"), "--replay-data nothing.jsonl: no such file"),
    ):
        with pytest.raises(RecipeError, match=expected):
            pipeline.retain(trained, options)
    fresh = Run.create(tmp_path / "fresh", trained.recipe_as_asked())
    with pytest.raises(DataError, match="burnish train"):
        pipeline.retain(fresh)


def test_training_anew_withdraws_what_was_measured(trained: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(trained.path, tmp_path / "run"))
    copy.repaired_folder.mkdir(exist_ok=True)
    assert copy.retain_file.exists()
    with copy.step("train", "other"):
        assert not copy.retain_file.exists()
        assert not copy.repaired_folder.exists()


def test_the_command_and_its_exit_codes(
    trained: Run, suites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No gate: 0. A gate that holds for a suite of rows that do not change: 0; one that needs more rows: 4; one that a certain loss breaks: 3."""
    arguments = ["retain", str(trained.path), "--suites", str(suites)]
    assert cli(monkeypatch, *arguments, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"] in ("KEPT", "LOST", "CAN'T TELL")
    assert shown["gate"] is None
    assert cli(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("What must not be forgotten", "pick", "mean over the suites", shown["sentence"][:40]))
    same = write(tmp_path / "same.jsonl", [{"prompt": f"say {n}", "must_contain": "never said at all"} for n in range(80)])
    assert cli(monkeypatch, "retain", str(trained.path), "--suites", str(same), "--max-drop", "0.9") == 0
    assert cli(monkeypatch, "retain", str(trained.path), "--suites", str(same), "--max-drop", "0") == 4
    assert cli(monkeypatch, "retain", str(trained.path), "--suites", str(written_by_the_base(trained, tmp_path)), "--max-drop", "0.02") == 3
    assert "gate: FAILED" in capsys.readouterr().out
    assert cli(monkeypatch, *arguments, "--try", "nothing") == 2


def test_run_measures_where_the_recipe_asks(
    trained: Run, tiny_folder: Path, suites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`retain:` in the recipe: measured after the verdict, before the report; without it nothing is."""
    content = trained.recipe_as_asked().to_dict()
    content["training"] |= {"max_steps": 2, "epochs": 1}
    plain = pipeline.run_recipe(build_recipe(content), folder=tmp_path / "plain")
    assert not plain.retain_file.exists()
    content["retain"] = {"suites": [str(suites / "plain.jsonl")], "max_drop": 0.5}
    job = pipeline.run_recipe(build_recipe(content), folder=tmp_path / "asked")
    assert job.read_json(job.retain_file)["gate"]["state"] == "PASSED"
    assert list(job.status()["steps"])[-2:] == ["retain", "report"]
    assert "What was forgotten" in job.report_file.read_text()


@pytest.mark.parametrize(
    ("repairs", "training", "reason"),
    [("kl,rank", {"method": "full"}, "training.method full has no rank"), ("layers", {"layers": "last-1"}, "already")],
)
def test_a_repair_that_does_not_apply_is_told(
    repairs: str, training: dict[str, Any], reason: str, trained: Run, suites: Path, tmp_path: Path
) -> None:
    """Whole weights have no adapter to hold near and no rank; they are scaled towards the base (WiSE-FT)."""
    content = trained.recipe_as_asked().to_dict()
    content["training"] |= {"max_steps": 3, "epochs": 1, **training}
    job = Run.create(tmp_path / "run", build_recipe(content))
    with job.lock():
        pipeline.train(job, dataset=pipeline.prepare(job))
        names = ("scale", *repairs.split(","))
        found = pipeline.retain(job, RetainOptions(suites=(str(suites / "plain.jsonl"),), repairs=names, scales=(0.5,), task_rows=8))[
            "repair"
        ]
    assert {left["name"] for left in found["left_out"]} == set(repairs.split(","))
    assert any(reason in left["reason"] for left in found["left_out"])
    assert [point["name"] for point in found["points"]][:3] == ["base", "tuned", "scale 0.5"]


def test_plain_text_has_a_gain_too(tiny_folder: Path, suites: Path, tmp_path: Path) -> None:
    """Continued pre-training: the task is bits per byte of held-out documents, turned round; the point between is published like any."""
    rows = write(
        tmp_path / "texts.jsonl", [{"text": f"a red cat {n} and a blue dog sat in the white house of number {n}"} for n in range(80)]
    )
    content = {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": str(rows), "validation_rows": 6, "test_rows": 10, "overlap_ngram": 0},
        "training": {"objective": "text", "max_steps": 6, "learning_rate": 0.01},
    }
    job = pipeline.run_recipe(build_recipe(content), folder=tmp_path / "run")
    found = pipeline.retain(job, RetainOptions(suites=(str(suites / "plain.jsonl"),), repairs=("scale",), scales=(0.5,)))["repair"]
    points = {point["name"]: point for point in found["points"]}
    assert points["base"]["task"] < points["scale 0.5"]["task"] < points["tuned"]["task"] < 0
    scores = {row["name"]: row["score"] for row in job.read_json(job.comparison_file)["candidates"]}
    for name in ("base", "tuned"):
        assert found["reported"][name]["task"] == pytest.approx(-scores[name], abs=1e-5), (
            "the same documents, measured by `burnish evaluate`"
        )
    assert "bits per byte" in found["task_title"]


def test_a_chain_is_judged_against_the_base_it_began_with(trained: Run, suites: Path, tmp_path: Path) -> None:
    """Two stages of different rank: the second trains on the first, merged. Scaled down, the second alone is taken back; the base is the recipe's own."""
    content = trained.recipe_as_asked().to_dict()
    content["training"] |= {"max_steps": 3, "epochs": 1}
    content["stages"] = [{"name": "one"}, {"name": "two", "lora": {"rank": 2}}]
    job = Run.create(tmp_path / "run", build_recipe(content))
    with job.lock():
        pipeline.train(job, dataset=pipeline.prepare(job))
        options = RetainOptions(suites=(str(suites / "plain.jsonl"),), repairs=("scale", "rank"), scales=(0.5,), task_rows=8)
        found = pipeline.retain(job, options)
    assert "base_folder" in job.read_json(job.training_file)
    ours = retain_base(trained, suites)
    assert found["suites"][0]["before"] == pytest.approx(ours, rel=1e-6), "the same base as a run without stages"
    assert [point["name"] for point in found["repair"]["points"]][:3] == ["base", "tuned", "scale 0.5"]
    assert "chain of stages" in found["repair"]["left_out"][0]["reason"]


def retain_base(job: Run, suites: Path) -> float:
    with job.lock():
        return float(pipeline.retain(job, RetainOptions(suites=(str(suites / "plain.jsonl"),)))["suites"][0]["before"])
