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
from burnish.training.loop import planned_steps
from burnish.training.objective import Objective, Supervised
from burnish.training.pack import epoch_order
from burnish.training.stages import BASE, Start, start_model
from burnish.types import Dataset, Tell, silent

MOST_STEPS, FEWEST_STEPS = 40, 16
COST_FRACTION = 0.05  # of the examples that the run will train on
DECADES = 2.0  # powers of ten below and above the method's usual rate
SMOOTHING = 0.7  # of the exponential mean of the losses
DIVERGED_RISE = 1.0  # the test ends where the loss has risen so many nats above its lowest: later steps only cost time
BELOW_LOWEST = 10.0  # the rate chosen is the rate of the lowest loss ÷ this
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


def range_test(dataset: Dataset, recipe: Recipe, chat: Chat, *, start: Start = BASE, tell: Tell = silent) -> RangeTest:
    """`find_rate` on the training rows and the model that the run will begin with."""
    objective = Supervised()
    items = [item for example in dataset.train for item in chat.training_tokens(example)]
    if plan(len(items), recipe.training)[0] == 0:
        return _too_short(recipe.training)
    model = start_model(recipe, start, tell)
    return find_rate(model, items, objective=objective, settings=recipe.training, seed=recipe.seed, tell=tell)


def find_rate(
    model: Any, items: Sequence[Any], *, objective: Objective, settings: TrainingSection, seed: int, tell: Tell = silent
) -> RangeTest:
    """Choose the peak learning rate for this model and these items (what one row becomes, see Objective). Changes nothing in the model."""
    usual = LEARNING_RATES[settings.method]
    steps, at_once = plan(len(items), settings)
    if steps == 0:
        return _too_short(settings)
    order = epoch_order([objective.length(item) for item in items], seed=seed, epoch=0, batch=at_once)
    batches = [[items[index] for index in order[start : start + at_once]] for start in range(0, steps * at_once, at_once)]
    rates = [usual * 10 ** (DECADES * (2 * step / (steps - 1) - 1)) for step in range(steps)]
    state, was_training = torch.random.get_rng_state(), model.training
    try:
        torch.manual_seed(seed)
        points = _rise(model, batches, rates, objective=objective, settings=settings, tell=tell)
    finally:
        torch.random.set_rng_state(state)
        model.train(was_training)
    rate, reason = choose(points, usual)
    return RangeTest(rate, reason, points, steps * at_once)


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
    reason = f"a {BELOW_LOWEST:.0f}th of {lowest['rate']:.1e}, where the loss of the range test was lowest"
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
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=rates[0], weight_decay=settings.weight_decay)
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
            _step(optimizer, parameters, masters, rate=rate, limit=settings.max_gradient_norm)
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)
                parameter.grad = None
    return points


def _step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    masters: Sequence[torch.Tensor],
    *,
    rate: float,
    limit: float,
) -> None:
    optimizer.param_groups[0]["lr"] = rate
    for parameter, master in zip(parameters, masters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float()
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(masters, limit)
    optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
