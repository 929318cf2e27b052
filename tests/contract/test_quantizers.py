"""Every entry of QUANTIZERS: the base multiplies by the matrix that its bits stand for, trains an adapter, and evaluation puts that adapter on the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.errors import ModelError
from burnish.models import METHODS, QUANTIZERS, load_adapter, load_base, load_trained, quantizer_facts, save_trained, weights_hash
from burnish.models import quantize as room
from burnish.models.quantize import choose_quantizer, prove, quantize, quantized_layers, why_not
from burnish.recipe import Recipe, build_recipe
from conftest import build_tiny

# QLoRA (arXiv 2305.14314), appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40]])


def installed(name: str) -> None:
    reason = why_not(name, "cpu")
    if reason and "is not installed" in reason:
        pytest.skip(reason)
    assert reason is None  # installed and wrong is no reason to skip


def recipe_on(folder: Path, dtype: str = "float32") -> Recipe:
    return build_recipe(
        {"model": {"name": str(folder), "dtype": dtype, "device": "cpu"}, "data": "d", "training": {"method": "qlora"}, "lora": {"rank": 4}}
    )


def base_of(name: str, wide_folder: Path, gguf_folder: Path, dtype: str = "float32") -> tuple[Any, Recipe]:
    if name != "gguf":
        installed(name)
    recipe = recipe_on(gguf_folder if name == "gguf" else wide_folder, dtype)
    return load_base(recipe, quantizer=name), recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_base_is_its_dequantised_matrix(name: str, dtype: str, tokenizer: Any, wide_folder: Path, gguf_folder: Path) -> None:
    """Each layer, and the whole model against a plain one that holds the de-quantised matrices."""
    model, _ = base_of(name, wide_folder, gguf_folder, dtype)
    assert len(quantized_layers(model)) == 21  # seven in each of three layers; not the head
    assert "unquantized_layers" not in quantizer_facts(model)
    equals_its_matrices(model, build_tiny("llama", tokenizer, hidden=64), name, exact=dtype == "float32")


def equals_its_matrices(model: Any, plain: Any, name: str, *, exact: bool) -> None:
    """`plain` is the model before quantising; it is changed."""
    for path, layer in quantized_layers(model).items():
        matrix = QUANTIZERS[name].dequantized(layer)
        x = torch.randn(5, matrix.shape[1], generator=torch.Generator().manual_seed(0))
        expected = x @ matrix.T
        found = layer(x.to(model.dtype)).float()
        torch.testing.assert_close(found, expected, rtol=1e-5 if exact else 2e-2, atol=1e-6 if exact else 2e-2)
        error = (matrix - plain.get_submodule(path).weight).norm() / plain.get_submodule(path).weight.norm()
        assert 0.002 < error < 0.15  # it is quantised, and it is these weights
        plain.get_submodule(path).weight = torch.nn.Parameter(matrix)
    with torch.no_grad():
        found, expected = model(IDS).logits.float(), plain(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4 if exact else 0.1, atol=1e-4 if exact else 0.15)


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_layers_whose_rows_do_not_divide_into_blocks_stay_as_they_are(name: str, tokenizer: Any, tiny_folder: Path) -> None:
    """Rows of 32 weights in six of seven layers: bitsandbytes decodes those wrongly on CPUs with AVX512."""
    installed(name)
    told: list[str] = []
    model, plain = load_base(recipe_on(tiny_folder), lambda *parts: told.append(parts[3]), quantizer=name), build_tiny("llama", tokenizer)
    assert set(quantized_layers(model)) == {f"model.layers.{number}.mlp.down_proj" for number in range(3)}
    assert [text for text in told if text.startswith("18 linear layers stay as they are")]
    assert quantizer_facts(model)["unquantized_layers"] == 18
    for path, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "down_proj" not in path:
            assert torch.equal(model.get_submodule(path).weight, module.weight), path
    equals_its_matrices(model, plain, name, exact=True)
    narrow = torch.nn.Sequential(torch.nn.Linear(32, 64))
    narrow.get_output_embeddings = lambda: None  # type: ignore[assignment]
    narrow.device = torch.device("cpu")
    with pytest.raises(ModelError, match="could be quantised: a row of none divides into blocks of 64"):
        quantize(narrow, name)


@pytest.mark.parametrize("shape", [(64, 64), (64, 128), (64, 32), (48, 96), (128, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_by_hand(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """nf4 decoded here: two codes a byte, the high half first, times the block's scale, itself a code times a scale plus an offset.

    And `prove` refuses exactly those shapes that the library's kernel decodes otherwise on this CPU: none without AVX512."""
    installed("bitsandbytes")
    import bitsandbytes

    linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
    weight = linear.weight.float()
    layer = QUANTIZERS["bitsandbytes"].linear(linear.requires_grad_(False))
    packed, state = layer.weight.data.reshape(-1), layer.weight.quant_state
    codes = torch.stack([packed >> 4, packed & 15], -1).reshape(-1)
    scales = state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)] + state.offset
    by_hand = (torch.tensor(NF4)[codes.long()].reshape(-1, 64) * scales[:, None]).reshape(shape)
    torch.testing.assert_close(QUANTIZERS["bitsandbytes"].dequantized(layer), by_hand, rtol=1e-6, atol=1e-7)
    assert 0.05 < (by_hand - weight).norm() / weight.norm() < 0.15
    by_library = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float()
    if torch.allclose(by_library, by_hand, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6):
        return prove(layer, "bitsandbytes")
    assert shape[1] % 64 != 0
    with pytest.raises(ModelError, match=rf"\({shape[0]} × {shape[1]}\)"):
        prove(layer, "bitsandbytes")


