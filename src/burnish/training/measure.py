"""What a training costs on this machine, from a few of its own steps: seconds, and memory part by part. Nothing of them is kept.

`time_steps` is the door: it reads the base model, makes it ready as a training would, takes real steps of the run's own order (one for each equal
share of the steps, from short to long ones) and forgets the model. Nothing on the disk changes but, where a folder is given, the rows as tokens,
which the training then finds made. Random numbers go on as if nothing had been drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from burnish.models import Chat, trainable_parameters
from burnish.recipe import Recipe, TrainingSection
from burnish.training.items import Items, make_items
from burnish.training.memory import MemoryParts, Plan, memory_parts
from burnish.training.objective import Objective, make_objective
from burnish.training.pack import row_length
from burnish.training.preference import Pair
from burnish.training.progress import planned_steps
from burnish.training.rate import plan as plan_of_rate
from burnish.training.ready import equip, order_of, rows_of, tokens_key
from burnish.training.recovery import memory_errors, peak_memory_bytes
from burnish.training.stages import BASE, Start, start_model
from burnish.training.step import backward, items_at_once, make_masters, make_optimizer, norm_of, seed_step, take_gradients, update
from burnish.types import Dataset, Tell, silent

TIMED_STEPS = 5
_SIZED_STEPS = 512  # steps of an epoch whose rows are laid out to know their lengths; evenly spread where there are more
_TINY_RATE = 1e-9  # AdamW's arithmetic costs the same at any rate; this one keeps the steps alike


@dataclass(frozen=True, slots=True)
class Shape:
    """What a formula needs to know of a model and its longest micro-batch, where nothing can be measured."""

    parameters: int  # all, the trained ones among them
    trained_parameters: int
    adapter: bool  # the trained ones stand beside the base's
    weight_bytes: int  # of one number in the compute type here
    layers: int
    hidden_size: int
    vocabulary: int
    batch_tokens: int  # the longest micro-batch, not split
    batch_targets: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Forecast of a training from steps that were timed. Seconds of this machine as busy as it was then.

    `tokens_per_step`: tokens as they are computed, a beginning that several share counted once; `real_tokens_per_step`: as the rows have them.
    """

    steps: int  # optimizer updates that the recipe plans
    seconds_per_step: float  # mean over the planned steps
    seconds_per_token: float  # of a token as computed: forward, backward and the step's own part
    tokens_per_step: float
    real_tokens_per_step: float
    target_tokens_per_step: float
    spread: float  # how far timed steps lie from a straight line over their tokens, relative (root mean square)
    forward_seconds_per_token: float  # without gradients
    validation_seconds: float  # of one pass over the validation rows
    validations: int  # passes that the recipe plans, that before the first step among them
    rate_seconds: float  # of the range test, where the learning rate is to be found
    reference_seconds: float  # of what a preference's pairs are at the start
    load_seconds: float  # the model read and made ready
    memory: MemoryParts
    peak_bytes: int  # the largest that this process has held so far
    plan: Plan
    shape: Shape
    timed: tuple[tuple[int, float], ...]  # (tokens as computed, seconds) of each timed step

    @property
    def training_seconds(self) -> float:
        """All steps, all validations, what comes before the first step; without answers of test rows."""
        passes = self.validations * self.validation_seconds
        return self.load_seconds + self.rate_seconds + self.reference_seconds + passes + self.steps * self.seconds_per_step

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "memory": self.memory.to_dict(),
            "training_seconds": self.training_seconds,
            "timed": [list(pair) for pair in self.timed],
        }


