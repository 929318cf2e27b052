"""A .gguf file: the model has the weights that it holds, row by row; a file that transformers reads otherwise is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import ModelError
from burnish.models import load_base
from burnish.models.gguf_file import prove_file
from burnish.recipe import Recipe, build_recipe
from tiny_gguf import write_gguf


def recipe_on(folder: Path, dtype: str = "float32") -> Recipe:
    return build_recipe({"model": {"name": str(folder), "dtype": dtype, "device": "cpu"}, "data": "d", "training": {"method": "qlora"}})


def test_gguf_by_hand(gguf_folder: Path) -> None:
    """Q4_0 decoded here: a block of 18 bytes holds 32 weights: a half-precision scale, then 16 bytes whose low halves are weights 0 to 15."""
    import gguf

    model = load_base(recipe_on(gguf_folder), quantizer="gguf")
    tensor = next(t for t in gguf.GGUFReader(gguf_folder / "tiny.Q4_0.gguf").tensors if t.name == "blk.2.ffn_down.weight")
    blocks = torch.tensor(tensor.data).reshape(-1, 18)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    by_hand = (torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], 1).float() - 8) * scales
    found = model.get_submodule("model.layers.2.mlp.down_proj").weight
    torch.testing.assert_close(found, by_hand.reshape(64, 128), rtol=1e-6, atol=1e-7)


def test_two_libraries_decode_gguf_blocks_alike() -> None:
    """Random bytes in every kind of block that transformers knows: gguf's decoder, which the proof asks, against transformers' own."""
    gguf = pytest.importorskip("gguf", reason="needs the extra `quantized`")
    ours = pytest.importorskip("transformers.integrations.gguf.dequant", reason="needs transformers 5.23")
    generator = torch.Generator().manual_seed(0)
    for number, (weights, size) in ours.GGML_BLOCK.items():
        kind = gguf.GGMLQuantizationType(number)
        # A byte above 64 can be the high half of a scale that is infinite or no number.
        blocks = torch.randint(0, 64, (40, size), dtype=torch.uint8, generator=generator)
        expected = torch.tensor(gguf.quants.dequantize(blocks.numpy(), kind)).reshape(-1)
        assert expected.numel() == 40 * weights
        torch.testing.assert_close(ours.dequantize(blocks.reshape(-1), number), expected, rtol=1e-5, atol=1e-5, msg=kind.name)


def test_a_gguf_file_read_otherwise_than_it_was_written_is_refused(
    gguf_folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows left in the file's order, a tensor drawn at random, a wrong decoder, a changed weight: each names the layer and the tensor."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    with monkeypatch.context() as patch:
        patch.setitem(reading.TENSOR_PROCESSORS, "llama", reading.TensorProcessor)
        with pytest.raises(
            ModelError, match=r"layers\.0\.self_attn\.q_proj: 1\..* away from blk\.0\.attn_q\.weight \(Q4_0\); .*k_proj.* and 3 more"
        ):
            load_base(recipe_on(gguf_folder), quantizer="gguf")
    with monkeypatch.context() as patch:
        real = gguf.dequantize
        patch.setattr(gguf, "dequantize", lambda data, kind: real(data, kind) * (1.01 if kind == gguf.GGMLQuantizationType.Q8_0 else 1))
        with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj: 1\.0e-02 away from blk\.1\.attn_v\.weight \(Q8_0\)\. Take"):
            load_base(recipe_on(gguf_folder), quantizer="gguf")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj: there is no tensor blk\.1\.ffn_up\.weight\. Take"):
        load_base(recipe_on(write_gguf(tmp_path, tokenizer, left_out="blk.1.ffn_up.weight")), quantizer="gguf")
    for method in ("lora", "qlora"):
        recipe = build_recipe(recipe_on(gguf_folder, "bfloat16").to_dict() | {"training": {"method": method}})
        model = load_base(recipe, quantizer="gguf" if method == "qlora" else None)
        prove_file(model, gguf_folder / "tiny.Q4_0.gguf")
        model.get_input_embeddings().weight.data[0] += 1
        with pytest.raises(ModelError, match=r"model\.embed_tokens: .* away from token_embd\.weight \(F32\)"):
            prove_file(model, gguf_folder / "tiny.Q4_0.gguf")


def test_a_folder_with_nothing_but_a_gguf_file_is_a_model(gguf_folder: Path, tmp_path: Path) -> None:
    from burnish.models import context_window, find_model, load_chat

    assert find_model(str(gguf_folder)) == str(gguf_folder)
    assert context_window(str(gguf_folder)) == 512
    recipe = build_recipe({"model": {"name": str(gguf_folder), "dtype": "bfloat16"}, "data": "d"})
    assert load_base(recipe).dtype == torch.bfloat16
    assert load_chat(recipe.model).encode([{"role": "user", "content": "a red cat"}], add_generation_prompt=True)
    twice = tmp_path / "twice"
    shutil.copytree(gguf_folder, twice)
    shutil.copy(twice / "tiny.Q4_0.gguf", twice / "tiny.Q8_0.gguf")
    with pytest.raises(ModelError, match=r"2 \.gguf files"):
        find_model(str(twice))
