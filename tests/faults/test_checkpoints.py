"""Checkpoints that the disk damaged, and checkpoints of another training: passed over or refused, never taken for good (F8, F9, F19, F28)."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Reference, events, finish, forked, log_of, outcome, reference

from burnish.errors import RecipeError, TrainingError
from burnish.run import Run, hash_file
from burnish.training.checkpoint import Checkpoints, State, read_checkpoint
from conftest import colour_rows


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tiny_folder, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def stopped(whole: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after 14 steps, with the checkpoints of steps 12 and 14."""
    run = whole.copy(tmp_path_factory.mktemp("stopped") / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[14, "TERM"]) == 143, log_of(run)
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == ["step-00000012", "step-00000014"]
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "bit flipped": flip, "zeroed": zero, "missing": Path.unlink}
FILES = (
    "weights.safetensors", "optimizer.exp_avg.safetensors", "optimizer.exp_avg_sq.safetensors", "optimizer.step.safetensors",
    "random.safetensors", "state.json", "MANIFEST.json",
)  # fmt: skip


def store_of(run: Path, told: list[tuple[str, dict[str, Any]]]) -> Checkpoints:
    manifest, _ = read_checkpoint(run / "checkpoints" / "step-00000012")
    return Checkpoints(run / "checkpoints", manifest["fingerprint"], event=lambda kind, **values: told.append((kind, values)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: str, run: Path) -> None:
    newest = run / "checkpoints" / "step-00000014"
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES), "every file of a checkpoint is tried here"
    DAMAGES[damage](newest / name)
    told: list[tuple[str, dict[str, Any]]] = []
    state = store_of(run, told).newest()
    assert state is not None
    assert state.progress["step"] == 12
    assert [(kind, values["at_step"]) for kind, values in told] == [("checkpoint_damaged", 14)]


def test_any_bit_and_any_length(run: Path) -> None:
    """Two hundred places of the checkpoint's and the best weights' files, chosen anew from one seed: each is noticed, none is taken for good."""
    chosen = random.Random(8)
    manifest, wanted = read_checkpoint(run / "checkpoints" / "step-00000014")
    files = [
        path
        for folder in ("step-00000014", f"best-{manifest['best_step']:08d}")
        for path in sorted((run / "checkpoints" / folder).glob("*"))
    ]
    assert len(files) > len(FILES) + 4
    for number in range(200):
        path, told = files[number % len(files)], []  # type: ignore[var-annotated]
        content = path.read_bytes()
        if number % 3:
            spoilt = bytearray(content)
            spoilt[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        else:
            spoilt = bytearray(content[: chosen.randrange(len(content))])
        path.write_bytes(bytes(spoilt))
        state = store_of(run, told).newest()
        # The best weights may be those of the older checkpoint, too.
        assert state is None or state.progress["step"] == 12, f"{path.name} {number}"
        assert told[0][0] == "checkpoint_damaged"
        path.write_bytes(content)
    state = store_of(run, []).newest()
    assert state is not None
    assert state.progress == wanted.progress


@pytest.mark.parametrize(("damage", "name"), [("bit flipped", "optimizer.exp_avg.safetensors"), ("missing", "state.json")])
def test_it_goes_on_exactly_from_the_older_one(damage: str, name: str, run: Path, whole: Reference) -> None:
    DAMAGES[damage](run / "checkpoints" / "step-00000014" / name)
    finish(run, whole)
    assert [event["at_step"] for event in events(run, "resumed")] == [12]
    assert json.loads((run / "run.json").read_text())["steps"]["train"]["resumes"] == [12]


@pytest.mark.parametrize("empty", [True, False])
def test_where_all_are_damaged_training_starts_anew_and_says_so(empty: bool, run: Path, whole: Reference) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        if empty:
            shutil.rmtree(path)
            path.mkdir()
        else:
            zero(path / "weights.safetensors")
    finish(run, whole)
    assert events(run, "checkpoints_all_damaged")
    assert not events(run, "resumed")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "burnish.json"])
def test_damaged_best_weights_are_noticed(name: str, run: Path, whole: Reference) -> None:
    for best in (run / "checkpoints").glob("best-*"):
        cut(best / name)
    finish(run, whole)
    assert events(run, "checkpoint_damaged")