@memory_errors()
def time_steps(
    dataset: Dataset,
    chat: Chat,
    recipe: Recipe,
    *,
    start: Start = BASE,
    folder: Path | None = None,
    timed: int = TIMED_STEPS,
    clock: Callable[[], float] = time.perf_counter,
    tell: Tell = silent,
) -> StepTimes:
    """What training this recipe on these rows costs here, from `timed` real steps after one that warms up on the longest rows.

    `recipe` is the resolved one (a learning rate that is still `auto` is fine); of `dataset` train, validation and replayed rows are read.
    `start`: as in `train`. `folder`: keeps the rows as tokens (run.tokens_folder). `clock` gives seconds, for tests.
    Seconds per training token: `.seconds_per_token`; per step: `.seconds_per_step`; the whole training: `.training_seconds`.
    Raises ModelError, or TrainingError where one step does not fit into memory.
    """
    objective, settings = make_objective(recipe), recipe.training
    items = make_items(objective, chat, dataset, folder=folder, key=tokens_key(recipe, dataset, chat), tell=tell)
    with _same_randomness():
        began = clock()
        model = start_model(recipe, start, tell)
        plan = equip(model, objective, items, recipe, tell=tell)
        load_seconds = clock() - began
        mixed, batches = items.mixed, _batches(objective, items, recipe)
        rows = [_known(objective, [mixed[index] for index in batch]) for batch in batches]
        sizes = [_size(objective, row, plan, model.device.type) for row in rows]
        chosen = spread_out(sizes, timed)
        longest = _known(objective, items.longest(objective, int(settings.micro_batch_size) * settings.gradient_accumulation_steps))
        found = _take_steps(
            model, objective, [rows[place] for place in chosen], warm_up=longest, recipe=recipe, at_once=plan.at_once, clock=clock, tell=tell
        )  # fmt: skip
        device = model.device.type
        memory = memory_parts(model, plan, *_largest_row(objective, longest[: plan.at_once], plan.at_once, device))
        shape = _shape(model, *_largest_row(objective, longest[: int(settings.micro_batch_size)], len(longest), "cuda"))
    count = rows_of(items, recipe)
    step, tokens = mean_step(sizes, chosen, found.seconds), sum(sizes) / len(sizes)
    forward = found.forward_seconds / found.forward_tokens
    return StepTimes(
        steps=planned_steps(count, settings),
        seconds_per_step=step,
        seconds_per_token=step / tokens,
        tokens_per_step=tokens,
        real_tokens_per_step=sum(objective.length(item) for row in rows for item in row) / len(rows),
        target_tokens_per_step=sum(s.target_tokens for row in rows for item in row for s in objective.sequences(item)) / len(rows),
        spread=straightness([sizes[place] for place in chosen], found.seconds),
        forward_seconds_per_token=forward,
        validation_seconds=forward * sum(objective.length(item) for item in items.validation),
        validations=count_validations(count, settings) if len(items.validation) else 0,
        rate_seconds=_rate_seconds(
            count, recipe, per_token=step / tokens, forward=forward, tokens_per_item=tokens * len(rows) / sum(map(len, rows))
        ),
        reference_seconds=0.0
        if objective.tokens_only
        else forward * sum(objective.length(item) for part in (items.train, items.validation) for item in part),
        load_seconds=load_seconds,
        memory=memory,
        peak_bytes=peak_memory_bytes(),
        plan=plan,
        shape=shape,
        timed=tuple((sizes[place], seconds) for place, seconds in zip(chosen, found.seconds, strict=True)),
    )


# ------------------------------------------------------------------------------------------------------------------ inside


@dataclass(frozen=True, slots=True)
class _Found:
    seconds: list[float]  # of each timed step
    forward_seconds: float  # without gradients, as a validation computes
    forward_tokens: int


