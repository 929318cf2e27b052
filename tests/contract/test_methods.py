"""Every entry of METHODS: trains something, a fresh model equals the base, frozen weights stay, its default rate is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.errors import ModelError
from burnish.models import LEARNING_RATES, METHODS, trainable_parameters
from burnish.recipe import build_recipe
from conftest import build_tiny


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str, tokenizer: Any) -> None:
    recipe = build_recipe({"model": "m", "data": "d", "training": {"method": name}})
    base = build_tiny("llama", tokenizer)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        before = base(ids).logits.clone()
    model = METHODS[name](base.requires_grad_(False), recipe)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before)
    parameters = trainable_parameters(model)
    assert parameters
    assert LEARNING_RATES[name] > 0
    model(ids).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_unknown_modules_are_named(tokenizer: Any) -> None:
    recipe = build_recipe({"model": "m", "data": "d", "lora": {"target_modules": ["no_such_proj"]}})
    with pytest.raises(ModelError, match="no_such_proj"):
        METHODS["lora"](build_tiny("llama", tokenizer), recipe)