def test_best_weights_with_another_config_and_a_manifest_to_match_are_noticed(run: Path, whole: Reference) -> None:
    """A folder that is whole by itself, but not the one that the checkpoint was saved with."""
    for best in (run / "checkpoints").glob("best-*"):
        config, manifest = json.loads((best / "adapter_config.json").read_text()), json.loads((best / "burnish.json").read_text())
        (best / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
        size = (best / "adapter_config.json").stat().st_size
        manifest["files"]["adapter_config.json"] = {"bytes": size, "sha256": hash_file(best / "adapter_config.json")}
        (best / "burnish.json").write_text(json.dumps(manifest))
    finish(run, whole)
    assert "burnish.json is not as it was written" in events(run, "checkpoint_damaged")[0]["reason"]


def test_leftovers_of_a_process_that_died_are_swept(run: Path, whole: Reference) -> None:
    left = run / "checkpoints" / ".step-00000015.abc.tmp"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"torn")
    finish(run, whole)


def test_rows_beyond_the_checkpoint_are_counted_once(run: Path, whole: Reference) -> None:
    """Steps that were done after the checkpoint, and a line that a crash cut short, do not stay beside those that are done again."""
    shutil.rmtree(run / "checkpoints" / "step-00000014")
    with (run / "training" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "loss": 9.9}\n{"step": 16, "lo')
    finish(run, whole)


# ------------------------------------------------------------------------------------------------------------------ of another training


def refused(run: Path, recipe: dict[str, Any], *expected: str, **job: Any) -> None:
    before = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    assert forked().run("train", run, recipe=recipe, **job) == 2, log_of(run)
    for text in expected:
        assert text in log_of(run)
    assert before == sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()), "what is there is not touched"


def changed(whole: Reference, section: str, **values: Any) -> dict[str, Any]:
    return {**whole.recipe, section: {**whole.recipe[section], **values}}


def test_half_the_data_is_refused(run: Path, whole: Reference, tmp_path: Path) -> None:
    data = tmp_path / "half.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(40)))
    recipe = changed(whole, "data", train=str(data))
    refused(run, recipe, "data.train", allow=["data.train", "data"])
    refused(run, recipe, "these checkpoints are of another training", "data.train", allow=["data"])


def test_another_base_of_the_same_shapes_is_refused(run: Path, whole: Reference, tmp_path: Path) -> None:
    """F28: two seeds of one config."""
    from transformers import AutoModelForCausalLM

    model = Path(shutil.copytree(whole.recipe["model"]["name"], tmp_path / "other"))
    other = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(0, 0.1)
    other.save_pretrained(model)
    recipe = changed(whole, "model", name=str(model))
    refused(run, recipe, "base_model.weights", "it cannot change in mid-training", allow=["model", "base_model"])


@pytest.mark.parametrize(("section", "key", "value"), [("lora", "rank", 8), ("training", "micro_batch_size", 2), ("lora", "alpha", 16)])
def test_other_conditions_are_refused(section: str, key: str, value: Any, run: Path, whole: Reference) -> None:
    recipe = changed(whole, section, **{key: value})
    refused(run, recipe, f"{section}.{key}", "holds a run of another recipe")
    refused(run, recipe, f"{section}.{key}", "it cannot change in mid-training", allow=[section])


def test_another_template_and_another_tokenizer_are_refused(run: Path, whole: Reference, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole.recipe["model"]["name"], tmp_path / "other"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "note": "changed"}))
    recipe = {**whole.recipe, "model": {**whole.recipe["model"], "name": str(model), "chat_template": "chatml"}}
    refused(run, recipe, "tokenizer", "template", allow=["model"])


def test_another_learning_rate_goes_on_where_it_is_allowed(run: Path, whole: Reference) -> None:
    recipe = changed(whole, "training", learning_rate=0.002)
    refused(run, recipe, "training.learning_rate")
    job = Run(run)
    job.write_text(job.recipe_file, job.recipe_file.read_text().replace("learning_rate: 0.01", "learning_rate: 0.002"))
    refused(run, recipe, "of another training", "0.01 when the training began, now 0.002", "--allow-change training.learning_rate")
    assert forked().run("train", run, recipe=recipe, allow=["training.learning_rate"]) == 0, log_of(run)
    assert events(run, "conditions_changed")[0]["changed"] == {"training.learning_rate": [0.01, 0.002]}
    rows, _ = outcome(run)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    before = [row for row in whole.rows if "loss" in row]
    assert steps[:14] == before[:14], "what was done stays"
    assert steps[14]["learning_rate"] == pytest.approx(before[14]["learning_rate"] / 5)
    assert steps[15]["loss"] != before[15]["loss"]


