"""Losses and gradients of single rows against the naive computation: each row alone, full logits, torch's own cross-entropy, autograd by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from burnish.data import make_example
from burnish.models import METHODS, trainable_parameters
from burnish.recipe import build_recipe
from burnish.training import ShortTrainings, Trained, gradient_cosines, row_losses, train_items, validation_items
from burnish.training.items import make_items, only_rows
from burnish.training.objective import Supervised
from burnish.training.pack import Paths
from burnish.types import Dataset, Example
from conftest import build_tiny, with_adapter


def examples(n: int) -> list[Example]:
    made = []
    for index in range(n):
        turns = [
            {"role": "user", "content": f"a red cat {index}" + " and a dog" * (index % 3)},
            {"role": "assistant", "content": "cat red" * (1 + index % 2)},
        ]
        if index % 4 == 3:  # two trained answers in one row
            turns += [{"role": "user", "content": "again"}, {"role": "assistant", "content": "dog"}]
        made.append(make_example(turns, source=f"rows:{index}"))
    return made


def trained_on(model: Any, chat: Any, rows: list[Example], guides: list[Example], *, at_once: int = 3, paths: Paths = Paths()) -> Trained:
    objective = Supervised()
    objective.paths = paths
    items = make_items(objective, chat, Dataset(tuple(rows), tuple(guides), (), {}))
    return Trained(model.eval(), build_recipe({"model": "m", "data": "d.jsonl"}), objective, items, at_once, None)


def naive_losses(model: Any, chat: Any, example: Example) -> torch.Tensor:
    """(N,) −log p of every target token of a row, its sequences one after another."""
    parts = []
    for tokens in chat.training_tokens(example):
        ids = torch.tensor([tokens.input_ids])
        logits = model(input_ids=ids).logits[0, :-1].float()
        labels = torch.tensor(tokens.labels[1:])
        parts.append(F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none"))
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("blocked", [True, False])
def test_row_losses_are_those_of_each_row_alone(family: str, blocked: bool, tokenizer: Any, chat: Any) -> None:
    rows = examples(11)
    model = with_adapter(family, tokenizer)
    trained = trained_on(model, chat, rows, rows[:2], paths=Paths(blocked=blocked))
    found = row_losses(trained, train_items(trained, range(11)))
    with torch.no_grad():
        naive = [naive_losses(model, chat, row) for row in rows]
    assert found.sums == pytest.approx([float(one.sum()) for one in naive], rel=1e-4)
    assert found.counts.tolist() == [len(one) for one in naive]
    assert found.means == pytest.approx([float(one.mean()) for one in naive], rel=1e-4)
    backwards = row_losses(trained, train_items(trained, [7, 2]))
    assert backwards.sums == pytest.approx(found.sums[[7, 2]], rel=1e-5)
    assert row_losses(trained, validation_items(trained)).sums == pytest.approx(found.sums[:2], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradient_cosines_are_those_by_hand(family: str, tokenizer: Any, chat: Any) -> None:
    rows, guides = examples(5), examples(9)[6:]
    model = with_adapter(family, tokenizer)
    trained = trained_on(model, chat, rows, guides)
    cosines, norms = gradient_cosines(trained, train_items(trained, range(5)), validation_items(trained))
    parameters = list(trainable_parameters(model).values())

    def by_hand(example: Example) -> np.ndarray[Any, Any]:
        for parameter in parameters:
            parameter.grad = None
        naive_losses(model, chat, example).mean().backward()
        return np.concatenate([parameter.grad.numpy().ravel() for parameter in parameters]).astype(np.float64)

    units = [gradient / np.linalg.norm(gradient) for gradient in map(by_hand, guides)]
    for place, row in enumerate(rows):
        gradient = by_hand(row)
        assert norms[place] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
        assert cosines[place] == pytest.approx(np.mean([gradient @ unit for unit in units]) / np.linalg.norm(gradient), abs=2e-4)
    assert all(parameter.grad is not None for parameter in parameters)  # only those by hand: the function itself leaves none
    for parameter in parameters:
        parameter.grad = None
    gradient_cosines(trained, train_items(trained, [0]), validation_items(trained))
    assert all(parameter.grad is None for parameter in parameters)
    with pytest.raises(ValueError, match="no guide rows"):
        gradient_cosines(trained, train_items(trained, [0]), [])


def test_a_step_along_a_row_changes_a_guide_as_its_cosine_says(tokenizer: Any, chat: Any) -> None:
    """Finite differences: loss(guide) after a small step on a row falls by rate · gᵣ · g_g, in sign and in size."""
    rows, guides = examples(6), examples(1)
    model = with_adapter("llama", tokenizer)
    trained = trained_on(model, chat, rows, guides)
    cosines, norms = gradient_cosines(trained, train_items(trained, range(6)), validation_items(trained))
    _, guide_norm = gradient_cosines(trained, validation_items(trained), validation_items(trained))
    parameters, rate = list(trainable_parameters(model).values()), 1e-4
    before = float(row_losses(trained, validation_items(trained)).means[0])
    for place in range(1, 6):
        gradients = torch.autograd.grad(naive_losses(model, chat, rows[place]).mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
        fell = before - float(row_losses(trained, validation_items(trained)).means[0])
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += rate * gradient
        assert fell / rate == pytest.approx(cosines[place] * norms[place] * guide_norm[0], rel=0.1, abs=0.05)


def test_whole_weights_are_followed_in_their_last_layer(tokenizer: Any, chat: Any) -> None:
    model = METHODS["full"](build_tiny("llama", tokenizer), build_recipe({"model": "m", "data": "d.jsonl", "training": {"method": "full"}}))
    trained = trained_on(model, chat, examples(3), examples(5)[3:])
    _, norms = gradient_cosines(trained, train_items(trained, [0]), validation_items(trained))
    last = {name: parameter for name, parameter in model.named_parameters() if ".layers.2." in name}
    gradients = torch.autograd.grad(naive_losses(model, chat, examples(1)[0]).mean(), list(last.values()))
    assert norms[0] == pytest.approx(float(torch.cat([gradient.ravel() for gradient in gradients]).norm()), rel=1e-3)


def test_items_of_some_rows(chat: Any) -> None:
    rows = examples(8)
    items = make_items(Supervised(), chat, Dataset(tuple(rows), (), (), {}))
    some = only_rows(items, [5, 0, 3])
    assert sorted({int(row) for row in some.rows[0]}) == [0, 3, 5]
    assert [tokens.input_ids for tokens in some.train] == [t.input_ids for place in (0, 3, 5) for t in chat.training_tokens(rows[place])]
    assert some.source(0) == "rows:0"
    assert some.source(len(some.train) - 1) == "rows:5"


def test_test_rows_are_refused(chat: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test rows"):
        ShortTrainings(Dataset((), (), tuple(examples(1)), {}), chat, folder=tmp_path, reference=tmp_path)
