"""Frozen lower layers: their kept output gives the same training, and they are computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.models import METHODS, attend_by_segment, trainable_parameters
from burnish.recipe import build_recipe
from burnish.training.frozen import FrozenCache, first_trained_layer, make_cache
from burnish.training.loss import summed_loss
from burnish.training.pack import Paths, flatten
from burnish.types import Tokens
from conftest import build_tiny


def recipe_for(layers: Any, method: str = "lora", **engine: Any) -> Any:
    return build_recipe({"model": "m", "data": "d", "training": {"method": method, "layers": layers}, "engine": engine})


def rows() -> list[Tokens]:
    """Four sequences, three of which begin alike; each knows the number of its first token."""
    trunk, made, number = list(range(1, 31)), [], 0
    for n in (5, 9, 14):
        ids = trunk + [100 + n + i for i in range(n)]
        made.append(Tokens(ids, [-100] * 25 + ids[25:], number))
        number += len(ids)
    return [*made, Tokens([1, 7, 9, 8], [-100, 7, 9, 8], number)]


def prepared(family: str, tokenizer: Any, layers: Any, method: str = "lora") -> Any:
    model = METHODS[method](build_tiny(family, tokenizer).requires_grad_(False), recipe_for(layers, method))
    assert attend_by_segment(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.train()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_same_loss_and_gradients_and_no_work_twice(family: str, method: str, tokenizer: Any, tmp_path: Path) -> None:
    plain, cached = prepared(family, tokenizer, "last-1", method), prepared(family, tokenizer, "last-1", method)
    assert first_trained_layer(cached) == 2
    cache = FrozenCache(cached, 2, tmp_path / "frozen", sum(len(t.input_ids) for t in rows()))
    inner = cached.get_base_model() if method == "lora" else cached
    calls = []
    inner.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    paths = Paths(by_segment=True, share=True)
    for together in ([0, 1, 2, 3], [3, 1], [2, 0], [1]):
        some = [rows()[index] for index in together]
        results = []
        for model, way in ((plain, paths), (cached, Paths(by_segment=True, share=True, cache=cache))):
            loss = summed_loss(model, flatten(some, way))
            loss.backward()
            results.append((float(loss.detach()), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}))
            model.zero_grad()
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1, "only the first pass went through the frozen layers: a shared beginning is known for all that share it"
    cache.close()
    assert not (tmp_path / "frozen").exists()


def test_what_was_known_is_known_to_the_next_process(tokenizer: Any, tmp_path: Path) -> None:
    model, total = prepared("llama", tokenizer, "last-1"), sum(len(t.input_ids) for t in rows())
    cache = FrozenCache(model, 2, tmp_path / "f", total, "key")
    way = Paths(by_segment=True, cache=cache)
    first = float(summed_loss(model, flatten(rows()[:2], way)).detach())
    again = prepared("llama", tokenizer, "last-1")
    cache = FrozenCache(again, 2, tmp_path / "f", total, "key")
    assert cache.hidden_rows(flatten(rows()[:2], Paths(by_segment=True, cache=cache))) is not None
    assert float(summed_loss(again, flatten(rows()[:2], Paths(by_segment=True, cache=cache))).detach()) == first, "bit for bit"
    other = FrozenCache(prepared("llama", tokenizer, "last-1"), 2, tmp_path / "f", total, "other key")
    assert not other.known.any()


def test_when_it_is_worth_it(tokenizer: Any, tmp_path: Path) -> None:
    def made(layers: Any, passes: float, **engine: Any) -> Any:
        model = prepared("llama", tokenizer, layers)
        return make_cache(model, [10, 20], recipe_for(layers, **engine), tmp_path / "f", passes=passes)

    assert made("all", 3) is None
    assert made("last-1", 1) is None
    assert made("last-1", 2) is None  # half of the work in half of the time
    assert made("last-1", 10) is not None
    assert made("last-1", 10, frozen_cache=False) is None
    assert made("last-2", 3, frozen_cache=True) is not None
    assert made([0, 2], 10, frozen_cache=True) is None  # the lowest layer is trained
