"""Success needs proof: the steps were done, weights changed, and what lies on the disk is the adapter that was trained, whole, and answers (2.4, rule 9)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish import pipeline, training
from burnish.errors import BurnishError, ModelError, TrainingError
from burnish.models import trainable_parameters, trained_hash
from burnish.run import Run, hash_file
from burnish.training import checkpoint, proof


def rewrite_manifest(folder: Path) -> None:
    """As if what lies in the folder had been saved like this."""
    manifest = json.loads((folder / "burnish.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)}
    (folder / "burnish.json").write_text(json.dumps(manifest))


def save_wrong(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None]) -> None:
    """Every adapter is saved with a fault that its manifest does not tell of: a library that writes something else than it was given."""
    real = training.save_adapter

    def wrong(model: Any, chat: Any, folder: Path, facts: dict[str, Any]) -> Any:
        done = real(model, chat, folder, facts)
        spoil(folder)
        rewrite_manifest(folder)
        return done

    monkeypatch.setattr(training, "save_adapter", wrong)


def config(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return spoil


def cut(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "another rank": (config(r=8), "r: 4 was trained, 8 stands there"),
    "another scale": (config(lora_alpha=99), "lora_alpha: 32.* was trained, 99 stands there"),
    "other layers": (config(target_modules=["q_proj"]), r"target_modules: \['down_proj'.* was trained, \['q_proj'\] stands there"),
    "another base": (config(base_model_name_or_path="elsewhere"), "base_model_name_or_path: .* was trained, 'elsewhere' stands there"),
    "another method": (config(use_dora=True), "use_dora: False was trained, True stands there"),
    "torn": (cut, r"adapter_config\.json: cannot be read"),
    "of no kind": (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"adapter_config\.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_config_that_is_not_what_was_trained_is_refused(what: str, prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and hashes are right; only reading adapter_config.json shows it."""
    run = prepared()
    spoil, expected = SPOILT[what]
    save_wrong(monkeypatch, spoil)
    with pytest.raises(TrainingError, match=expected):
        pipeline.train(run)
    assert not run.adapter_folder.exists()
    assert run.status()["steps"]["train"]["state"] == "failed"


@pytest.mark.parametrize("spoil", [cut, config(r=8)], ids=["torn", "altered"])
def test_a_config_that_was_altered_later_is_not_answered_with(spoil: Callable[[Path], None], prepared: Callable[..., Run]) -> None:
    run = prepared()
    pipeline.train(run)
    spoil(run.adapter_folder)
    with pytest.raises(ModelError, match=r"adapter_config\.json: not as it was written"):
        pipeline.evaluate(run, trained=True)


def shift(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 if name == min(tensors) else tensor for name, tensor in tensors.items()}, file)


