"""Every entry of METHODS with every way to choose layers: a fresh model is the base, something is trained and nothing else, and what is saved is read back by plain
PEFT or plain transformers to the same logits. `prepared` is the one place where a model is made, so that another path through it can be tested, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from burnish.errors import ModelError
from burnish.models import LEARNING_RATES, METHODS, is_quantized, load_adapter, load_trained, save_trained, trainable_parameters
from burnish.models.quantize import quantize
from burnish.recipe import Recipe, build_recipe
from burnish.training.loop import Hooks, run_loop
from burnish.types import Tokens
from conftest import build_tiny

IDS = torch.tensor([[1, 5, 6, 7, 30, 31, 40]])
LAYERS: dict[str, Any] = {"all": "all", "last": "last-1", "first": "first-2", "numbers": [0, 2], "regex": r"layers\.1\.(mlp|self_attn)"}
INSIDE = {"all": (0, 1, 2), "last": (2,), "first": (0, 1), "numbers": (0, 2), "regex": (1,)}
ROWS = [Tokens([1, 5 + n, 6, 7, 30 + n, 2], [-100, -100, -100, 7, 30 + n, 2]) for n in range(12)]


def recipe_for(method: str, layers: Any = "all", **lora: Any) -> Recipe:
    training = {"method": method, "layers": layers, "learning_rate": 3e-2, "micro_batch_size": 4, "max_steps": 3, "epochs": 1}
    return build_recipe({"model": "m", "data": "d", "training": training, "lora": {"rank": 4, **lora}})


def prepared(method: str, recipe: Recipe, base: Any) -> Any:
    """The trainable model that training works on."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    return METHODS[method](base.requires_grad_(False), recipe)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.clone()


def trained(model: Any, recipe: Recipe) -> Any:
    """Three steps of the loop."""
    run_loop(model, ROWS, (), settings=recipe.training, seed=0, hooks=Hooks(log=lambda row: None, keep_best=lambda step, loss: None))
    return model.eval()


def frozen(model: Any) -> dict[str, torch.Tensor]:
    wanted = {id(parameter) for parameter in trainable_parameters(model).values()}
    return {
        name: value.detach().clone()
        for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        if id(value) not in wanted
    }


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_method(family: str, method: str, layers: str, tokenizer: Any, chat: Any, tmp_path: Path) -> None:
    hidden = 64 if method == "qlora" else 32
    recipe, base = recipe_for(method, LAYERS[layers]), build_tiny(family, tokenizer, hidden)
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
        base = quantize(base, "bitsandbytes")
    before = logits(base)
    model = prepared(method, recipe, base)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert LEARNING_RATES[method] > 0

    names = list(trainable_parameters(model))
    in_layers = {int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name}
    assert in_layers == set(INSIDE[layers])
    assert all("layers." in name for name in names) or (method == "full" and layers == "all")
    kept, start = frozen(model), {name: value.detach().clone() for name, value in trainable_parameters(model).items()}
    trained(model, recipe)
    assert all(torch.equal(value, kept[name]) for name, value in frozen(model).items())
    assert kept or (method == "full" and layers == "all")
    assert all(not torch.equal(value, start[name]) for name, value in trainable_parameters(model).items())
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)

    folder = tmp_path / "trained"
    save_trained(model, chat, folder, {"step": 3, "base_sha256": "b", "method": method})
    if method == "full":
        again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    else:
        from peft import PeftModel

        fresh = build_tiny(family, tokenizer, hidden)
        again = PeftModel.from_pretrained(quantize(fresh, "bitsandbytes") if method == "qlora" else fresh, folder).eval()
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    fresh = build_tiny(family, tokenizer, hidden)
    ours = load_adapter(quantize(fresh, "bitsandbytes") if method == "qlora" else fresh, folder, "b")
    torch.testing.assert_close(logits(ours), after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_same_numbers_as_plain_peft(method: str, tokenizer: Any) -> None:
    """Logits and gradients of a model that PEFT alone made, with the same weights in its matrices."""
    from peft import LoraConfig, get_peft_model

    recipe = recipe_for(method, alpha=12.0)
    ours = trained(prepared(method, recipe, build_tiny("gemma3", tokenizer)), recipe)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", use_rslora=method == "rslora", use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    plain = get_peft_model(build_tiny("gemma3", tokenizer), config).eval()
    values = {name: value.detach() for name, value in trainable_parameters(ours).items()}
    assert values.keys() == trainable_parameters(plain).keys()
    with torch.no_grad():
        for name, parameter in trainable_parameters(plain).items():
            parameter.copy_(values[name])
    for model in (ours, plain):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:]).backward()
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-6, atol=1e-6)
    slopes = {name: parameter.grad for name, parameter in trainable_parameters(plain).items()}
    for name, parameter in trainable_parameters(ours).items():
        torch.testing.assert_close(parameter.grad, slopes[name], rtol=1e-5, atol=1e-6)