def test_every_condition_is_looked_at(run: Path) -> None:
    """What 2.4 rule 6 names is there; each field alone, changed, is refused by its name, or told where it is only the place of the work."""
    _, state = read_checkpoint(run / "checkpoints" / "step-00000014")
    fingerprint = store_of(run, []).fingerprint
    assert {
        "data.train", "data.validation", "tokenizer", "template", "base_model.weights", "initial_weights", "training.method", "training.learning_rate",
        "training.micro_batch_size", "training.objective", "training.layers", "lora.rank", "lora.target_modules", "lora.alpha", "lora.dropout", "seed",
        "world_size", "model.dtype", "engine.length_buckets", "versions.burnish", "versions.torch", "versions.transformers", "versions.tokenizers",
        "versions.peft", "versions.numpy", "versions.python", "machine.threads",
    } <= fingerprint.keys()  # fmt: skip
    places = {"world_size", "model.device", "machine.threads", "machine.instructions", "machine.kernels", "machine.gpu"}
    for field in fingerprint:
        told: list[tuple[str, dict[str, Any]]] = []
        store = store_of(run, told)
        store.fingerprint = {**fingerprint, field: "another"}
        if field not in places:
            with pytest.raises(
                RecipeError, match=rf"(?s)1 of its conditions differ.*{re.escape(field)} — .* when the training began, now 'another'"
            ):
                store.newest()
            continue
        found = store.newest()
        assert found is not None
        assert found.progress == state.progress
        assert told == [("conditions_changed", {"at_step": 14, "changed": {field: [fingerprint[field], "another"]}, "bit_exact": False})]


def test_all_fields_that_differ_are_listed_at_once(run: Path) -> None:
    store = store_of(run, [])
    store.fingerprint = {**store.fingerprint, "data.train": "x", "template": "y", "lora.rank": 99, "training.learning_rate": 1.0}
    with pytest.raises(RecipeError, match="4 of its conditions differ") as caught:
        store.newest()
    assert [problem.where for problem in caught.value.problems] == ["data.train", "lora.rank", "template", "training.learning_rate"]


def test_other_first_weights_are_refused(run: Path) -> None:
    """A stage that begins with another adapter is another training, whatever its recipe says."""
    store = store_of(run, [])
    store.fingerprint = {**store.fingerprint, "initial_weights": "0" * 64}
    with pytest.raises(RecipeError, match="initial_weights"):
        store.newest()


def test_another_library_version_needs_leave(run: Path) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    store = store_of(run, told)
    store.fingerprint = {**store.fingerprint, "versions.torch": "99.0"}
    with pytest.raises(RecipeError, match=r"versions\.torch.*now '99\.0'.*--allow-change versions\.torch"):
        store.newest()
    store.allowed = ("versions",)
    state = store.newest()
    assert state is not None
    assert state.progress["step"] == 14
    assert told[0][0] == "conditions_changed"


def test_a_checkpoint_without_room_is_refused_before_it_is_begun(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(run, [])
    state = store.newest()
    assert state is not None
    usage = shutil.disk_usage(run)
    monkeypatch.setattr("burnish.training.checkpoint.shutil.disk_usage", lambda _: usage._replace(free=2 * store.last_bytes - 1))
    with pytest.raises(TrainingError, match="insufficient_storage") as caught:
        store.save(State({**state.progress, "step": 15}, state.weights, state.optimizer, state.random))
    assert caught.value.code == "insufficient_storage"
    assert not (run / "checkpoints" / "step-00000015").exists()
    monkeypatch.setattr("burnish.training.checkpoint.shutil.disk_usage", lambda _: usage._replace(free=2 * store.last_bytes))
    store.save(State({**state.progress, "step": 15}, state.weights, state.optimizer, state.random))
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept == ["step-00000014", "step-00000015"], "two are kept"
