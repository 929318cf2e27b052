"""Every entry of OBJECTIVES: what it tells, what it counts and what it adds to the gradient hang together; how a step is cut does not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.data.formats import make_example
from burnish.models import Chat, trainable_parameters
from burnish.recipe import build_recipe
from burnish.training.objective import OBJECTIVES, KeepClose, Objective, make_objective
from burnish.training.pack import Paths
from burnish.training.preference import Preference, with_reference
from burnish.types import Example
from conftest import COLOURS, THINGS, with_adapter

KINDS = [*OBJECTIVES, "kept close"]


def rows() -> list[Example]:
    return [
        make_example(
            [{"role": "user", "content": f"a {c} {t}"}, {"role": "assistant", "content": f"{t} {c}" + f" {t}" * (i % 3)}],
            source=f"f:{i}",
            rejected=f"{c} {c} {t}",
        )
        for i, (c, t) in enumerate(zip(COLOURS, THINGS, strict=False))
    ]


@pytest.fixture(params=KINDS)
def made(request: Any, tokenizer: Any, chat: Chat, tmp_path: Path) -> tuple[Objective, Any, list[Any]]:
    settings = {"objective": "supervised", "kl_weight": 0.5} if request.param == "kept close" else {"objective": request.param}
    recipe = build_recipe({"model": "m", "data": "d", "training": settings, "lora": {"rank": 4, "alpha": 8}})
    objective = make_objective(recipe)
    items = [item for example in rows() for item in objective.items(chat, example)]
    if isinstance(objective, Preference):
        items = with_reference(with_adapter("llama", tokenizer, started=False), items, cache=tmp_path / "r", state="", at_once=2)
    return objective, with_adapter("llama", tokenizer), items


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    return found


def test_it_is_chosen_by_the_recipe(made: tuple[Objective, Any, list[Any]], request: Any) -> None:
    assert isinstance(made[0], KeepClose) == ("kept close" in request.node.name)
    assert made[0].unit in ("target token", "pair")
    paths = Paths(blocked=False)
    made[0].paths = paths
    assert made[0].paths == paths
    assert "kept close" not in request.node.name or made[0].inner.paths == paths, "what measures takes the same paths"


def test_lengths_and_counts_are_those_of_the_sequences(made: tuple[Objective, Any, list[Any]]) -> None:
    objective, _, items = made
    assert len(items) >= len(rows())
    for item in items:
        assert objective.length(item) == sum(len(tokens.input_ids) for tokens in objective.sequences(item))
    counts = [objective.count([item]) for item in items]
    assert objective.count(items) == sum(counts)
    assert min(counts) > 0


def test_the_loss_told_is_the_mean_of_the_sum(made: tuple[Objective, Any, list[Any]]) -> None:
    objective, model, items = made
    units = objective.count(items)
    assert objective.backward(model, items, units) == pytest.approx(objective.summed(model, items) / units, rel=1e-5)
    assert sum(objective.summed(model, [item]) for item in items) == pytest.approx(objective.summed(model, items), rel=1e-5)


def test_how_a_step_is_cut_does_not_matter(made: tuple[Objective, Any, list[Any]]) -> None:
    objective, model, items = made
    units = objective.count(items)
    whole = objective.backward(model, items, units)
    figures, gradient = objective.figures(), gradients(model)
    parts = sum(objective.backward(model, part, units) for part in (items[:1], items[1:4], items[4:]))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert objective.figures() == pytest.approx(figures, rel=1e-4, abs=1e-5)
    for name, other in gradients(model).items():  # added up, not replaced
        torch.testing.assert_close(other, gradient[name], rtol=1e-4, atol=1e-6)
    assert any(g.abs().sum() > 0 for g in gradient.values())


def test_measuring_leaves_no_gradient(made: tuple[Objective, Any, list[Any]]) -> None:
    objective, model, items = made
    objective.summed(model, items)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_gradient_is_the_slope_of_the_loss(made: tuple[Objective, Any, list[Any]]) -> None:
    """A step of 10⁻³ along one direction, both ways. (What is kept close has its KL in the gradient and not in the sum: see test_divergence.)"""
    objective, model, items = made
    if isinstance(objective, KeepClose):
        objective = objective.inner
    units = objective.count(items)
    objective.backward(model, items, units)
    gradient = gradients(model)
    torch.manual_seed(0)
    direction = {name: torch.randn_like(g) / g.numel() ** 0.5 for name, g in gradient.items()}
    expected = sum(float((direction[name] * g).sum()) for name, g in gradient.items())
    values = []
    for sign in (1, -2):  # to +h, then to −h
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
                parameter.add_(direction[name], alpha=sign * 1e-3)
        values.append(objective.summed(model, items) / units)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=2e-2, abs=2e-4)
