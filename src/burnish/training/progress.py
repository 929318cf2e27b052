"""What the loop knows and what it is given: progress, hooks, batching, the plan of steps and rates. Data only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish.recipe import TrainingSection
from burnish.training.checkpoint import Checkpoints
from burnish.training.objective import Objective
from burnish.types import Tell, silent


@dataclass(slots=True)
class Progress:
    """What the loop knows at any time, and what a checkpoint keeps as JSON; `summary.json` is made from it."""

    planned_steps: int
    at_once: int  # items computed at once; the split is part of the state, because rounding depends on it
    step: int = 0
    epoch: int = 0  # position: the next step begins at this place of this epoch's order
    place: int = 0
    tokens: int = 0  # real tokens, prompts included; there is no padding
    target_tokens: int = 0
    examples: int = 0
    seconds: float = 0.0  # of training steps, without validation
    elapsed: float = 0.0  # of everything, up to the last checkpoint
    loss_sum: float = 0.0  # of the steps since the last validation, each times its count
    loss_count: int = 0
    best_loss: float | None = None
    best_step: int = 0
    best_digest: str = ""  # of the weights then: what is read back at the end must be these
    best_figures: dict[str, float] = field(default_factory=dict)  # what the objective tells beside its loss, of the best validation
    validations_without_gain: int = 0
    skipped_steps: int = 0
    stopped_early: bool = False
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    not_finite: list[tuple[int, int]] = field(
        default_factory=list
    )  # positions of the last steps in a row whose loss or norm was not finite
    avoid: list[tuple[int, int]] = field(default_factory=list)  # positions left out since the training was rolled back
    rollbacks: int = 0
    resumes: list[int] = field(default_factory=list)  # steps at which a new process went on
    initial_digest: str = ""  # of the weights before the first step

    @classmethod
    def of(cls, content: dict[str, Any]) -> Progress:
        pairs = {key: [tuple(pair) for pair in content[key]] for key in ("validation_losses", "not_finite", "avoid")}
        return cls(**{**content, **pairs})


def nothing(*_: Any, **__: Any) -> None:
    """The default of hooks that need not do anything."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What happens outside the loop. `log` gets each metrics row; `keep_best` saves the weights as they are now."""

    log: Callable[[dict[str, Any]], None]
    keep_best: Callable[[int, float | None], None]
    tell: Tell = silent
    describe: Callable[[list[int]], str] = lambda indices: f"training sequences {sorted(indices)[:8]} (counted from 0)"
    store: Checkpoints | None = None  # none: nothing to go on from, and no rolling back
    flush: Callable[[], None] = nothing  # have the metrics rows on the disk: a checkpoint must not know more than they do
    rewind: Callable[[Progress], None] = nothing  # metrics rows after this point are to be forgotten
    event: Callable[..., None] = nothing
    stop: Callable[[], int | None] = lambda: None  # the signal that asks to stop


@dataclass(frozen=True, slots=True)
class Batching:
    """In which order items come, and how many are computed at once (none: a micro-batch)."""

    at_once: int | None = None
    buckets: bool = True
    order: Callable[[int], Sequence[int]] | None = None  # epoch → indices; none: `epoch_order` over the lengths


class Diverged(Exception):
    """A loss, a gradient or a weight is not finite, and skipping steps did not help."""


@dataclass(slots=True)
class Work:
    model: Any
    train: Sequence[Any]
    validation: Sequence[Any]
    objective: Objective
    settings: TrainingSection
    seed: int
    hooks: Hooks
    order: Callable[[int], Sequence[int]]
    progress: Progress
    names: list[str]
    parameters: list[torch.nn.Parameter]
    masters: list[Tensor]
    optimizer: torch.optim.Optimizer
    began: float = 0.0
    epoch: tuple[int, Sequence[int]] = (-1, ())  # the order in use, computed once an epoch
    unsaved_best: list[Tensor] | None = None  # the best weights, while the disk refuses them
    saved: tuple[int, int] = (-1, -1)  # (step, validations) of the last checkpoint
    saved_at: float = 0.0

    @property
    def batch(self) -> int:
        return int(self.settings.micro_batch_size) * self.settings.gradient_accumulation_steps


def planned_steps(rows: int, settings: TrainingSection) -> int:
    """Optimizer steps that `epochs` gives (the last step of an epoch may be smaller), at most `max_steps`."""
    per_epoch = -(-rows // (int(settings.micro_batch_size) * settings.gradient_accumulation_steps))
    steps = max(1, math.ceil(per_epoch * settings.epochs - 1e-9))
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def learning_rate_at(step: int, total: int, settings: TrainingSection) -> float:
    """The rate of step 0, 1, … total − 1: linear warm-up, then cosine to a tenth, linear to zero, or constant."""
    peak = float(settings.learning_rate)
    warmup = math.ceil(settings.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress) if settings.schedule == "linear" else peak
