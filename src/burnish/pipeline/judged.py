"""What a short training is judged by: the task's metric or the loss on validation rows, row by row, so that rows can be drawn again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish import advice, evaluation, training
from burnish.errors import DataError
from burnish.models import Chat
from burnish.recipe import Recipe
from burnish.tasks import Metric, counts, find_metric, score_rows, texts
from burnish.training import Trained
from burnish.types import Dataset, Tell, silent

DRAWS, CORPUS_DRAWS = 1000, 200  # of validation rows; a corpus metric is computed anew for each training and draw
LOSS, SCORE = "validation_loss", "validation_score"
OBJECTIVES = ("auto", SCORE, LOSS)  # or the name of a metric


@dataclass(frozen=True, slots=True)
class Judge:
    dataset: Dataset  # its validation rows judge
    chat: Chat
    metric: Metric | None  # None: the loss
    tell: Tell = silent

    @property
    def lower_is_better(self) -> bool:
        return self.metric is None

    @property
    def title(self) -> str:
        return "validation loss, nats per token" if self.metric is None else f"{self.metric.title}, validation rows"

    def measure(self, trained: Trained) -> dict[str, Any]:
        """`value`, and of each validation row what it is made of: Σ sums ÷ Σ counts, or for a corpus metric the answers."""
        if self.metric is None:
            return self._loss(trained)
        dataset, metric = self.dataset, self.metric
        made = evaluation.validation_answers(trained.model, dataset, trained.recipe, self.chat, metric, self.tell)
        references = self._references
        scores = score_rows(metric, made, references)
        if not any(map(counts, scores)):
            raise DataError(
                f"{metric.name} can score none of the {len(references)} validation rows (the first: {scores[0].reason}); choose another --objective"
            )
        if metric.corpus is not None:
            return {"value": metric.corpus(*texts(scores, made, references)), "answers": made}
        sums = [score.value or 0.0 for score in scores]
        kept = [float(counts(score)) for score in scores]
        return {"value": math.fsum(sums) / sum(kept), "sums": sums, "counts": kept}

    def _loss(self, trained: Trained) -> dict[str, Any]:
        rows = self.dataset.validation
        same = trained.items.dataset.validation is rows
        items = training.validation_items(trained) if same else [trained.objective.items(self.chat, row) for row in rows]
        found = training.row_losses(trained, items, tell=self.tell)
        value = float(found.sums.sum() / found.counts.sum())
        return {"value": value, "sums": [round(one, 6) for one in found.sums], "counts": found.counts.tolist()}

    def draw(self, measured: Sequence[Mapping[str, Any]], *, seed: int) -> NDArray[np.float64]:
        """(draws, trainings) values of what `measure` returned, on validation rows drawn with replacement: the same rows for all of a draw."""
        corpus = None if self.metric is None else self.metric.corpus
        groups = [row.group for row in self.dataset.validation]
        weights = advice.row_draws(groups, draws=DRAWS if corpus is None else CORPUS_DRAWS, seed=seed)
        if corpus is None:
            sums, divisors = (np.array([one[key] for one in measured], dtype=np.float64) for key in ("sums", "counts"))
            totals = weights @ divisors.T
            values = np.array([one["value"] for one in measured], dtype=np.float64)
            return np.where(totals > 0, weights @ sums.T / np.maximum(totals, 1e-12), values)
        assert self.metric is not None
        drawn = np.empty((len(weights), len(measured)))
        for column, one in enumerate(measured):
            scores = score_rows(self.metric, one["answers"], self._references)
            for number, weight in enumerate(weights):
                chosen = np.repeat(np.arange(len(scores)), weight.astype(int)).tolist()
                part = texts([scores[i] for i in chosen], [one["answers"][i] for i in chosen], [self._references[i] for i in chosen])
                drawn[number, column] = corpus(*part) if part[1] else one["value"]
        return drawn

    @property
    def _references(self) -> list[str]:
        return [row.reference for row in self.dataset.validation]


def metric_for(objective: str, recipe: Recipe, detected: str) -> Metric | None:
    """None: the loss. `auto`: the task's metric, but the loss of plain text and preferences, which are not answered."""
    if objective == "auto":
        objective = SCORE if recipe.training.objective == "supervised" else LOSS
    if objective == LOSS:
        return None
    return find_metric(detected if objective == SCORE else objective)


def seeded(recipe: Recipe, number: int) -> Recipe:
    """The recipe with another seed for its order and its adapter's start; the rows are prepared already and do not move."""
    return recipe.model_copy(update={"seed": recipe.seed + number})
