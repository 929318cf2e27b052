"""The loop. One step: count what all its micro-batches hold, add up losses ÷ count, refuse what is not finite, clip, step.

    validate, if it is due → save, if it is due → stop, if asked or done → step → …

Between two steps the whole training is one State (checkpoint.py): what is computed from there on does not depend on how it was reached. The order of
the data is a pure function of (seed, epoch), random numbers are one of (seed, step), and the position is a number: nothing is replayed.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from burnish.errors import Stopped
from burnish.models import trainable_parameters
from burnish.recipe import TrainingSection
from burnish.training import distributed
from burnish.training.checkpoint import State, weights_digest
from burnish.training.objective import Objective, Supervised
from burnish.training.pack import epoch_order
from burnish.training.progress import Batching, Diverged, Hooks, Progress, Work, learning_rate_at, planned_steps
from burnish.training.recovery import items_at, keep_best, restore, roll_back, save, split_smaller
from burnish.training.step import (
    backward,
    is_out_of_memory,
    make_masters,
    make_optimizer,
    norm_of,
    seed_step,
    share_state,
    take_gradients,
    update,
)
from burnish.types import Tell, silent

SKIPS_IN_A_ROW = 3
AUTO_CHECKPOINT_SECONDS = 120.0


class _GivenUp(Exception):
    """A validation that was left because somebody asked to stop."""


def run_loop(
    model: Any,
    train: Sequence[Any],
    validation: Sequence[Any],
    *,
    objective: Objective | None = None,
    settings: TrainingSection,
    seed: int,
    hooks: Hooks,
    start: State | None = None,
    batching: Batching | None = None,
) -> Progress:
    """Train until the planned steps are done or validation stops getting better. `settings.learning_rate` must be a number by now.

    Of `train` only its length and single items are used (one that lies on disk brings `lengths`). Raises TrainingError, or Stopped after saving.
    """
    work = _begin(model, train, validation, objective or Supervised(), settings, seed, hooks, batching or Batching())
    if (state := share_state(start)) is not None:
        restore(work, state)
        work.progress.resumes.append(work.progress.step)
        hooks.rewind(work.progress)
    while True:
        try:
            _validate_if_due(work)
            if _save_or_stop(work):
                break
            _step(work)
        except Diverged as problem:
            roll_back(work, problem)
    return work.progress


def mean_loss(
    model: Any,
    items: Sequence[Any],
    micro_batch_size: int,
    tell: Tell = silent,
    *,
    objective: Objective | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> float:
    """Mean loss per unit (nats per target token) over all items, without gradients; the processes share the work."""
    objective = objective or Supervised()
    summed = count = 0.0
    # Like lengths together; the order of a sum does not matter.
    ordered = sorted(items, key=objective.length)
    starts = range(0, len(ordered), micro_batch_size)[distributed.rank() :: distributed.size()]
    for start in starts:
        if give_up():
            raise _GivenUp
        batch = ordered[start : start + micro_batch_size]
        summed += objective.summed(model, batch)
        count += objective.count(batch)
        distributed.beat()
        tell("validation loss", min(start + micro_batch_size, len(ordered)), len(ordered), "")
    summed, count = distributed.total(summed, count)
    return summed / count


# ------------------------------------------------------------------------------------------------------------------ inside


def _begin(
    model: Any, train: Sequence[Any], validation: Sequence[Any], objective: Objective, settings: TrainingSection, seed: int, hooks: Hooks,
    batching: Batching,
) -> Work:  # fmt: skip
    named = trainable_parameters(model)
    parameters = list(named.values())
    masters = make_masters(parameters)
    optimizer = make_optimizer(masters, rate=float(settings.learning_rate), weight_decay=settings.weight_decay)
    batch = int(settings.micro_batch_size) * settings.gradient_accumulation_steps
    order = batching.order or _order_of(train, objective, seed=seed, batch=batch, buckets=batching.buckets)
    share = -(-batch // distributed.size())
    first = order(0)
    progress = Progress(planned_steps(len(first), settings), min(batching.at_once or int(settings.micro_batch_size), share))
    progress.initial_digest = weights_digest(parameters)
    work = Work(model, train, validation, objective, settings, seed, hooks, order, progress, list(named), parameters, masters, optimizer)
    work.began = work.saved_at = time.monotonic()
    work.epoch = (0, first)
    return work


def _order_of(train: Sequence[Any], objective: Objective, *, seed: int, batch: int, buckets: bool) -> Callable[[int], Sequence[int]]:
    lengths = getattr(train, "lengths", None)  # a sequence on disk knows them
    if lengths is None:
        lengths = [objective.length(item) for item in train]
    return lambda epoch: epoch_order(lengths, seed=seed, epoch=epoch, batch=batch, buckets=buckets)


def _step(work: Work) -> None:
    progress, hooks, settings = work.progress, work.hooks, work.settings
    started = time.perf_counter()
    position = (progress.epoch, progress.place)
    indices = items_at(work, *position)
    rate = learning_rate_at(progress.step, progress.planned_steps, settings)
    loss, norm, count, tokens, targets = math.nan, math.nan, 0, 0.0, 0.0
    figures: dict[str, float] = {}
    avoided = position in progress.avoid
    if not avoided:
        items = [work.train[index] for index in indices[distributed.rank() :: distributed.size()]]
        loss, count, figures = _gradients(work, items)
        gradients = take_gradients(work.parameters, work.masters)
        norm = norm_of(gradients)
        rows = [sequence for item in items for sequence in work.objective.sequences(item)]
        tokens, targets = distributed.total(sum(len(r.input_ids) for r in rows), sum(r.target_tokens for r in rows))
    finite = math.isfinite(loss) and math.isfinite(norm)
    progress.step += 1
    progress.place += work.batch
    if progress.place >= len(work.epoch[1]):
        progress.epoch, progress.place = progress.epoch + 1, 0
    if finite:
        progress.not_finite = []
        scale = min(1.0, settings.max_gradient_norm / (norm + 1e-6))
        update(work.optimizer, work.parameters, work.masters, gradients, rate=rate, scale=scale)
        progress.loss_sum, progress.loss_count = progress.loss_sum + loss * count, progress.loss_count + count
    else:
        progress.skipped_steps += 1
        if not avoided:
            progress.not_finite.append(position)
            hooks.event(
                "step_skipped", at_step=progress.step, reason="the loss or the gradient was not finite", rows=hooks.describe(indices)
            )
    progress.seconds += time.perf_counter() - started
    progress.tokens += int(tokens)
    progress.target_tokens += int(targets)
    progress.examples += len(indices)
    distributed.beat(step=True)
    row = _row(progress, len(work.epoch[1]), loss=loss if finite else None, rate=rate, norm=norm if finite else None)
    hooks.log({**row, **{name: round(value, 6) if finite else None for name, value in figures.items()}})
    if len(progress.not_finite) >= SKIPS_IN_A_ROW:
        raise Diverged(f"the loss or gradient was not finite in {SKIPS_IN_A_ROW} steps in a row, up to step {progress.step}")
    left = (progress.planned_steps - progress.step) * progress.seconds / progress.step
    shown = f"loss {loss:.3f}" if finite else "left out: not finite"
    speed = f"{progress.tokens / progress.seconds:.0f} tok/s · {left / 60:.1f} min left"
    hooks.tell("training", progress.step, progress.planned_steps, f"{shown} · {speed}")


def _gradients(work: Work, items: Sequence[Any]) -> tuple[float, int, dict[str, float]]:
    """(mean loss, count, other figures) of the step; gradients are in the parameters. Where memory ends, the step is done again in smaller parts."""
    (count,) = distributed.total(work.objective.count(items))
    while True:
        seed_step(work.seed, work.progress.step)
        loss, full = 0.0, ""
        try:
            loss = backward(work.model, work.objective, items, at_once=work.progress.at_once, denominator=int(count))
        except Exception as problem:
            if not is_out_of_memory(problem):
                raise
            full = str(problem)[:200] or type(problem).__name__
        loss, anywhere = distributed.total(loss, float(bool(full)))
        figures = _figures(work, count)  # of an attempt that failed, too: they are read once
        if not anywhere:
            return loss, int(count), figures
        split_smaller(work, items, full)


def _figures(work: Work, count: float) -> dict[str, float]:
    """What the objective saw since it was last asked, over all processes: means of `count`."""
    figures = work.objective.figures()
    names = distributed.share(sorted(figures))
    sums = distributed.total(*(figures.get(name, 0.0) for name in names)) if names else []
    return {name: value / count for name, value in zip(names, sums, strict=True)}


def _validate_if_due(work: Work) -> None:
    progress = work.progress
    if not work.validation or not _is_due(work) or (progress.validation_losses and progress.validation_losses[-1][0] == progress.step):
        return
    started = time.perf_counter()
    work.model.eval()
    alone = distributed.size() == 1
    try:
        loss = _mean_loss_in_memory(work, lambda: alone and work.hooks.stop() is not None)
    except _GivenUp:
        work.objective.figures()  # of a part of the rows: nobody's
        return  # it is still due: whoever goes on begins with it
    figures = {f"validation_{name}": round(value, 6) for name, value in _figures(work, work.objective.count(work.validation)).items()}
    if not math.isfinite(loss):
        raise Diverged(f"the validation loss after step {progress.step} is not finite")
    progress.validation_losses.append((progress.step, loss))
    row = {"step": progress.step, "validation_loss": round(loss, 6), "seconds": round(time.perf_counter() - started, 3)}
    if progress.loss_count:
        row["training_loss"] = round(progress.loss_sum / progress.loss_count, 6)
    progress.loss_sum, progress.loss_count = 0.0, 0
    work.hooks.log({**row, **figures})
    if progress.step == 0:
        return  # the base's own loss: where the curve begins, not a checkpoint
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.validations_without_gain = loss, progress.step, 0
        progress.best_figures = figures
        keep_best(work)
        return
    progress.validations_without_gain += 1
    patience = work.settings.early_stopping_patience
    progress.stopped_early = bool(patience) and progress.validations_without_gain >= patience and progress.step < progress.planned_steps


def _mean_loss_in_memory(work: Work, give_up: Callable[[], bool]) -> float:
    while True:
        try:
            return mean_loss(work.model, work.validation, work.progress.at_once, objective=work.objective, give_up=give_up)
        except Exception as problem:
            if not is_out_of_memory(problem) or distributed.size() > 1:
                raise
            full = str(problem)[:200]
        work.objective.figures()
        split_smaller(work, work.validation, full)


def _is_due(work: Work) -> bool:
    """Whether a validation belongs after this step: before the first, `validations_per_epoch` times evenly, after the last."""
    step = work.progress.step
    share = work.settings.validations_per_epoch / -(-len(work.epoch[1]) // work.batch)
    return step in (0, work.progress.planned_steps) or int(step * share + 1e-9) > int((step - 1) * share + 1e-9)


def _save_or_stop(work: Work) -> bool:
    """Between two steps: save if it is due, leave if somebody asked. Returns whether the training is done."""
    progress, hooks = work.progress, work.hooks
    done = progress.stopped_early or progress.step >= progress.planned_steps
    if done and not work.validation and progress.best_step != progress.step:
        progress.best_step = progress.step
        keep_best(work)
    asked = hooks.stop()
    now = (progress.step, len(progress.validation_losses))
    every = work.settings.checkpoint_steps
    due = now[1] != work.saved[1] or done or asked is not None or work.saved[0] < 0
    due = due or (time.monotonic() - work.saved_at >= AUTO_CHECKPOINT_SECONDS if every == "auto" else progress.step % every == 0)
    terminated, interrupted, dues = distributed.total(float(asked == signal.SIGTERM), float(asked == signal.SIGINT), float(due))
    if dues and now != work.saved:
        save(work, must=done or asked is not None or work.saved[0] < 0)
    if terminated or interrupted:
        where = f"saved in {hooks.store.folder}" if hooks.store else "nothing is kept"
        number = signal.SIGTERM if terminated else signal.SIGINT
        raise Stopped(f"stopped after step {progress.step} of {progress.planned_steps}, {where}", int(number))
    return done


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
