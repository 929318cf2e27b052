"""What a step lowers. The loop knows only this form: count what is counted, take a micro-batch backward, measure without gradients.

OBJECTIVES is the table. To add one: write a class of the form `Objective` and add a line; tests/contract/test_objectives.py then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from burnish.models import Chat
from burnish.recipe import Recipe
from burnish.training.divergence import held_losses
from burnish.training.loss import summed_loss
from burnish.training.pack import Paths, flatten
from burnish.training.preference import Preference
from burnish.types import Example, Tokens


class Objective(Protocol):
    """Items are what one row becomes: Tokens, or a pair of them."""

    unit: str  # what a loss is divided by: "target token", "pair"
    paths: Paths  # how its sequences are computed
    tokens_only: bool  # items are Tokens, nothing beside them

    def items(self, chat: Chat, example: Example) -> list[Any]:
        """What a row is trained as."""

    def sequences(self, item: Any) -> list[Tokens]:
        """What is computed for an item, in the order in which it is packed."""

    def length(self, item: Any) -> int:
        """Tokens that the item costs."""

    def count(self, items: Sequence[Any]) -> int:
        """How many units the items hold: the denominator of their mean loss."""

    def backward(self, model: Any, items: Sequence[Any], denominator: int) -> float:
        """Add the gradient of Σ loss ÷ denominator of one micro-batch; return Σ loss ÷ denominator."""

    def summed(self, model: Any, items: Sequence[Any]) -> float:
        """Σ loss without gradients."""

    def figures(self) -> dict[str, float]:
        """What else was seen since the last call, summed like the loss: divide by the same count, and log it."""


class Supervised:
    """Cross-entropy of the target tokens, nats."""

    unit = "target token"
    paths = Paths()
    tokens_only = True

    def items(self, chat: Chat, example: Example) -> list[Tokens]:
        return chat.training_tokens(example)

    def sequences(self, item: Tokens) -> list[Tokens]:
        return [item]

    def length(self, item: Tokens) -> int:
        return len(item.input_ids)

    def count(self, items: Sequence[Tokens]) -> int:
        return sum(item.target_tokens for item in items)

    def backward(self, model: Any, items: Sequence[Tokens], denominator: int) -> float:
        loss = summed_loss(model, flatten(items, self.paths).to(model.device)) / denominator
        loss.backward()
        return float(loss.detach())

    def summed(self, model: Any, items: Sequence[Tokens]) -> float:
        with torch.inference_mode():
            return float(summed_loss(model, flatten(items, self.paths).to(model.device)))

    def figures(self) -> dict[str, float]:
        return {}


class PlainText(Supervised):
    """Cross-entropy of every token of a document but the first (continued pre-training); replayed rows keep their answers as targets."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def items(self, chat: Chat, example: Example) -> list[Tokens]:
        return (
            chat.text_tokens(example.reference, self.max_length)
            if example.metadata.get("kind") == "text"
            else chat.training_tokens(example)
        )


class KeepClose:
    """Another objective of tokens, held near the base model: its gradient gets kl_weight · KL(base ‖ tuned) on the target rows.

    The loss that is returned, and what validation measures, stays the cross-entropy alone, so that it compares with runs of another weight;
    the KL is in `figures`.
    """

    def __init__(self, inner: Objective, kl_weight: float) -> None:
        self.inner, self.kl_weight = inner, kl_weight
        self.unit, self.tokens_only = inner.unit, inner.tokens_only
        self.items, self.sequences, self.length = inner.items, inner.sequences, inner.length
        self.count, self.summed = inner.count, inner.summed
        self._kl: float | None = None

    @property
    def paths(self) -> Paths:
        return self.inner.paths

    @paths.setter
    def paths(self, paths: Paths) -> None:
        self.inner.paths = paths  # it measures with them, too

    def backward(self, model: Any, items: Sequence[Any], denominator: int) -> float:
        batch = flatten([tokens for item in items for tokens in self.sequences(item)], self.paths).to(model.device)
        lowered, cross, divergence = held_losses(model, batch, self.kl_weight)
        (lowered.double().sum().float() / denominator).backward()
        self._kl = (self._kl or 0.0) + float(divergence.double().sum())
        return float(cross.double().sum().float() / denominator)

    def figures(self) -> dict[str, float]:
        kl, self._kl = self._kl, None
        return self.inner.figures() | ({} if kl is None else {"kl": kl})


OBJECTIVES: dict[str, Callable[[Recipe], Objective]] = {
    "supervised": lambda recipe: Supervised(),
    "text": lambda recipe: PlainText(recipe.data.max_length),
    "preference": lambda recipe: Preference(recipe.training.preference_beta),
}


def make_objective(recipe: Recipe, paths: Paths | None = None) -> Objective:
    """What `training.objective` names, held near the base model where `training.kl_weight` says so."""
    settings = recipe.training
    objective = OBJECTIVES[settings.objective](recipe)
    objective.paths = paths or Paths()
    return KeepClose(objective, settings.kl_weight) if settings.kl_weight else objective
