"""`burnish estimate` on a tiny model: the parts add up, the run goes on from there, the report compares. No test looks at how long anything took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import cli, tiny_recipe
from transformers import AutoModelForCausalLM

from burnish import pipeline
from burnish.errors import RecipeError
from burnish.models import verify_adapter, weights_hash
from burnish.recipe import dump_recipe
from burnish.run import Run
from conftest import colour_rows


@pytest.fixture(scope="module")
def estimated(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("estimated")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    return pipeline.run_recipe(tiny_recipe(tiny_folder, data), folder=folder / "run", forecast=True)


def test_the_forecast_is_of_the_whole_run(estimated: Run) -> None:
    found = estimated.read_json(estimated.estimate_file)
    here = found["here"]
    assert here["total_seconds"] == pytest.approx(sum(here["seconds"].values()), abs=0.01)
    assert here["low_seconds"] < here["total_seconds"] < here["high_seconds"]
    assert all(here["seconds"][step] > 0 for step in ("prepare", "baselines", "train", "evaluate", "compare"))
    assert here["memory"]["total"] == sum(value for name, value in here["memory"].items() if name != "total")
    assert here["money"] is None
    assert not found["after_training"]
    summary = estimated.read_json(estimated.training_file)
    assert here["steps"] == summary["planned_steps"]
    steps = found["probe"]["steps"]
    assert steps["shape"]["trained_parameters"] == summary["trainable_parameters"]
    assert steps["shape"]["parameters"] == summary["total_parameters"]
    assert steps["real_tokens_per_step"] * len(steps["timed"]) > 0
    epochs = 2
    rows = len(pipeline.dataset_of(estimated).train)
    per_epoch = steps["real_tokens_per_step"] * (summary["steps"] / epochs)
    assert per_epoch == pytest.approx(summary["tokens"] / epochs), f"{rows} rows have other tokens than the training counted"
    assert found["detectable_difference"] == estimated.read_json(estimated.comparison_file)["detectable_difference"]


def test_the_report_compares_forecast_and_fact(estimated: Run) -> None:
    told = estimated.read_json(estimated.report_json_file)["forecast"]
    found, summary = estimated.read_json(estimated.estimate_file), estimated.read_json(estimated.training_file)
    steps = estimated.status()["steps"]
    lines = {line["name"]: line for line in told["lines"]}
    total = sum(steps[name]["seconds"] for name in ("prepare", "baselines", "train", "evaluate", "compare"))
    assert lines["total"]["actual"] == pytest.approx(total, abs=0.01)
    assert lines["total"]["forecast"] == found["here"]["total_seconds"]
    assert lines["step"]["actual"] == pytest.approx(summary["step_seconds"] / summary["steps"], rel=1e-3)
    assert lines["memory"]["actual"] == summary["peak_memory_bytes"]
    for line in told["lines"]:
        assert line["ratio"] == pytest.approx(line["forecast"] / line["actual"], abs=1e-3)
    page = estimated.report_file.read_text()
    assert "Forecast and fact" in page


def test_the_card_lies_beside_weights_that_still_verify(estimated: Run, tmp_path: Path) -> None:
    """In the run, in the adapter's folder, and with a merged model, whose card says how that is loaded; the manifests hold."""
    card = estimated.card_file.read_text()
    assert (estimated.adapter_folder / "README.md").read_text() == card
    base = weights_hash(estimated.recipe().model.name)
    verify_adapter(estimated.adapter_folder, base)
    pipeline.merge(estimated, tmp_path / "merged")
    told = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in told
    assert "library_name: peft" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert estimated.status()["base_license"] == "not stated"
    assert "license: unknown" in card
    evaluated = estimated.predictions_file("tuned").read_bytes()
    pipeline.evaluate(estimated)  # nothing is done again because of a card
    assert estimated.predictions_file("tuned").read_bytes() == evaluated
    assert estimated.status()["steps"]["report"]["state"] == "done"


def test_a_forecast_of_other_rows_is_not_compared(estimated: Run) -> None:
    kept = estimated.estimate_file.read_text()
    try:
        estimated.write_json(estimated.estimate_file, {**json.loads(kept), "key": "of something else"})
        pipeline.write_report(estimated)
        assert estimated.read_json(estimated.report_json_file)["forecast"] is None
    finally:
        estimated.write_text(estimated.estimate_file, kept)


def test_the_command_and_its_options(
    tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(tiny_folder, write_rows(colour_rows(160)))))
    place = str(tmp_path / "run")
    code = cli(monkeypatch, "estimate", str(recipe), "--run", place, "--price-per-hour", "2.5", "--gpu", "h100", "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    there = found["elsewhere"]
    assert there["machine"] == "h100"
    assert not there["measured"]
    assert there["money"]["expected"] == pytest.approx(there["total_seconds"] / 3600 * 2.5, abs=1e-4)
    assert found["here"]["money"] is None, "the price is that of the GPU"
    job = Run.open(place)
    assert set(job.status()["steps"]) == {"prepare"}, "nothing but the rows is done"
    assert not job.training_file.exists()
    assert not job.adapter_folder.exists()
    assert cli(monkeypatch, "estimate", place, "--price-per-hour", "2.5") == 0  # again, as a person reads it
    shown = capsys.readouterr().out
    assert "optimizer" in shown
    assert "at 2.5 an hour" in shown
    assert cli(monkeypatch, "estimate", place, "--gpu", "h10") == 2
    assert "did you mean h100" in capsys.readouterr().err
    assert cli(monkeypatch, "estimate", place, "--price-per-hour", "-1") == 2


def test_plain_text_and_nothing_trained(tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    untrained = tiny_recipe(tiny_folder, write_rows(colour_rows(160)), evaluation={"candidates": ["base"]})
    job = Run.create(tmp_path / "untrained", untrained)
    here = pipeline.estimate(job).here
    assert (here.seconds["train"], here.seconds["evaluate"], here.steps) == (0, 0, 0)
    assert here.seconds["baselines"] > 0
    with pytest.raises(RecipeError, match="nothing of this recipe is trained"):
        pipeline.estimate(job, gpu="h100")
    texts = write_rows(
        [{"text": f"the red cat number {i} sleeps in the blue house and dreams of a green tree"} for i in range(120)], "texts.jsonl"
    )
    plain = tiny_recipe(
        tiny_folder, texts, training={"objective": "text"}, task={"metric": "auto"}, evaluation={"candidates": ["base", "tuned"]}
    )
    job = Run.create(tmp_path / "text", plain)
    found = pipeline.estimate(job)
    assert found.here.seconds["baselines"] > 0
    assert found.here.seconds["evaluate"] > 0
    assert found.detectable_difference is None


def test_a_chain_is_refused(tiny_folder: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    chain = tiny_recipe(tiny_folder, write_rows(colour_rows(160)), stages=[{"name": "one"}, {"name": "two"}])
    with pytest.raises(RecipeError, match="one training"):
        pipeline.estimate(Run.create(tmp_path / "chain", chain))
