"""8-bit products of the frozen base: against the product itself, and a loss that stays within 1 %."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.errors import RecipeError
from burnish.models import METHODS, int8
from burnish.models.int8 import Int8Weight, weight_limit
from burnish.recipe import build_recipe
from burnish.training.engine import make_ready
from burnish.training.loss import summed_loss
from burnish.training.pack import flatten
from burnish.types import Tokens
from conftest import build_tiny

pytestmark = pytest.mark.skipif(not weight_limit(), reason="torch or this machine has no 8-bit products")


def test_the_integers_are_exact_and_the_product_is_near() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    limit = weight_limit()
    whole = torch.round(weight * limit / weight.abs().amax(1, keepdim=True))
    rows = torch.randint(0, 256, (40, 64)).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(whole.to(torch.int8).contiguous(), None)
    found = int8._whole(rows, (packed, torch.ones(96), torch.zeros(96, dtype=torch.int32)))
    assert torch.equal(found, (rows.float() - 128) @ whole.T), "counted in whole numbers, nothing runs over"
    x, above = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None], torch.randn(40, 96)
    eight = Int8Weight(weight)
    for found, exact in ((eight.times(x), x @ weight.T), (eight.back(above), above @ weight)):
        each = (found - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(each.max()) < 0.03, "each token has its own scale"


def test_layers_with_outliers_stay_and_the_loss_within_one_per_cent(tokenizer: Any) -> None:
    told: list[str] = []
    rows = [Tokens(list(range(5, 5 + n)), [-100, *range(6, 5 + n)]) for n in (30, 40, 50)]
    losses = []
    for products in ("native", "int8"):
        recipe = build_recipe({"model": "m", "data": "d", "engine": {"base_products": products}})
        base = build_tiny("llama", tokenizer)
        # One input of this layer gets a weight a thousand times larger, and its activations with it: rounding loses all the others.
        with torch.no_grad():
            base.model.layers[1].mlp.up_proj.weight[3] *= 1000
            base.model.layers[1].mlp.down_proj.weight[:, 3] *= 0.001
        model = METHODS["lora"](base.requires_grad_(False), recipe)
        paths = make_ready(model, rows, recipe, steps=1, tell=lambda *words: told.append(str(words[3])))
        losses.append(float(summed_loss(model, flatten(rows, paths)).detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]
    assert getattr(model.get_base_model().model.layers[1].mlp.down_proj.base_layer, "int8", None) is None
    count = int(told[0].split()[1])
    assert 0 < count < 21


def test_it_needs_fused_layers(tokenizer: Any) -> None:
    recipe = build_recipe({"model": "m", "data": "d", "engine": {"base_products": "int8", "fused_layers": False}})
    with pytest.raises(RecipeError, match="fused_layers"):
        make_ready(build_tiny("llama", tokenizer), [Tokens([1, 5, 6], [-100, 5, 6])], recipe, steps=1)
