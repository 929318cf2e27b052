"""An adapter at a share of its strength: 0 is the base, 1 the tuned model, between them W + s·BA by hand; what is published answers the same in plain PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from burnish.errors import ModelError
from burnish.models import (
    METHODS,
    Scaled,
    load_chat,
    load_model,
    load_trained,
    publish_scaled,
    save_trained,
    trainable_parameters,
    weights_hash,
)
from burnish.models import scale as scale_room
from burnish.recipe import Recipe, build_recipe

IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40, 9, 12]])
ADAPTERS = ("lora", "rslora", "dora")


def recipe_of(folder: Path, method: str, dtype: str = "float32") -> Recipe:
    return build_recipe(
        {"model": {"name": str(folder), "dtype": dtype}, "data": "x.jsonl", "training": {"method": method}, "lora": {"rank": 4, "alpha": 6}}
    )


def made(recipe: Recipe, folder: Path) -> Path:
    """A trained folder: every trained weight moved by a little noise."""
    model = METHODS[recipe.training.method](load_model(recipe.model), recipe)
    torch.manual_seed(5)
    for name, parameter in trainable_parameters(model).items():
        if "lora_A" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_trained(
        model,
        load_chat(recipe.model),
        folder,
        {"step": 3, "method": recipe.training.method, "base_sha256": weights_hash(recipe.model.name)},
    )
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float().clone()


def by_hand(recipe: Recipe, folder: Path, scale: float) -> torch.Tensor:
    """The logits with each weight computed here, from the tensors in the files."""
    from safetensors.torch import load_file

    base = AutoModelForCausalLM.from_pretrained(recipe.model.name, dtype=torch.float32)
    if recipe.training.method == "full":
        tuned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        mixed = {name: (1 - scale) * value + scale * tuned[name] for name, value in copy.deepcopy(base.state_dict()).items()}
        base.load_state_dict(mixed)
        return logits(base.eval())
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    strength = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for name, value in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer = base.get_submodule(path)
        moved = layer.weight.data + scale * strength * tensors[name.replace("lora_A", "lora_B")] @ value
        if config["use_dora"]:
            own = layer.weight.data.norm(dim=1)
            length = (1 - scale) * own + scale * tensors[name.replace("lora_A.weight", "lora_magnitude_vector")]
            moved = moved * (length / moved.norm(dim=1))[:, None]
        layer.weight.data.copy_(moved)
    return logits(base.eval())


@pytest.mark.parametrize("method", [*ADAPTERS, "full"])
def test_the_ends_and_what_lies_between(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, method)
    folder = made(recipe, tmp_path / "adapter")
    base, tuned = logits(load_model(recipe.model)), logits(load_trained(recipe, folder))
    scaled = Scaled(recipe, folder)
    assert (tuned - base).abs().max() > 0.01, "the training changes something"
    for scale in (0.5, 1.25, 0.0, 0.25, 1.0):  # in any order, the same model again and again
        found = logits(scaled.at(scale))
        assert torch.allclose(found, by_hand(recipe, folder, scale), atol=2e-4), scale
        expected = {0.0: base, 1.0: tuned}.get(scale)
        if expected is not None:
            assert torch.equal(found, expected), f"scale {scale} is bit for bit the {'base' if not scale else 'tuned model'}"
    assert not any(parameter.requires_grad for parameter in scaled.model.parameters())


@pytest.mark.parametrize("method", [*ADAPTERS, "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_the_model_at_that_scale(method: str, dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    """A stranger's libraries read the folder and give the logits of the scaled model; alpha carries the scale."""
    recipe = recipe_of(tiny_folder, method, dtype)
    folder = made(recipe, tmp_path / "adapter")
    scaled = Scaled(recipe, folder)
    found = publish_scaled(scaled, 0.5, load_chat(recipe.model), tmp_path / "repaired", IDS.tolist())
    expected = logits(scaled.at(0.5))
    kind = getattr(torch, dtype)
    if method == "full":
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "repaired", dtype=kind)
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=kind)
        again = PeftModel.from_pretrained(base, str(tmp_path / "repaired"), autocast_adapter_dtype=False)
        assert again.peft_config["default"].lora_alpha == 3
    close = (logits(again.eval()) - expected).abs().max()
    assert close <= (1e-5 if dtype == "float32" else 0.02)
    assert (found.scale, found.probe_tokens) == (0.5, IDS.numel())
    assert found.error <= 1e-3 * found.spread
    manifest = json.loads((tmp_path / "repaired" / "burnish.json").read_text())
    assert manifest["scale"] == 0.5
    assert manifest["base_sha256"] == weights_hash(str(tiny_folder))
    assert torch.allclose(logits(load_trained(recipe, tmp_path / "repaired")), expected, atol=1e-5 if dtype == "float32" else 0.02)


def test_a_folder_that_does_not_answer_so_is_not_published(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tiny_folder, "lora")
    scaled = Scaled(recipe, made(recipe, tmp_path / "adapter"))
    monkeypatch.setattr(scale_room, "_plain", lambda alpha: 2 * alpha)
    with pytest.raises(ModelError, match="not the model that was measured"):
        publish_scaled(scaled, 0.5, load_chat(recipe.model), tmp_path / "repaired", IDS.tolist())
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_what_a_factor_does_not_reach_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, "lora")
    scaled = Scaled(recipe, made(recipe, tmp_path / "adapter"))
    scaled.model.peft_config["default"].bias = "all"
    with pytest.raises(ModelError, match=r"with bias cannot be scaled.*--try"):
        scaled.at(0.5)
    scaled.at(1), scaled.at(0)
    with pytest.raises(ValueError, match="expected 0"):
        scaled.at(-0.1)


def test_a_4_bit_base(wide_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    recipe = recipe_of(wide_folder, "qlora")
    model = METHODS["qlora"](load_model(recipe.model), recipe)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            parameter.data.normal_(0, 0.05)
    tuned = logits(model.eval())
    with model.disable_adapter():
        base = logits(model)
    save_trained(
        model, load_chat(recipe.model), tmp_path / "adapter", {"step": 1, "method": "qlora", "base_sha256": weights_hash(str(wide_folder))}
    )
    scaled = Scaled(recipe, tmp_path / "adapter")
    assert torch.allclose(logits(scaled.at(1)), tuned, atol=1e-5)
    assert torch.allclose(logits(scaled.at(0)), base, atol=1e-5)
    found = publish_scaled(scaled, 0.75, load_chat(recipe.model), tmp_path / "repaired", IDS.tolist())
    assert found.error <= 1e-3 * found.spread
