"""Every entry of QUANTIZERS: the base multiplies by the matrix that its bits stand for, trains an adapter, and evaluation puts that adapter on the same base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import ModelError
from burnish.models import METHODS, QUANTIZERS, load_adapter, load_base, load_trained, quantizer_facts, save_trained, weights_hash
from burnish.models import quantize as room
from burnish.models.quantize import choose_quantizer, prove, quantize, quantized_layers, why_not
from burnish.recipe import Recipe, build_recipe
from conftest import build_tiny, tiny_config

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40]])


def installed(name: str) -> None:
    if reason := why_not(name, "cpu"):
        pytest.skip(reason)


def recipe_on(folder: Path, dtype: str = "float32") -> Recipe:
    return build_recipe(
        {"model": {"name": str(folder), "dtype": dtype, "device": "cpu"}, "data": "d", "training": {"method": "qlora"}, "lora": {"rank": 4}}
    )


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama in 4-bit blocks (Q4_0), with its tokenizer beside it, as converters leave it."""
    gguf = pytest.importorskip("gguf", reason="needs the extra `quantized`")
    folder = tmp_path_factory.mktemp("tiny-gguf")
    tokenizer.save_pretrained(folder)
    config, model = tiny_config("llama", len(tokenizer)), build_tiny("llama", tokenizer)
    writer = gguf.GGUFWriter(folder / "tiny.Q4_0.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.removeprefix("model.layers.").split(".", 1)
        target = whole.get(name) or f"blk.{parts[0]}.{names[parts[1].removesuffix('.weight')]}.weight"
        array = value.float().numpy()
        kind = gguf.GGMLQuantizationType.Q4_0 if ".proj" in name.replace("_proj", ".proj") else gguf.GGMLQuantizationType.F32
        writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def base_of(name: str, tiny_folder: Path, gguf_folder: Path, dtype: str = "float32") -> tuple[Any, Recipe]:
    if name != "gguf":
        installed(name)
    recipe = recipe_on(gguf_folder if name == "gguf" else tiny_folder, dtype)
    return load_base(recipe, quantizer=name), recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_base_is_its_dequantised_matrix(name: str, dtype: str, tiny_folder: Path, gguf_folder: Path) -> None:
    """Each layer, and the whole model against a plain one that holds the de-quantised matrices."""
    model, recipe = base_of(name, tiny_folder, gguf_folder, dtype)
    layers = quantized_layers(model)
    assert len(layers) == 21  # seven in each of three layers; not the head
    plain = build_tiny_like(recipe, tiny_folder)
    exact = dtype == "float32"
    for path, layer in layers.items():
        matrix = QUANTIZERS[name].dequantized(layer)
        x = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(0))
        expected = x @ matrix.T
        found = layer(x.to(getattr(torch, dtype))).float()
        torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 2e-2, atol=1e-6 if exact else 2e-2)
        error = (matrix - plain.get_submodule(path).weight).norm() / plain.get_submodule(path).weight.norm()
        assert 0.02 < error < 0.15 or name == "gguf"  # it is quantised, and it is these weights
        plain.get_submodule(path).weight = torch.nn.Parameter(matrix)
    if name != "gguf":
        with torch.no_grad():
            found, expected = model(IDS).logits.float(), plain(IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4 if exact else 0.1, atol=1e-4 if exact else 0.15)


def build_tiny_like(recipe: Recipe, tiny_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def test_bitsandbytes_by_hand(tokenizer: Any) -> None:
    """nf4 decoded here: two codes a byte, the high half first, times the block's scale, itself a code times a scale plus an offset."""
    installed("bitsandbytes")
    model = quantize(build_tiny("llama", tokenizer), "bitsandbytes")
    layer = quantized_layers(model)["model.layers.1.mlp.up_proj"]
    packed, state = layer.weight.data.reshape(-1), layer.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset
    by_hand = (torch.tensor(NF4)[codes.long()].reshape(-1, 64) * scales[:, None]).reshape(64, 32)
    torch.testing.assert_close(QUANTIZERS["bitsandbytes"].dequantized(layer), by_hand, rtol=1e-6, atol=1e-7)


def test_gguf_by_another_reader(gguf_folder: Path) -> None:
    import gguf

    model = load_base(recipe_on(gguf_folder), quantizer="gguf")
    tensor = next(t for t in gguf.GGUFReader(gguf_folder / "tiny.Q4_0.gguf").tensors if t.name == "blk.2.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    torch.testing.assert_close(model.get_submodule("model.layers.2.mlp.down_proj").weight, expected, rtol=1e-6, atol=1e-7)


def test_in_place_and_through_transformers_are_the_same_base(tokenizer: Any, tiny_folder: Path) -> None:
    installed("bitsandbytes")
    read = load_base(recipe_on(tiny_folder), quantizer="bitsandbytes")
    made = quantize(build_tiny("llama", tokenizer), "bitsandbytes")
    for path, layer in quantized_layers(made).items():
        assert torch.equal(layer.weight.data, quantized_layers(read)[path].weight.data)
    assert torch.equal(read(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_adapter_goes_back_on_the_same_base_only(name: str, chat: Any, tiny_folder: Path, gguf_folder: Path, tmp_path: Path) -> None:
    base, recipe = base_of(name, tiny_folder, gguf_folder)
    sha256 = weights_hash(recipe.model.name)
    model = METHODS["qlora"](base, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    save_trained(model, chat, tmp_path / "adapter", {"step": 1, "base_sha256": sha256, "method": "qlora"})
    assert quantizer_facts(model)["quantizer"] == name
    with torch.no_grad():
        assert torch.equal(load_trained(recipe, tmp_path / "adapter")(IDS).logits, model(IDS).logits)
    plain = load_base(build_recipe(recipe.to_dict() | {"training": {"method": "lora"}}))
    with pytest.raises(ModelError, match=r"trained on a base held as.*not on the unquantised base"):
        load_adapter(plain, tmp_path / "adapter", sha256)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_validation_does_not_change_the_base(name: str, tiny_folder: Path, gguf_folder: Path) -> None:
    """bitsandbytes repacks a layer that runs outside training, unless it is told not to."""
    model, _ = base_of(name, tiny_folder, gguf_folder, "bfloat16")
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    model.train()
    before = layer(x.requires_grad_(True)).detach().clone()
    model.eval()
    with torch.inference_mode():
        layer(x.detach())
    model.train()
    assert torch.equal(layer(x).detach(), before)


def test_the_first_that_runs_here_is_taken_and_else_the_reasons_are_told(monkeypatch: pytest.MonkeyPatch, gguf_folder: Path) -> None:
    reasons = {"bitsandbytes": "is not installed", "torchao": "no kernel"}
    monkeypatch.setattr(room, "why_not", lambda name, device: reasons.get(name))
    with pytest.raises(ModelError, match=r"bitsandbytes: is not installed; torchao: no kernel.*burnish\[quantized\]"):
        choose_quantizer("cpu")
    assert choose_quantizer("cpu", gguf_folder) == "gguf"
    del reasons["torchao"]
    assert choose_quantizer("cpu", gguf_folder) == "torchao"


def test_a_layer_that_does_not_compute_its_matrix_is_refused(tokenizer: Any) -> None:
    installed("bitsandbytes")
    model = quantize(build_tiny("llama", tokenizer), "bitsandbytes")
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    prove(layer, "bitsandbytes")
    layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ModelError, match="away from the matrix"):
        prove(layer, "bitsandbytes")


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
