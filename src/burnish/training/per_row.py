"""Numbers of single rows under one model: their losses, and how their gradients lie to those of other rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from burnish.models import decoder_layers, trainable_parameters
from burnish.training.loss import summed_loss, token_losses
from burnish.training.pack import flatten
from burnish.training.trial import Trained
from burnish.types import Tell, Tokens, silent

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Of each row asked for, in order: Σ loss in nats, and the units (target tokens, or pairs) that it is a sum over."""

    sums: Floats  # (n,)
    counts: Floats  # (n,)

    @property
    def means(self) -> Floats:
        return self.sums / self.counts


def row_losses(trained: Trained, items: Sequence[Sequence[Any]], *, tell: Tell = silent) -> RowLosses:
    """Losses of rows, without gradients. `items`: of each row what it was made into (`train_items`, `validation_items`)."""
    flat = [(item, row) for row, parts in enumerate(items) for item in parts]
    objective = trained.objective
    counts, sums = np.zeros(len(items)), np.zeros(len(items))
    for item, row in flat:
        counts[row] += objective.count([item])
    at_once = trained.at_once if objective.tokens_only else 1  # a pair's loss is not a sum over its tokens: one at a time
    order = sorted(range(len(flat)), key=lambda index: objective.length(flat[index][0]))  # like lengths together
    for start in range(0, len(order), at_once):
        chosen = [flat[index] for index in order[start : start + at_once]]
        for (_, row), loss in zip(chosen, _losses(trained, [item for item, _ in chosen]), strict=True):
            sums[row] += loss
        tell("loss of each row", min(start + at_once, len(order)), len(order), "")
    return RowLosses(sums, counts)


def _losses(trained: Trained, items: Sequence[Any]) -> list[float]:
    """Σ loss of each item of one micro-batch."""
    objective = trained.objective
    if not objective.tokens_only:
        return [objective.summed(trained.model, [item]) for item in items]
    batch = flatten(items, objective.paths).to(trained.model.device)
    with torch.inference_mode():
        losses = token_losses(trained.model, batch).double()  # (N,)
    return torch.zeros(len(items), dtype=torch.float64, device=losses.device).index_add_(0, batch.owners, losses).tolist()


def train_items(trained: Trained, rows: Sequence[int]) -> list[list[Any]]:
    """What each of these training rows was made into."""
    places: dict[int, list[int]] = {}
    for index, row in enumerate(trained.items.rows[0]):
        places.setdefault(int(row), []).append(index)
    return [[trained.items.train[index] for index in places[row]] for row in rows]


def validation_items(trained: Trained) -> list[list[Any]]:
    """What each validation row was made into; rows of preferences and plain answers are one item each, but a template may make several."""
    made = trained.items.validation_rows
    parts: list[list[Any]] = [[] for _ in trained.items.dataset.validation]
    for index, row in enumerate(made):
        parts[int(row)].append(trained.items.validation[index])
    return parts


# ------------------------------------------------------------------------------------------------------------ gradients


def gradient_cosines(
    trained: Trained, rows: Sequence[Sequence[Tokens]], guides: Sequence[Sequence[Tokens]], *, tell: Tell = silent
) -> tuple[Floats, Floats]:
    """(n,) mean cosine between each row's gradient and those of the guide rows, (n,) norm of the row's gradient.

    The gradient is that of the row's mean loss in the trained weights: a step along it lowers the guide rows' loss where the cosine is above 0
    (TracIn, arXiv 2002.08484, with the lengths of the gradients taken out as in LESS, arXiv 2402.04333: short rows have long ones). The mean over the guides is
    exact: Σ gⱼ ÷ ‖gⱼ‖ is one vector. Call it on a model that was not trained on `rows`: what is learnt already has no gradient left.
    """
    parameters = list(_followed(trained.model).values())
    direction: Tensor | None = None
    for number, gradient in enumerate(_gradients(trained, guides, parameters), 1):
        unit = gradient / gradient.norm().clamp_min(torch.finfo(torch.float32).tiny)
        direction = unit if direction is None else direction.add_(unit)
        tell("gradients of validation rows", number, len(guides), "")
    if direction is None:
        raise ValueError("no guide rows: a direction needs at least one")
    direction /= len(guides)
    cosines, norms = np.zeros(len(rows)), np.zeros(len(rows))
    for number, gradient in enumerate(_gradients(trained, rows, parameters)):
        norm = float(gradient.norm())
        norms[number] = norm
        cosines[number] = float(gradient @ direction) / norm if norm > 0 else 0.0
        tell("gradients of rows", number + 1, len(rows), "")
    return cosines, norms


def _followed(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights; where whole layers are trained, those of the last one that is."""
    named = trainable_parameters(model)
    if hasattr(model, "get_base_model"):
        return named
    prefix, count = decoder_layers(model)
    for layer in reversed(range(count)):
        if last := {name: parameter for name, parameter in named.items() if name.startswith(f"{prefix}.{layer}.")}:
            return last
    return named


def _gradients(trained: Trained, rows: Sequence[Sequence[Tokens]], parameters: Sequence[torch.nn.Parameter]) -> Iterator[Tensor]:
    """(P,) float32 gradient of each row's mean loss per target token, one after another."""
    model = trained.model
    for parts in rows:
        loss = summed_loss(model, flatten(parts, trained.objective.paths).to(model.device))
        found = torch.autograd.grad(loss / sum(part.target_tokens for part in parts), parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        yield torch.cat([torch.zeros(p.numel(), device=p.device) if g is None else g.float().reshape(-1) for g, p in pairs])