def not_finite(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: torch.full_like(tensor, math.nan) for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("spoil", [shift, not_finite])
@pytest.mark.parametrize("best_is_last", [True, False])
def test_other_weights_are_refused(
    best_is_last: bool, spoil: Callable[[Path], None], prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not training went on after the best weights were saved, so that memory holds others by now."""
    run = prepared(validations_per_epoch=4)
    save_wrong(monkeypatch, spoil)
    losses = iter([9.0, 1.0, 2.0, 3.0, 4.0] if not best_is_last else [9.0, 4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr("burnish.training.loop.mean_loss", lambda *_, **__: next(losses))
    with pytest.raises(TrainingError, match="what was saved are not the trained weights"):
        pipeline.train(run)
    assert not run.adapter_folder.exists()


def test_what_answers_is_read_from_the_disk(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights in memory are made NaN before the proof computes: it does not notice. And afterwards the model is as it was."""
    run = prepared()
    seen: list[Any] = []
    real_prove, real_generate, real_loss = proof.prove, proof.generate, proof._loss

    def spoilt(model: Any) -> list[torch.nn.Parameter]:
        return [parameter for name, parameter in model.named_parameters() if "lora_" in name and ".default." in name]

    def prove(model: Any, *rest: Any, **named: Any) -> Any:
        kept = {name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()}
        assert kept
        seen.append(kept)
        manifest = real_prove(model, *rest, **named)
        for parameter, old in zip(spoilt(model), kept.values(), strict=True):
            assert parameter.isnan().all()
            parameter.data.copy_(old)
        assert trainable_parameters(model).keys() == kept.keys(), "it is trained as before, and nothing is left beside it"
        assert list(model.peft_config) == ["default"]
        assert model.active_adapter == "default"
        return manifest

    def loss(model: Any, *rest: Any) -> float:
        for parameter in spoilt(model):
            parameter.data.fill_(math.nan)
        found = real_loss(model, *rest)
        seen.append(found)
        return found

    def generate(model: Any, *rest: Any) -> Iterator[Any]:
        assert all(parameter.isnan().all() for parameter in spoilt(model))
        (answers,) = list(real_generate(model, *rest))
        seen.append(answers)
        yield answers

    monkeypatch.setattr(training, "prove", prove)
    monkeypatch.setattr(proof, "_loss", loss)
    monkeypatch.setattr(proof, "generate", generate)
    pipeline.train(run)
    assert math.isfinite(seen[1])
    ((_, answer),) = seen[2]
    assert answer.completion_tokens >= 1


def test_the_same_answer_as_a_fresh_model_gives(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, chat: Any) -> None:
    """The proof's answer, once more from the folder and the base alone."""
    from burnish.models import Limits, generate, load_trained

    run = prepared()
    found: list[str] = []
    real = proof.generate

    def noted(*arguments: Any) -> Iterator[Any]:
        for batch in real(*arguments):
            found.extend(answer.text for _, answer in batch)
            yield batch

    monkeypatch.setattr(proof, "generate", noted)
    pipeline.train(run)
    prompt = chat.prompt_ids([{"role": "user", "content": "Hello"}])
    ((_, again),) = next(iter(generate(load_trained(run.recipe(), run.adapter_folder), chat, [prompt], Limits(4))))
    assert found == [again.text]


def test_a_model_that_writes_nothing_is_refused(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    real = proof.generate
    monkeypatch.setattr(
        proof, "generate", lambda *a: ([(index, replace(one, completion_tokens=0)) for index, one in batch] for batch in real(*a))
    )
    with pytest.raises(TrainingError, match="writes nothing at all"):
        pipeline.train(run)
    assert not run.adapter_folder.exists()


def test_a_loss_that_is_not_finite_when_read_back_is_refused(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    monkeypatch.setattr(proof, "_loss", lambda *_: math.inf)
    with pytest.raises(TrainingError, match="read back from the disk, its loss is not finite") as caught:
        pipeline.train(run)
    assert caught.value.code == "diverged"
    assert not run.adapter_folder.exists()


def test_success_needs_the_planned_steps(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that ends early and says nothing: zero steps that look like a success."""
    run = prepared()
    real = training.run_loop

    def early(*arguments: Any, **named: Any) -> Any:
        progress = real(*arguments, **named)
        progress.planned_steps += 1
        return progress

    monkeypatch.setattr(training, "run_loop", early)
    with pytest.raises(TrainingError, match=r"only \d+ of \d+ planned steps were done"):
        pipeline.train(run)
    assert not run.adapter_folder.exists()


def test_weights_that_are_not_finite_are_not_saved(prepared: Callable[..., Run], chat: Any, tmp_path: Path) -> None:
    from burnish.training.stages import start_model

    model = start_model(prepared().recipe())
    parameter = next(iter(trainable_parameters(model).values()))
    parameter.data.view(-1)[3] = math.inf
    with pytest.raises(TrainingError, match="diverged: 1 trained tensors hold NaN or infinity"):
        checkpoint.save_adapter(model, chat, tmp_path / "adapter", {"step": 1})
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------------------------------------------------------ whole weights


def lose(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.layers.0.mlp.up_proj.weight"}, file, {"format": "pt"})


def move_frozen(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, file, {"format": "pt"})


def fewer_layers(folder: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "num_hidden_layers": 2, "layer_types": None}))


def torn_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("spoil", [lose, move_frozen, fewer_layers, torn_config])
def test_whole_weights_are_read_back_too(
    spoil: Callable[[Path], None], prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers makes up a missing tensor and says nothing; the frozen layers of the folder are the base's, and its config builds the model."""
    run = prepared(method="full", layers="last-1", learning_rate=1e-3)
    save_wrong(monkeypatch, spoil)
    with pytest.raises(BurnishError, match=r"tensors are not in it|cannot be read|no adapter there"):
        pipeline.train(run)
    assert not run.adapter_folder.exists()


def test_whole_weights_pass(prepared: Callable[..., Run]) -> None:
    run = prepared(method="full", learning_rate=1e-3)
    summary = pipeline.train(run)
    assert summary["adapter_sha256"] == trained_hash(json.loads((run.adapter_folder / "burnish.json").read_text()))
