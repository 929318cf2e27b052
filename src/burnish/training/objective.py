"""What a step lowers. The loop knows only this form: count what is counted, take a micro-batch backward, measure without gradients.

OBJECTIVES is the table. To add one: write a class of the form `Objective` and add a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from burnish.training.loss import summed_loss
from burnish.training.pack import flatten
from burnish.types import Tokens


class Objective(Protocol):
    """Items are what one row becomes: Tokens, or a pair of them."""

    unit: str  # what a loss is divided by: "target token", "pair"

    def length(self, item: Any) -> int:
        """Tokens that the item costs."""

    def count(self, items: Sequence[Any]) -> int:
        """How many units the items hold: the denominator of their mean loss."""

    def backward(self, model: Any, items: Sequence[Any], denominator: int) -> float:
        """Add the gradient of Σ loss ÷ denominator of one micro-batch; return Σ loss ÷ denominator."""

    def summed(self, model: Any, items: Sequence[Any]) -> float:
        """Σ loss without gradients."""


class Supervised:
    """Cross-entropy of the target tokens, nats."""

    unit = "target token"

    def length(self, item: Tokens) -> int:
        return len(item.input_ids)

    def count(self, items: Sequence[Tokens]) -> int:
        return sum(item.target_tokens for item in items)

    def backward(self, model: Any, items: Sequence[Tokens], denominator: int) -> float:
        loss = summed_loss(model, flatten(items).to(model.device)) / denominator
        loss.backward()
        return float(loss.detach())

    def summed(self, model: Any, items: Sequence[Tokens]) -> float:
        with torch.inference_mode():
            return float(summed_loss(model, flatten(items).to(model.device)))
