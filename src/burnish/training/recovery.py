"""What keeps a training alive: saving, going on from a checkpoint, rolling back, smaller parts where memory ends, a full disk."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from burnish.errors import TrainingError
from burnish.training import distributed
from burnish.training.checkpoint import State, weights_digest
from burnish.training.progress import Diverged, Progress, Work
from burnish.training.step import follow, free_memory, is_out_of_memory, load_tensors, share_state, state_of

_DISK = ("insufficient_storage", "unwritable")


def restore(work: Work, state: State) -> None:
    """Be where a checkpoint was. The plan is made anew: a number of epochs may have been changed on purpose."""
    planned = work.progress.planned_steps
    work.progress = Progress.of(state.progress)
    work.progress.planned_steps = planned
    work.progress.at_once = min(work.progress.at_once, -(-work.batch // distributed.size()))
    try:
        load_tensors(state, dict(zip(work.names, work.masters, strict=True)), work.optimizer)
    except ValueError as problem:
        raise TrainingError(f"the checkpoint of step {work.progress.step} does not fit this model: {problem}") from problem
    follow(work.parameters, work.masters)
    work.unsaved_best = None
    work.saved = (work.progress.step, len(work.progress.validation_losses))
    work.began = work.saved_at = time.monotonic()
    work.began -= work.progress.elapsed


def items_at(work: Work, epoch: int, place: int) -> list[int]:
    """The items of the step at a position."""
    if work.epoch[0] != epoch:
        work.epoch = (epoch, work.order(epoch))
    found = [int(index) for index in work.epoch[1][place : place + work.batch]]
    if not found:
        raise TrainingError(
            f"the position of the checkpoint (epoch {epoch}, place {place}) lies behind the rows there are: start anew with --fresh"
        )
    return found


def split_smaller(work: Work, items: Sequence[Any], problem: str) -> None:
    """Halve what is computed at once; examples per step stay what they are."""
    free_memory(work.parameters)
    progress, before = work.progress, work.progress.at_once
    if before <= 1:
        longest = max((work.objective.length(item) for item in items), default=0)
        raise TrainingError(
            f"out_of_memory: step {progress.step + 1} does not fit with one example at a time (the longest has {longest} tokens; "
            f"{peak_memory_bytes() / 1e9:.1f} GB were in use at the most): {problem}. Lower data.max_length or lora.rank, or take a smaller model",
            code="out_of_memory",
        )
    progress.at_once = -(-before // 2)
    work.hooks.event("out_of_memory", at_step=progress.step + 1, at_once_before=before, at_once=progress.at_once, reason=problem)
    work.hooks.tell(
        "out of memory", 0, 0, f"{before} examples at once did not fit: {progress.at_once} from here on; a step stays what it is"
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Memory that ends where nothing can be split (a model being read, a checkpoint, the proof) as an error with numbers."""
    try:
        yield
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        raise TrainingError(
            f"out_of_memory: {str(problem)[:200] or type(problem).__name__}; {peak_memory_bytes() / 1e9:.1f} GB were in use at the most. Free memory, lower "
            "data.max_length or lora.rank, or take a smaller model; what was saved is kept, and the same command goes on from there",
            code="out_of_memory",
        ) from problem


def keep_best(work: Work) -> None:
    """Save the weights as the best so far; while the disk refuses them, remember them."""
    work.unsaved_best = None
    work.progress.best_digest = weights_digest(work.parameters)
    try:
        work.hooks.keep_best(work.progress.best_step, work.progress.best_loss)
    except TrainingError as problem:
        if problem.code not in _DISK:
            raise
        work.unsaved_best = [master.clone() for master in work.masters]
        _tell_unsaved(work, problem)


def save(work: Work, *, must: bool) -> None:
    """Write a checkpoint. A disk that refuses it does not end the training unless it must be written: the next one is tried again."""
    progress, hooks, store = work.progress, work.hooks, work.hooks.store
    if not all(bool(torch.isfinite(master).all()) for master in work.masters):
        raise Diverged(f"the weights after step {progress.step} are not finite")
    progress.elapsed = time.monotonic() - work.began
    work.saved_at = time.monotonic()
    if store is None and work.unsaved_best is None:
        work.saved = (progress.step, len(progress.validation_losses))
        return
    for attempt in (1, 2):
        try:
            if work.unsaved_best is not None:
                _save_unsaved_best(work)
            hooks.flush()
            if store is not None:
                store.save(state_of(asdict(progress), dict(zip(work.names, work.masters, strict=True)), work.optimizer))
            work.saved = (progress.step, len(progress.validation_losses))
            return
        except TrainingError as problem:
            if problem.code not in _DISK or (must and attempt == 2):
                raise
            if attempt == 2:
                _tell_unsaved(work, problem)
            elif store is not None:
                store.prune(keep=1, best_step=progress.best_step)  # the newest whole one stays


def _save_unsaved_best(work: Work) -> None:
    assert work.unsaved_best is not None
    now = [master.clone() for master in work.masters]
    try:
        _put(work, work.unsaved_best)
        work.hooks.keep_best(work.progress.best_step, work.progress.best_loss)
    finally:
        _put(work, now)
    work.unsaved_best = None


def _put(work: Work, weights: Sequence[Tensor]) -> None:
    for master, weight in zip(work.masters, weights, strict=True):
        master.copy_(weight)
    follow(work.parameters, work.masters)


def _tell_unsaved(work: Work, problem: TrainingError) -> None:
    work.hooks.event("checkpoint_not_written", at_step=work.progress.step, code=problem.code, reason=problem.message[:300])
    work.hooks.tell("checkpoint not written", 0, 0, f"{problem.message}. Training goes on; the next checkpoint is tried again")


def roll_back(work: Work, problem: Diverged) -> None:
    """Go back to the last checkpoint, once, and leave out the steps that were not finite; raises TrainingError where that was done already."""
    progress, hooks = work.progress, work.hooks
    bad = list(progress.not_finite)
    suspects = [index for position in bad for index in items_at(work, *position)]
    rows = f" in {hooks.describe(_culprits(work, suspects))}" if suspects else ""
    state = None
    if not progress.rollbacks and distributed.share(hooks.store is not None):
        state = share_state(hooks.store.newest() if hooks.store is not None else None)
    if state is None:
        again = (
            " again, after the training had gone back to a checkpoint and left out the steps that were not finite"
            if progress.rollbacks
            else ""
        )
        raise TrainingError(
            f"diverged: {problem}{again}{rows}. Lower training.learning_rate" + (" or look at these rows" if rows else ""), code="diverged"
        ) from problem
    from_step = progress.step
    restore(work, state)
    work.progress.rollbacks += 1
    work.progress.avoid = sorted({*work.progress.avoid, *bad})
    work.progress.not_finite = []
    hooks.rewind(work.progress)
    hooks.event("rolled_back", from_step=from_step, to_step=work.progress.step, reason=str(problem), rows=rows.strip())
    hooks.tell("rolled back", 0, 0, f"{problem}{rows}: back to step {work.progress.step}; these steps are left out")


def _culprits(work: Work, indices: list[int]) -> list[int]:
    """Those items whose own loss is not finite; all, where none or every one is."""
    work.model.eval()
    found = [index for index in dict.fromkeys(indices) if not math.isfinite(work.objective.summed(work.model, [work.train[index]]))]
    return found or indices


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far (on a GPU: of its allocator)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