def test_the_scale_is_alpha_over_rank_and_over_its_root(tokenizer: Any) -> None:
    """By hand on one layer: y = W x + scale · B A x."""
    for method, scale in (("lora", 32 / 4), ("rslora", 32 / 2)):
        model = trained(prepared(method, recipe := recipe_for(method), build_tiny("llama", tokenizer)), recipe)
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        a, b, w = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ w.T + scale * (x @ a.T) @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("last-4", "3 decoder layers"), ("first-0", "first-1 to first-3"), ([0, 3, 7], "no layer 3, 7.*0 to 2"), ([], "empty"), ("last-", "model.layers"),
        ("no_such", r"layers\.\*\.mlp\.up_proj|embed_tokens"), ("mlp(", "regex"),
    ],
)  # fmt: skip
def test_a_choice_that_finds_nothing_says_what_there_is(method: str, layers: Any, told: str, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=f"(?s)training.layers.*({told})"):
        prepared(method, recipe_for(method, layers), build_tiny("llama", tokenizer))


def test_target_modules_and_layers_meet(tokenizer: Any) -> None:
    for targets in (["q_proj", "up_proj"], r".*\.(q_proj|up_proj)"):
        model = prepared("lora", recipe_for("lora", "last-2", target_modules=targets), build_tiny("llama", tokenizer))
        kept = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in trainable_parameters(model)}
        assert kept == {f"{number}.{name}" for number in (1, 2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    with pytest.raises(ModelError, match=r"lora\.target_modules.*k_proj.*down_proj"):
        prepared("lora", recipe_for("lora", [0], target_modules=["no_such"]), build_tiny("llama", tokenizer))


def test_full_with_a_regex_reaches_the_tied_head_and_the_norms(tokenizer: Any) -> None:
    model = prepared("full", recipe_for("full", "lm_head|embed_tokens"), build_tiny("llama", tokenizer))
    assert list(trainable_parameters(model)) == ["model.embed_tokens.weight"]
    model = prepared("full", recipe_for("full", "norm"), build_tiny("llama", tokenizer))
    assert len(trainable_parameters(model)) == 7


def test_unknown_modules_are_named(tokenizer: Any) -> None:
    recipe = build_recipe({"model": "m", "data": "d", "lora": {"target_modules": ["no_such_proj"]}})
    with pytest.raises(ModelError, match="no_such_proj"):
        METHODS["lora"](build_tiny("llama", tokenizer), recipe)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_trained_weights_live_in_the_compute_type_and_come_back_through_the_recipe(
    method: str, chat: Any, wide_folder: Path, tmp_path: Path
) -> None:
    from burnish.models import load_base, weights_hash

    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
    content = recipe_for(method).to_dict() | {"model": {"name": str(wide_folder), "dtype": "bfloat16"}}
    recipe = build_recipe(content)
    model = METHODS[method](load_base(recipe), recipe)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.bfloat16}
    assert is_quantized(model) == (method == "qlora")
    trained(model, recipe)
    save_trained(model, chat, tmp_path / "out", {"step": 3, "base_sha256": weights_hash(str(wide_folder)), "method": method})
    torch.testing.assert_close(logits(load_trained(recipe, tmp_path / "out")), logits(model), rtol=0, atol=0)
    with pytest.raises(ModelError, match="other base weights"):
        load_adapter(model, tmp_path / "out", "another")
