"""`learning_rate: auto`: a short range test (Smith 2015, arXiv 1506.01186, section 3.3) on the run's own training rows.

The rate rises geometrically from step to step, with the loop's own optimizer, over two powers of ten on each side of the method's usual rate.
Each step's loss is compared with the loss of the same rows at the weights the test began with: without that, how hard a batch is would drown
what a few steps bring. The rate chosen is a fixed fraction of the one at which the loss stops falling (`choose`). Weights, gradients and random
numbers are afterwards what they were, bit for bit; the result depends on the seed, the rows and the weights only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from burnish.models import LEARNING_RATES, Chat, trainable_parameters
from burnish.recipe import Recipe, TrainingSection
from burnish.run import Run
from burnish.training.items import make_items, with_references
from burnish.training.objective import Objective, make_objective
from burnish.training.pack import epoch_order
from burnish.training.progress import planned_steps
from burnish.training.ready import equip, rows_of, start_state, tokens_key
from burnish.training.stages import BASE, Start, start_model
from burnish.training.step import make_masters, make_optimizer, norm_of, take_gradients, update
from burnish.types import Dataset, Tell, silent

MOST_STEPS, FEWEST_STEPS = 40, 16
COST_FRACTION = 0.05  # of the examples that the run will train on
DECADES = 2.0  # powers of ten below and above the method's usual rate
SMOOTHING = 0.7  # of the exponential mean of the losses
DIVERGED_RISE = 1.0  # the test ends where the loss has risen so many nats above its lowest: later steps only cost time
BELOW_LOWEST = 3.0  # the rate chosen is the rate of the lowest loss ÷ this
FURTHEST = 10.0  # and never further from the method's usual rate than this factor: so few steps know little


@dataclass(frozen=True, slots=True)
class RangeTest:
    """What the test saw. `points` has a dict for each step: rate, loss, before (the same rows' loss at the start), change (smoothed)."""

    learning_rate: float
    reason: str
    points: list[dict[str, float]]
    examples: int

    def to_dict(self) -> dict[str, Any]:
        return {"learning_rate": self.learning_rate, "reason": self.reason, "examples": self.examples, "points": self.points}


def range_test(run: Run, dataset: Dataset, recipe: Recipe, chat: Chat, *, start: Start = BASE, tell: Tell = silent) -> RangeTest:
    """`find_rate` on the training rows and the model that the run will begin with."""
    objective = make_objective(recipe)
    items = make_items(objective, chat, dataset, folder=run.tokens_folder, key=tokens_key(recipe, dataset, chat), tell=tell)
    if plan(rows_of(items, recipe), recipe.training)[0] == 0:
        return _too_short(recipe.training)
    model = start_model(recipe, start, tell)
    at_once = equip(model, objective, items, recipe, tell=tell).at_once
    state = start_state(model, recipe)
    items = with_references(items, objective, model, cache=run.reference_file, state=state, at_once=at_once, tell=tell)
    return find_rate(model, items.train, objective=objective, settings=recipe.training, seed=recipe.seed, at_once=at_once, tell=tell)


def find_rate(
    model: Any,
    items: Sequence[Any],
    *,
    objective: Objective,
    settings: TrainingSection,
    seed: int,
    at_once: int | None = None,
    tell: Tell = silent,
) -> RangeTest:
    """Choose the peak learning rate for this model and these items (what one row becomes, see Objective). Changes nothing in the model.

    `at_once`: items that may be computed together at most, where memory has a say.
    """
    usual = LEARNING_RATES[settings.method]
    steps, batch = plan(len(items), settings)
    if steps == 0:
        return _too_short(settings)
    batch = min(batch, at_once or batch)
    lengths = getattr(items, "lengths", None)  # a sequence on disk knows them
    order = epoch_order([objective.length(item) for item in items] if lengths is None else lengths, seed=seed, epoch=0, batch=batch)
    batches = [[items[index] for index in order[start : start + batch]] for start in range(0, steps * batch, batch)]
    rates = [usual * 10 ** (DECADES * (2 * step / (steps - 1) - 1)) for step in range(steps)]
    was_training, device = model.training, next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        points = _rise(model, batches, rates, objective=objective, settings=settings, tell=tell)
    model.train(was_training)
    objective.figures()  # what was seen in the test belongs to no step
    rate, reason = choose(points, usual)
    return RangeTest(rate, reason, points, steps * batch)


def _too_short(settings: TrainingSection) -> RangeTest:
    return RangeTest(LEARNING_RATES[settings.method], f"the run is too short for a range test: the usual rate of {settings.method}", [], 0)


def plan(rows: int, settings: TrainingSection) -> tuple[int, int]:
    """(steps, examples in each): at most MOST_STEPS, and COST_FRACTION of the examples that the run trains on; 0 steps: too short a run."""
    batch = int(settings.micro_batch_size) * settings.gradient_accumulation_steps
    budget = min(int(COST_FRACTION * planned_steps(rows, settings) * batch), rows)
    steps = min(MOST_STEPS, budget // 2)
    return (steps, min(int(settings.micro_batch_size), budget // steps)) if steps >= FEWEST_STEPS else (0, 0)


def choose(points: Sequence[dict[str, float]], usual: float) -> tuple[float, str]:
    """The rate and why. Where the loss fell nowhere, the usual rate stays."""
    lowest = min(points, key=lambda point: point["change"])
    if lowest["change"] >= 0:
        return usual, "the loss fell at no rate of the range test: the usual rate of the method"
    rate = lowest["rate"] / BELOW_LOWEST
    reason = f"1/{BELOW_LOWEST:.0f} of {lowest['rate']:.1e}, where the loss of the range test was lowest"
    if not usual / FURTHEST <= rate <= usual * FURTHEST:
        rate = min(max(rate, usual / FURTHEST), usual * FURTHEST)
        reason += f", held within a factor of {FURTHEST:.0f} of the method's usual rate"
    return float(f"{rate:.2g}"), reason


def _rise(
    model: Any, batches: Sequence[Sequence[Any]], rates: Sequence[float], *, objective: Objective, settings: TrainingSection, tell: Tell
) -> list[dict[str, float]]:
    """One step of AdamW with float32 masters at each rate, as in the loop; puts the weights back."""
    parameters = list(trainable_parameters(model).values())
    kept = [parameter.detach().clone() for parameter in parameters]
    masters = make_masters(parameters)
    optimizer = make_optimizer(masters, rate=rates[0], weight_decay=settings.weight_decay)
    model.eval()
    before = [objective.summed(model, batch) / objective.count(batch) for batch in batches]
    model.train()
    points: list[dict[str, float]] = []
    mean = weight = 0.0
    try:
        for number, (batch, rate, start) in enumerate(zip(batches, rates, before, strict=True), 1):
            loss = objective.backward(model, batch, objective.count(batch))
            if not math.isfinite(loss):
                break
            mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * (loss - start), SMOOTHING * weight + (1 - SMOOTHING)
            if points and mean / weight > min(point["change"] for point in points) + DIVERGED_RISE:
                break
            points.append({"rate": rate, "loss": loss, "before": start, "change": mean / weight})
            tell("learning rate, range test", number, len(rates), f"{rate:.1e}: {mean / weight:+.3f} nats")
            gradients = take_gradients(parameters, masters)
            scale = min(1.0, settings.max_gradient_norm / (norm_of(gradients) + 1e-6))
            update(optimizer, parameters, masters, gradients, rate=rate, scale=scale)
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)
                parameter.grad = None
    return points
