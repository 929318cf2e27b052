"""A merged model is base + adapter: by plain transformers, by plain PEFT, by hand; and a merge that is not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.errors import ModelError
from burnish.models import METHODS, load_base, merge, merge_adapter, save_trained, verify_adapter, weights_hash
from burnish.recipe import Recipe, build_recipe

PROBE = [[1, 5, 6, 7, 30, 31, 40], [1, 50, 51, 52]]
IDS = torch.tensor([PROBE[0]])


def adapter(
    method: str, folder: Path, chat: Any, out: Path, *, size: float = 0.1, dtype: str = "float32", **training: Any
) -> tuple[Recipe, Any]:
    recipe = build_recipe(
        {"model": {"name": str(folder), "dtype": dtype}, "data": "d", "training": {"method": method, **training}, "lora": {"rank": 4}}
    )
    model = METHODS[method](load_base(recipe), recipe)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (method == "full" and parameter.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    save_trained(model, chat, out, {"step": 1, "base_sha256": weights_hash(str(folder)), "method": method})
    return recipe, model


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tokenizer: Any) -> Path:
    """The tiny model stored in bfloat16."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_merged_loads_in_plain_transformers(method: str, tiny_folder: Path, chat: Any, tmp_path: Path) -> None:
    recipe, model = adapter(method, tiny_folder, chat, tmp_path / "adapter", layers=[0, 2])
    found = merge_adapter(recipe, tmp_path / "adapter", chat, tmp_path / "merged", PROBE)
    with torch.no_grad():
        expected = model(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        by_peft = model.merge_and_unload()
        torch.testing.assert_close(plain(IDS).logits, by_peft(IDS).logits, rtol=1e-4, atol=1e-4)
    assert found.error < 1e-4 < found.effect
    assert found.probe_tokens == 11
    assert verify_adapter(tmp_path / "merged", weights_hash(str(tiny_folder)))["method"] == "merged"
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == chat.template


def test_the_cast_is_the_only_rounding(half_folder: Path, chat: Any, tmp_path: Path) -> None:
    """W + 8 · B A in float64, cast once to the base's type, is what the file holds; trained in float32 or bfloat16."""
    recipe, model = adapter("lora", half_folder, chat, tmp_path / "adapter")
    merge_adapter(recipe, tmp_path / "adapter", chat, tmp_path / "merged", PROBE)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    by_hand = (layer.base_layer.weight.double() + 8 * b @ a).bfloat16()
    found = merged.get_submodule("model.layers.1.self_attn.o_proj").weight
    assert (found != by_hand).float().mean() < 0.01  # ties of the last bit
    torch.testing.assert_close(found.float(), by_hand.float(), rtol=2**-7, atol=0)


def test_a_wrong_merge_is_refused_and_leaves_nothing(tiny_folder: Path, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = adapter("lora", tiny_folder, chat, tmp_path / "adapter")
    monkeypatch.setattr(merge, "_merged", lambda model, dtype: model.unload().to(dtype))  # the adapter forgotten
    with pytest.raises(ModelError, match="not base \\+ adapter"):
        merge_adapter(recipe, tmp_path / "adapter", chat, tmp_path / "merged", PROBE)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_the_cast_would_swallow_is_refused(half_folder: Path, chat: Any, tmp_path: Path) -> None:
    recipe, _ = adapter("lora", half_folder, chat, tmp_path / "adapter", size=1e-5)
    with pytest.raises(ModelError, match="would be lost"):
        merge_adapter(recipe, tmp_path / "adapter", chat, tmp_path / "merged", PROBE)


def test_an_adapter_of_a_four_bit_base_is_another_model_when_merged(wide_folder: Path, chat: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    recipe, model = adapter("qlora", wide_folder, chat, tmp_path / "adapter")
    told: list[str] = []
    found = merge_adapter(recipe, tmp_path / "adapter", chat, tmp_path / "merged", PROBE, lambda *parts: told.append(parts[3]))
    assert any("not the same model" in text for text in told)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        difference = torch.cat([(plain(ids).logits - model(ids).logits)[0] for ids in (torch.tensor([row]) for row in PROBE)])
    assert found.difference_to_trained == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-3)
    assert found.difference_to_trained > 100 * found.error
    assert "bitsandbytes" in (found.quantized or "")


def test_whole_weights_need_no_merge(tiny_folder: Path, chat: Any, tmp_path: Path) -> None:
    recipe, _ = adapter("full", tiny_folder, chat, tmp_path / "whole", size=0.05)
    with pytest.raises(ModelError, match="nothing to merge"):
        merge_adapter(recipe, tmp_path / "whole", chat, tmp_path / "merged", PROBE)