def _take_steps(
    model: Any, objective: Objective, batches: Sequence[Sequence[Any]], *, warm_up: Sequence[Any], recipe: Recipe, at_once: int,
    clock: Callable[[], float], tell: Tell,
) -> _Found:  # fmt: skip
    """One step on `warm_up`, untimed (kernels are compiled, memory is fetched), then one on each batch as the loop takes it; then a forward pass."""
    parameters = list(trainable_parameters(model).values())
    masters = make_masters(parameters)
    optimizer = make_optimizer(masters, rate=_TINY_RATE, weight_decay=0.0)
    seconds: list[float] = []
    for number, items in enumerate([warm_up, *batches]):
        tell("timing steps", number, len(batches), "")
        began = clock()
        seed_step(recipe.seed, number)
        backward(model, objective, items, at_once=at_once, denominator=objective.count(items))
        gradients = take_gradients(parameters, masters)
        scale = min(1.0, recipe.training.max_gradient_norm / (norm_of(gradients) + 1e-6))
        update(optimizer, parameters, masters, gradients, rate=_TINY_RATE, scale=scale)
        if number:
            _wait(model)
            seconds.append(clock() - began)
    model.eval()
    middle = list(batches[len(batches) // 2])
    began = clock()
    for place in range(0, len(middle), at_once):
        objective.summed(model, middle[place : place + at_once])
    _wait(model)
    tell("timing steps", len(batches), len(batches), "")
    return _Found(seconds, clock() - began, sum(objective.length(item) for item in middle))


def _wait(model: Any) -> None:
    """A GPU computes behind the program's back."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _batches(objective: Objective, items: Items, recipe: Recipe) -> list[list[int]]:
    """The steps of the first epoch as indices of `items.mixed`; evenly spread ones where there are very many."""
    settings = recipe.training
    order, batch = order_of(objective, items, recipe)(0), int(settings.micro_batch_size) * settings.gradient_accumulation_steps
    found = [[int(index) for index in order[place : place + batch]] for place in range(0, len(order), batch)]
    found = found[: planned_steps(len(order), settings)]
    return found if len(found) <= _SIZED_STEPS else [found[i * len(found) // _SIZED_STEPS] for i in range(_SIZED_STEPS)]


def spread_out(sizes: Sequence[int], count: int) -> list[int]:
    """Places of `count` sizes, one from the middle of each equal share of them, from small to large."""
    ordered = sorted(range(len(sizes)), key=lambda place: (sizes[place], place))
    count = min(count, len(ordered))
    return [ordered[(2 * share + 1) * len(ordered) // (2 * count)] for share in range(count)]


def mean_step(sizes: Sequence[int], chosen: Sequence[int], seconds: Sequence[float]) -> float:
    """Mean seconds of all steps from those timed: each stands for its share, by its seconds per token (a ratio estimate in strata, Cochran 1977, 6.10)."""
    ordered = sorted(sizes)
    total = 0.0
    for share, (place, took) in enumerate(zip(chosen, seconds, strict=True)):
        stratum = ordered[share * len(ordered) // len(chosen) : (share + 1) * len(ordered) // len(chosen)]
        total += took / max(1, sizes[place]) * sum(stratum)
    return total / len(ordered)


def straightness(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Root mean square of how far steps lie from a straight line over their tokens, as a share of the mean step; 0 where two or fewer were timed."""
    if len(set(tokens)) < 2 or len(tokens) < 3:
        return 0.0
    slope, fixed = np.polyfit(np.asarray(tokens, dtype=float), np.asarray(seconds), 1)
    left = np.asarray(seconds) - (slope * np.asarray(tokens, dtype=float) + fixed)
    return float(np.sqrt((left**2).mean()) / np.mean(seconds))


def _size(objective: Objective, items: Sequence[Any], plan: Plan, device: str) -> int:
    """Tokens of a step as they are computed: what its rows share counts once in each row of the packing."""
    return sum(
        row_length([tokens for item in part for tokens in objective.sequences(item)], objective.paths)
        for part in _split(objective, items, plan.at_once, device)
    )


def _split(objective: Objective, items: Sequence[Any], at_once: int, device: str) -> list[Sequence[Any]]:
    """The rows that a step computes one after the other, as `backward` splits them."""
    at_once = items_at_once(objective, items, at_once, device)
    return [items[place : place + at_once] for place in range(0, len(items), at_once)]


def _largest_row(objective: Objective, longest: Sequence[Any], at_once: int, device: str) -> tuple[int, int]:
    """(tokens, targets) of the longest row that is computed at once on such a device."""
    sequences = [tokens for item in _split(objective, longest, at_once, device)[0] for tokens in objective.sequences(item)]
    return row_length(sequences, objective.paths), sum(tokens.target_tokens for tokens in sequences)


def _shape(model: Any, batch_tokens: int, batch_targets: int) -> Shape:
    config, trained = model.config.get_text_config(), trainable_parameters(model).values()
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in trained),
        adapter=isinstance(model, PeftModel),
        weight_bytes=model.dtype.itemsize,
        layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        batch_tokens=batch_tokens,
        batch_targets=batch_targets,
    )


def count_validations(rows: int, settings: TrainingSection) -> int:
    """How many passes over the validation rows the loop makes: before the first step, `validations_per_epoch` times evenly, after the last."""
    steps = planned_steps(rows, settings)
    share = settings.validations_per_epoch / -(-rows // (int(settings.micro_batch_size) * settings.gradient_accumulation_steps))
    return 2 + sum(int(step * share + 1e-9) > int((step - 1) * share + 1e-9) for step in range(1, steps))


def _rate_seconds(rows: int, recipe: Recipe, *, per_token: float, forward: float, tokens_per_item: float) -> float:
    """Of the range test (training/rate.py): each of its rows is looked at once and trained on once."""
    if recipe.training.learning_rate != "auto":
        return 0.0
    steps, batch = plan_of_rate(rows, recipe.training)
    return steps * batch * tokens_per_item * (per_token + forward)


def _known(objective: Objective, items: Sequence[Any]) -> list[Any]:
    """Pairs with a reference: what it is does not matter to how long a step takes."""
    return [replace(item, reference=0.0) if isinstance(item, Pair) else item for item in items]


@contextmanager
def _same_randomness() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
