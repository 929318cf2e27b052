"""The range test of the learning rate: it changes nothing, repeats exactly, stays cheap, and its choice follows its rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.data.formats import make_example
from burnish.models import LEARNING_RATES, METHODS, Chat, trainable_parameters
from burnish.recipe import Recipe, build_recipe
from burnish.training import tokenize_all
from burnish.training.loop import Hooks, planned_steps, run_loop
from burnish.training.objective import Supervised
from burnish.training.rate import COST_FRACTION, FURTHEST, MOST_STEPS, choose, find_rate, plan
from burnish.types import Tokens
from conftest import build_tiny, colour_rows


def recipe(**training: Any) -> Recipe:
    settings = {"micro_batch_size": 4, "epochs": 20, **training}
    return build_recipe({"model": "tiny", "data": "x.jsonl", "training": settings, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}})


@pytest.fixture(scope="module")
def items(chat: Chat) -> list[Tokens]:
    rows = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in colour_rows(120)]
    return tokenize_all(chat, [make_example(row, source="x") for row in rows])


def adapted(tokenizer: Any, settings: Recipe) -> Any:
    return METHODS["lora"](build_tiny("llama", tokenizer).requires_grad_(False), settings)


def test_it_changes_nothing_and_repeats_exactly(tokenizer: Any, items: list[Tokens]) -> None:
    settings = recipe()
    model = adapted(tokenizer, settings)
    model.eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(11)
    drawn = torch.rand(3)
    torch.manual_seed(11)
    first = find_rate(model, items, objective=Supervised(), settings=settings.training, seed=5)
    assert torch.equal(torch.rand(3), drawn), "the random numbers go on as if there had been no test"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert not model.training
    torch.manual_seed(99)
    again = find_rate(model, items, objective=Supervised(), settings=settings.training, seed=5)
    assert again == first
    other = find_rate(model, items, objective=Supervised(), settings=settings.training, seed=6)
    assert other.points != first.points
    losses = [point["change"] for point in first.points]
    assert min(losses) < -0.3, "the tiny model learns somewhere in the range"
    assert first.points[0]["loss"] == pytest.approx(first.points[0]["before"], rel=1e-5), "the first loss is that of the untouched weights"


def test_training_after_the_test_equals_training_without_it(tokenizer: Any, items: list[Tokens]) -> None:
    settings = recipe(max_steps=3, learning_rate=1e-2)
    losses = []
    for tested in (False, True):
        model = adapted(tokenizer, settings)
        if tested:
            find_rate(model, items, objective=Supervised(), settings=recipe().training, seed=0)
        rows: list[dict[str, Any]] = []
        run_loop(model, items, items[:8], settings=settings.training, seed=0, hooks=Hooks(log=rows.append, keep_best=lambda *_: None))
        weights = [parameter.detach().clone() for parameter in trainable_parameters(model).values()]
        losses.append(([row.get("loss") for row in rows], weights))
    assert losses[0][0] == losses[1][0]
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


@pytest.mark.parametrize("rows", [50, 320, 1000, 20_000])
@pytest.mark.parametrize(("micro", "accumulation", "epochs"), [(8, 1, 1), (16, 2, 3), (1, 8, 2), (4, 1, 0.5)])
def test_it_is_cheap(rows: int, micro: int, accumulation: int, epochs: float) -> None:
    """Never more than the stated share of the examples, 40 steps, or the rows there are; a short run has no test."""
    settings = recipe(micro_batch_size=micro, gradient_accumulation_steps=accumulation, epochs=epochs).training
    steps, at_once = plan(rows, settings)
    examples = planned_steps(rows, settings) * micro * accumulation
    assert steps * at_once <= min(COST_FRACTION * examples, rows)
    assert steps <= MOST_STEPS
    assert (steps == 0) == (min(int(COST_FRACTION * examples), rows) < 32)
    if steps:
        assert 1 <= at_once <= micro


def test_a_short_run_takes_the_usual_rate_and_says_so(tokenizer: Any, items: list[Tokens]) -> None:
    settings = recipe(max_steps=10)
    found = find_rate(adapted(tokenizer, settings), items, objective=Supervised(), settings=settings.training, seed=0)
    assert found.learning_rate == LEARNING_RATES["lora"]
    assert "too short" in found.reason
    assert found.points == []


def point(rate: float, change: float) -> dict[str, float]:
    return {"rate": rate, "loss": 3 + change, "before": 3.0, "change": change}


def test_the_rule() -> None:
    """The curve is read by hand: lowest at 3e-3."""
    curve = [point(1e-4, -0.2), point(1e-3, -1.0), point(3e-3, -1.5), point(1e-2, -0.3)]
    rate, reason = choose(curve, 1e-3)
    assert rate == pytest.approx(1e-3)
    assert "3.0e-03" in reason
    assert choose([point(1e-4, 0.0), point(1e-3, 0.2)], 1e-3)[0] == 1e-3
    low, reason = choose([point(1e-5, -1.0), point(1e-4, 0.5)], 1e-3)
    assert low == pytest.approx(1e-3 / FURTHEST)
    assert "held within" in reason
