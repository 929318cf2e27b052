"""The loop. One step: count the target tokens of all its micro-batches, add up losses ÷ count, refuse what is not finite, clip, step."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from burnish.errors import TrainingError
from burnish.models import trainable_parameters
from burnish.recipe import TrainingSection
from burnish.training.mix import epoch_indices, replayed_per_epoch
from burnish.training.objective import Objective, Supervised
from burnish.training.pack import epoch_order
from burnish.types import Tell, silent

SKIPS_IN_A_ROW = 3


@dataclass(slots=True)
class Progress:
    """What the loop knows at any time; `summary.json` is made from it."""

    planned_steps: int
    step: int = 0
    tokens: int = 0  # real tokens, prompts included; there is no padding
    target_tokens: int = 0
    examples: int = 0
    seconds: float = 0.0  # of training steps, without validation
    best_loss: float | None = None
    best_step: int = 0
    validations_without_gain: int = 0
    skipped_steps: int = 0
    stopped_early: bool = False
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
    best_figures: dict[str, float] = field(default_factory=dict)  # what the objective says beside its loss, at the best step


@dataclass(frozen=True, slots=True)
class Hooks:
    """What happens outside the loop. `log` gets each metrics row; `keep_best` saves the weights as they are now."""

    log: Callable[[dict[str, Any]], None]
    keep_best: Callable[[int, float | None], None]
    tell: Tell = silent
    describe: Callable[[list[int]], str] = lambda indices: f"training sequences {sorted(indices)[:8]} (counted from 0)"


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


def run_loop(
    model: Any,
    train: Sequence[Any],
    validation: Sequence[Any],
    *,
    settings: TrainingSection,
    seed: int,
    hooks: Hooks,
    objective: Objective | None = None,
    replay: Sequence[Any] = (),
) -> Progress:
    """Train until the planned steps are done or validation stops getting better. `settings.learning_rate` must be a number by now."""
    objective = objective or Supervised()
    batch = int(settings.micro_batch_size) * settings.gradient_accumulation_steps
    rows = len(train) + replayed_per_epoch(len(train), len(replay), settings.replay_fraction)
    progress = Progress(planned_steps(rows, settings))
    mixed = [*train, *replay]
    lengths = [objective.length(item) for item in mixed]
    per_epoch = -(-rows // batch)
    parameters = list(trainable_parameters(model).values())
    # float32 masters: an update of a thousandth of a bfloat16 weight would be rounded away.
    masters = [parameter.detach().float().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=float(settings.learning_rate), weight_decay=settings.weight_decay)
    torch.manual_seed(seed)
    at_once = int(settings.micro_batch_size) if objective.paths.packed else 1
    _validate(model, validation, progress, settings=settings, hooks=hooks, at_once=at_once, objective=objective)
    skipped = 0

    def order(epoch: int) -> list[int]:
        chosen = epoch_indices(len(train), len(replay), settings.replay_fraction, seed=seed, epoch=epoch)
        return epoch_order(lengths, seed=seed, epoch=epoch, batch=batch, indices=chosen)

    for indices in _steps(order, batch=batch, steps=progress.planned_steps):
        started = time.perf_counter()
        items = [mixed[index] for index in indices]
        loss, targets = _backward(model, items, at_once, objective)
        norm = _gradient_norm(parameters)
        rate = learning_rate_at(progress.step, progress.planned_steps, settings)
        progress.step += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            skipped = 0
            _update(optimizer, parameters, masters, rate=rate, scale=min(1.0, settings.max_gradient_norm / (norm + 1e-6)))
        else:
            skipped += 1
            progress.skipped_steps += 1
        for parameter in parameters:
            parameter.grad = None
        progress.seconds += time.perf_counter() - started
        progress.tokens += sum(objective.length(item) for item in items)
        progress.target_tokens += sum(tokens.target_tokens for item in items for tokens in objective.sequences(item))
        progress.examples += len(items)
        row = _row(progress, rows, loss=loss if finite else None, rate=rate, norm=norm if finite else None)
        figures = {name: round(total / targets, 6) if finite else None for name, total in objective.figures().items()}
        hooks.log(row | figures)
        if skipped >= SKIPS_IN_A_ROW:
            raise TrainingError(
                f"diverged: the loss or gradient was not finite in {skipped} steps in a row, the last with {hooks.describe(indices)}. "
                "Lower training.learning_rate or look at these rows"
            )
        left = (progress.planned_steps - progress.step) * progress.seconds / progress.step
        hooks.tell(
            "training",
            progress.step,
            progress.planned_steps,
            f"loss {loss:.3f} · {progress.tokens / progress.seconds:.0f} tok/s · {left / 60:.1f} min left",
        )
        share = settings.validations_per_epoch / per_epoch
        if int(progress.step * share + 1e-9) > int((progress.step - 1) * share + 1e-9) or progress.step == progress.planned_steps:
            _validate(model, validation, progress, settings=settings, hooks=hooks, at_once=at_once, objective=objective)
            if progress.stopped_early:
                break
    if not validation:
        hooks.keep_best(progress.step, None)
    return progress


def mean_loss(model: Any, items: Sequence[Any], micro_batch_size: int, tell: Tell = silent, objective: Objective | None = None) -> float:
    """Mean nats per unit (target token, pair) over all items, without gradients."""
    objective = objective or Supervised()
    total = 0.0
    # Like lengths together; the order of a sum does not matter.
    ordered = sorted(items, key=objective.length)
    for start in range(0, len(ordered), micro_batch_size):
        total += objective.summed(model, ordered[start : start + micro_batch_size])
        tell("validation loss", min(start + micro_batch_size, len(ordered)), len(ordered), "")
    return total / objective.count(items)


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far (on a GPU: of its allocator)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _steps(order_of: Callable[[int], list[int]], *, batch: int, steps: int) -> Iterator[list[int]]:
    done, epoch = 0, 0
    while True:
        order = order_of(epoch)
        for start in range(0, len(order), batch):
            if done == steps:
                return
            yield order[start : start + batch]
            done += 1
        epoch += 1


def _backward(model: Any, items: Sequence[Any], micro_batch_size: int, objective: Objective) -> tuple[float, int]:
    """Gradients of (sum of losses ÷ units of the whole step). Returns (mean loss, units)."""
    model.train()
    units = objective.count(items)
    parts = [items[start : start + micro_batch_size] for start in range(0, len(items), micro_batch_size)]
    return sum(objective.backward(model, part, units) for part in parts), units


def _gradient_norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    return float(torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None]).norm())


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    masters: Sequence[torch.Tensor],
    *,
    rate: float,
    scale: float,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, master in zip(parameters, masters, strict=True):
        master.grad = None if parameter.grad is None else parameter.grad.float().mul_(scale)
    optimizer.step()
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.copy_(master)
            master.grad = None


def _validate(
    model: Any,
    validation: Sequence[Any],
    progress: Progress,
    *,
    settings: TrainingSection,
    hooks: Hooks,
    at_once: int,
    objective: Objective,
) -> None:
    if not validation:
        return
    started = time.perf_counter()
    model.eval()
    loss = mean_loss(model, validation, at_once, objective=objective)
    figures = {f"validation_{name}": round(total / objective.count(validation), 6) for name, total in objective.figures().items()}
    if not math.isfinite(loss):
        raise TrainingError(f"diverged: the validation loss after step {progress.step} is not finite. Lower training.learning_rate")
    progress.validation_losses.append((progress.step, loss))
    hooks.log({"step": progress.step, "validation_loss": round(loss, 6), "seconds": round(time.perf_counter() - started, 3), **figures})
    if progress.step == 0:
        return  # the base's own loss: where the curve begins, not a checkpoint
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.validations_without_gain = loss, progress.step, 0
        progress.best_figures = figures
        hooks.keep_best(progress.step, loss)
        return
    progress.validations_without_gain += 1
    patience = settings.early_stopping_patience
    progress.stopped_early = bool(patience) and progress.validations_without_gain >= patience and progress.step < progress.planned_steps


def _row(progress: Progress, rows: int, *, loss: float | None, rate: float, norm: float | None) -> dict[str, Any]:
    return {
        "step": progress.step,
        "epoch": round(progress.examples / rows, 4),
        "loss": None if loss is None else round(loss, 6),
        "learning_rate": rate,
        "gradient_norm": None if norm is None else round(norm, 6),
        "target_tokens": progress.target_tokens,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
    }