@pytest.mark.parametrize("what", ["product", "product in training", "gradient"])
def test_a_kernel_that_is_wrong_for_one_shape_is_refused(
    what: str, tokenizer: Any, wide_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the last of a model's shapes, in one of the ways that it is used: every shape is proved in each, and the layer is named."""
    installed("bitsandbytes")
    import bitsandbytes

    real = bitsandbytes.nn.Linear4bit.forward

    def wrong(self: Any, x: torch.Tensor) -> torch.Tensor:
        found = real(self, x)
        if self.in_features != 128 or x.requires_grad == (what == "product"):
            return found
        return 2 * found - found.detach() if what == "gradient" else found + found.detach()

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", wrong)
    told = rf"bitsandbytes [\d.]+: model\.layers\.0\.mlp\.down_proj \(64 × 128\): its {what} is 1\.0e\+00 away from the matrix"
    with pytest.raises(ModelError, match=told):
        quantize(build_tiny("llama", tokenizer, hidden=64), "bitsandbytes")
    with pytest.raises(ModelError, match=told):
        load_base(recipe_on(wide_folder), quantizer="bitsandbytes")


def test_a_library_that_dequantises_wrongly_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof does not ask the library what its bits stand for: halves of each byte taken in the wrong order are found."""
    installed("bitsandbytes")
    import bitsandbytes

    real = bitsandbytes.functional.dequantize_4bit
    swapped = lambda packed, state, *rest: real((packed >> 4) | (packed << 4), state, *rest)  # noqa: E731
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", swapped)
    with pytest.raises(ModelError, match=r"model\.layers\.0\..*away from the matrix that its bits stand for"):
        quantize(build_tiny("llama", tokenizer, hidden=64), "bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchao_by_its_own_decoder(dtype: torch.dtype) -> None:
    installed("torchao")
    layer = QUANTIZERS["torchao"].linear(torch.nn.Linear(192, 24, bias=False, dtype=dtype).requires_grad_(False))
    found, expected = QUANTIZERS["torchao"].dequantized(layer), layer.weight.get_original_weight().float()
    torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-7)
    assert "get_original_weight" not in QUANTIZERS["torchao"].dequantized.__code__.co_names


def test_in_place_and_through_transformers_are_the_same_base(tokenizer: Any, wide_folder: Path, tiny_folder: Path) -> None:
    installed("bitsandbytes")
    for folder, hidden in ((wide_folder, 64), (tiny_folder, 32)):
        the_same_base(
            load_base(recipe_on(folder), quantizer="bitsandbytes"), build_tiny("llama", tokenizer, hidden), 21 if hidden == 64 else 3
        )


def the_same_base(read: Any, plain: Any, count: int) -> None:
    made = quantize(plain, "bitsandbytes")
    assert quantized_layers(made).keys() == quantized_layers(read).keys()
    assert len(quantized_layers(made)) == count
    for path, layer in quantized_layers(made).items():
        assert torch.equal(layer.weight.data, quantized_layers(read)[path].weight.data)
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, made(IDS).logits)


def test_gpt2_holds_its_linear_layers_transposed(tmp_path: Path) -> None:
    """Conv1D: the same base by both routes, and its own de-quantised self; an adapter goes on it."""
    installed("bitsandbytes")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()
    plain.save_pretrained(tmp_path)
    recipe = recipe_on(tmp_path)
    read, exact = load_base(recipe, quantizer="bitsandbytes"), GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    the_same_base(read, plain, 8)
    for path, layer in quantized_layers(read).items():
        exact.get_submodule(path).weight.data = QUANTIZERS["bitsandbytes"].dequantized(layer).T.contiguous()
    with torch.no_grad():
        torch.testing.assert_close(read(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-4)
        assert METHODS["qlora"](read, recipe)(IDS).logits.shape == (1, 7, 400)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_adapter_goes_back_on_the_same_base_only(name: str, chat: Any, wide_folder: Path, gguf_folder: Path, tmp_path: Path) -> None:
    base, recipe = base_of(name, wide_folder, gguf_folder)
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
def test_validation_does_not_change_the_base(name: str, wide_folder: Path, gguf_folder: Path) -> None:
    """bitsandbytes repacks a layer that runs outside training, unless it is told not to."""
    model, _ = base_of(name, wide_folder, gguf_folder, "bfloat16")
    x = torch.randn(4, 64, dtype=torch.bfloat16)
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
    model = quantize(build_tiny("llama", tokenizer, hidden=64), "bitsandbytes")
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    prove(layer, "bitsandbytes")
    layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(ModelError, match="away from the matrix"):
        prove(layer, "bitsandbytes")
