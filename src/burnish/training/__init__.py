"""Dataset + model → Checkpoint.

in          a run with its data prepared, and a recipe whose `auto` values are numbers
out         run.adapter_folder: the best checkpoint in PEFT's format; training/metrics.jsonl and summary.json
invariant   the loss is divided by the target tokens counted; weights that are not finite are never saved; success needs proof

A training that was cut off goes on from its last whole checkpoint, and computes what it would have computed.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from burnish.errors import BurnishError, Stopped, TrainingError
from burnish.models import Chat, quantizer_facts, tokens_of, trainable_parameters, trained_hash, weights_hash
from burnish.recipe import Recipe
from burnish.run import Run, hash_of, recover_folder
from burnish.training import distributed
from burnish.training.checkpoint import Checkpoints, State, publish, save_adapter, weights_digest
from burnish.training.fingerprint import fingerprint_of, refuse_unchangeable
from burnish.training.interrupt import asked_to_stop
from burnish.training.items import make_items, with_references
from burnish.training.loop import run_loop
from burnish.training.loss import head_bytes
from burnish.training.measure import Shape, StepTimes, time_steps
from burnish.training.memory import MemoryParts, free_bytes_of
from burnish.training.metrics import Metrics
from burnish.training.objective import Objective, make_objective
from burnish.training.per_row import RowLosses, gradient_cosines, row_losses, train_items, validation_items
from burnish.training.progress import Batching, Hooks, Progress, planned_steps
from burnish.training.proof import prove
from burnish.training.rate import RangeTest, range_test
from burnish.training.ready import equip, order_of, rows_of, start_state, tokens_key
from burnish.training.recovery import memory_errors, peak_memory_bytes
from burnish.training.stages import (
    BASE,
    MEASURED_ROWS,
    Start,
    adopt,
    carries_on,
    drawn,
    judge_gate,
    load_state,
    measure_losses,
    start_model,
)
from burnish.training.sweep import Aim, Pruned, Space, best_of, changed, default_space, parse_space, read_trials, sweep
from burnish.training.trial import ShortTrainings, Trained, trial_runner
from burnish.types import Dataset, Example, Tell, Tokens, silent


@memory_errors()
def train(
    run: Run,
    dataset: Dataset,
    recipe: Recipe,
    chat: Chat,
    tell: Tell = silent,
    *,
    begin: Start = BASE,
    allow_change: Sequence[str] = (),
    note: Callable[..., None] = lambda **_: None,
) -> dict[str, Any]:
    """Train and keep the best checkpoint; go on where an earlier call was cut off. Returns the summary that is also in training/summary.json.

    `begin`: the recipe's base model with a fresh adapter, or what a stage before left. `allow_change` names conditions (recipe keys, `versions`) that may differ from those of the checkpoints. `note` keeps facts with the step's
    status. Raises TrainingError, RecipeError where the checkpoints are of another training, or Stopped after a signal, with everything saved.
    """
    began = time.monotonic()
    distributed.join()
    objective = make_objective(recipe)
    here = recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": distributed.local_device(recipe.model.device)})})
    key = tokens_key(recipe, dataset, chat)
    items = make_items(objective, chat, dataset, folder=run.tokens_folder, key=key, tell=tell)
    rows = rows_of(items, recipe)
    model = start_model(here, begin, tell)
    base_sha256 = weights_hash(recipe.model.name)
    facts = {"base_model": recipe.model.name, "base_sha256": base_sha256, "method": recipe.training.method, "seed": recipe.seed}
    plan = equip(model, objective, items, recipe, cache=(run.frozen_folder, hash_of(base_sha256, key)), tell=tell)
    initial = weights_digest(list(trainable_parameters(model).values()))
    state = start_state(model, recipe)
    items = with_references(items, objective, model, cache=run.reference_file, state=state, at_once=plan.at_once, tell=tell)
    fingerprint = fingerprint_of(
        recipe, dataset, chat, base_sha256=base_sha256, initial=initial, world_size=distributed.size(), quantizer=quantizer_facts(model).get("quantizer"),
        kernels=objective.paths.kernels.key if objective.paths.kernels else "",
    ) | ({"start": begin.sha256} if begin.sha256 else {})  # fmt: skip
    writes = distributed.rank() == 0
    event = _quietly(run.event) if writes else _ignore
    store = Checkpoints(run.checkpoints_folder, fingerprint, event=event, allowed=allow_change, tell=tell) if writes else None
    metrics = Metrics(run.metrics_file)

    def save_as(step: int, loss: float | None) -> None:
        if store is not None:
            save_adapter(model, chat, store.best(step), {**facts, "step": step, "validation_loss": loss})

    start = _begin(run, store, metrics, event, tell, note) if store is not None else None
    with asked_to_stop() as stop:
        hooks = Hooks(
            log=metrics.log if writes else _ignore,
            keep_best=save_as,
            tell=tell if writes else silent,
            describe=lambda chosen: ", ".join(dict.fromkeys(items.source(i) for i in chosen[:24])),
            store=store,
            flush=metrics.flush if writes else _ignore,
            rewind=(lambda progress: _rewind(metrics, progress, event)) if writes else _ignore,
            event=event,
            stop=stop,
        )
        # A checkpoint's own number, since rounding depends on it; fewer, where there is less memory now than there was then.
        at_once = plan.at_once if start is None else min(int(start.progress["at_once"]), max(plan.at_once, 1))
        if start is not None and at_once != start.progress["at_once"]:
            start.progress["at_once"] = at_once
            event("less_memory", at_once=at_once, bit_exact=False)
            tell("memory", 0, 0, f"{at_once} examples at once from here on, as memory asks for: the result is right, but not bit-exact")
        if start is not None and (cache := objective.paths.cache) is not None and cache.new:
            event("frozen_cache_lost", at_step=int(start.progress["step"]), bit_exact=False)
            tell(
                "frozen cache",
                0,
                0,
                "what was kept is gone (the machine was started anew?) and is computed again: right, but perhaps not bit-exact",
            )
        batching = Batching(at_once=at_once, order=order_of(objective, items, recipe))
        before = time.monotonic() - began
        try:
            progress = run_loop(
                model, items.mixed, items.validation, objective=objective, settings=recipe.training, seed=recipe.seed, hooks=hooks, start=start, batching=batching
            )  # fmt: skip
        except Stopped as stopped:
            if store is not None:
                _leave_usable(run, store, model, chat, facts)
            raise Stopped(f"{stopped}; the same command goes on from there", stopped.signal) from None
    if store is None:
        return {}
    proved_from = time.monotonic()
    manifest = _prove(store, model, chat, progress, objective=objective, base_sha256=base_sha256, items=items.validation or items.train)
    publish(store.best(progress.best_step), run.adapter_folder)
    base_loss = progress.validation_losses[0][1] if progress.validation_losses else None
    if base_loss is not None and progress.best_loss is not None and progress.best_loss >= base_loss:
        tell("no gain", 0, 0, f"the best validation loss, {progress.best_loss:.4f}, is not below the base model's, {base_loss:.4f}")
    seconds = before + progress.elapsed + time.monotonic() - proved_from
    summary = _summary(recipe, progress, model, manifest, rows=rows, seconds=seconds)
    summary |= {
        "loss_unit": objective.unit,
        "replay_rows": len(dataset.replay),
        "replayed_per_epoch": rows - len(items.train),
        "gradient_checkpointing": plan.checkpointing,
        "kept_bytes_per_token": plan.kept_bytes_per_token,
    }
    if (cache := objective.paths.cache) is not None:
        summary["frozen_layers_cached"] = cache.depth
        cache.close()
    run.write_json(run.training_file, summary)
    return summary


def assist() -> bool:
    """A process beside the first one of a training: wait for it; returns whether there is anything to do."""
    return distributed.join()


def dismiss() -> None:
    """Tell the processes beside this one that there is nothing to do."""
    distributed.join(work=False)


def several_processes() -> bool:
    return distributed.asked_size() > 1


def forget_checkpoints(run: Run) -> None:
    """Once a training is done, nothing goes on from its checkpoints."""
    shutil.rmtree(run.checkpoints_folder, ignore_errors=True)


def tokenize_all(chat: Chat, examples: Sequence[Example], recipe: Recipe | None = None) -> list[Tokens]:
    return [tokens for example in examples for tokens in tokens_of(chat, example, recipe)]


# ------------------------------------------------------------------------------------------------------------------ inside


def _begin(
    run: Run, store: Checkpoints, metrics: Metrics, event: Callable[..., None], tell: Tell, note: Callable[..., None]
) -> State | None:  # fmt: skip
    """The state to go on from; where there is none, a clean start."""
    recover_folder(run.adapter_folder)
    started = time.monotonic()
    state = store.newest()
    if state is None:
        forget_checkpoints(run)
        metrics.path.unlink(missing_ok=True)  # rows of a run that was cut off before its first checkpoint do not belong to this one
        return None
    step = int(state.progress["step"])
    event("resumed", at_step=step, seconds=round(time.monotonic() - started, 3))
    tell("going on", 0, 0, f"from the checkpoint of step {step}")
    note(resumes=[*state.progress["resumes"], step])
    return state


def _rewind(metrics: Metrics, progress: Progress, event: Callable[..., None]) -> None:
    if missing := metrics.rewind(progress.step, len(progress.validation_losses)):
        event("metrics_incomplete", at_step=progress.step, missing=missing)


def _leave_usable(run: Run, store: Checkpoints, model: Any, chat: Chat, facts: dict[str, Any]) -> None:
    """A training that was stopped leaves the best adapter so far (else the weights of now) where a finished one would."""
    step, best = store.position()
    if best:
        publish(store.best(best), run.adapter_folder)
    else:
        save_adapter(model, chat, run.adapter_folder, {**facts, "step": step, "validation_loss": None})


def _prove(
    store: Checkpoints, model: Any, chat: Chat, progress: Progress, *, objective: Objective, base_sha256: str, items: Sequence[Any]
) -> dict[str, Any]:
    """The planned steps are done, the weights changed, and what was saved works. Returns the adapter's manifest."""
    if progress.step < progress.planned_steps and not progress.stopped_early:
        raise TrainingError(f"only {progress.step} of {progress.planned_steps} planned steps were done. Repeat the command: it goes on")
    if weights_digest(list(trainable_parameters(model).values())) == progress.initial_digest:
        raise TrainingError("training changed no weight: the learning rate is too small for the compute type, or every step was skipped")
    return prove(
        model, chat, store.best(progress.best_step), base_sha256, objective=objective, items=items[:1], digest=progress.best_digest
    )  # fmt: skip


def _summary(recipe: Recipe, progress: Progress, model: Any, manifest: dict[str, Any], *, rows: int, seconds: float) -> dict[str, Any]:
    return {
        "method": recipe.training.method,
        "objective": recipe.training.objective,
        "layers": recipe.training.layers,
        "base_model": recipe.model.name,
        "base_sha256": manifest["base_sha256"],
        **quantizer_facts(model),
        "adapter_sha256": trained_hash(manifest),
        "steps": progress.step,
        "planned_steps": progress.planned_steps,
        "skipped_steps": progress.skipped_steps,
        "rollbacks": progress.rollbacks,
        "resumed_at_steps": progress.resumes,
        "epochs": round(progress.examples / rows, 3),
        "examples": progress.examples,
        "examples_at_once": progress.at_once,
        "processes": distributed.size(),
        "seconds": round(seconds, 2),
        "step_seconds": round(progress.seconds, 2),
        "tokens": progress.tokens,
        "target_tokens": progress.target_tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "examples_per_second": round(progress.examples / progress.seconds, 3),
        "base_validation_loss": progress.validation_losses[0][1] if progress.validation_losses else None,
        "best_step": progress.best_step or progress.step,
        "best_validation_loss": progress.best_loss,
        **{f"best_{name}": value for name, value in progress.best_figures.items()},
        "stopped_early": progress.stopped_early,
        "learning_rate": recipe.training.learning_rate,
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _quietly(event: Callable[..., None]) -> Callable[..., None]:
    """A disk that refuses an event must not end a training that it could go on with."""

    def tell_event(kind: str, **values: Any) -> None:
        with contextlib.suppress(OSError, BurnishError):
            event(kind, **values)

    return tell_event


def _ignore(*_: Any, **__: Any) -> None:
    """What a process does that writes nothing."""


__all__ = [
    "BASE", "MEASURED_ROWS", "Aim", "MemoryParts", "Pruned", "RangeTest", "RowLosses", "Shape", "ShortTrainings", "Space", "Start", "StepTimes",
    "Trained", "adopt", "assist", "best_of", "carries_on", "changed", "default_space", "dismiss", "drawn", "forget_checkpoints", "free_bytes_of",
    "gradient_cosines", "head_bytes", "judge_gate", "load_state", "measure_losses", "parse_space", "peak_memory_bytes", "planned_steps", "range_test",
    "read_trials", "refuse_unchangeable", "row_losses", "several_processes", "start_model", "sweep", "time_steps", "tokenize_all", "train",
    "train_items", "trial_runner", "validation_items",
]  # fmt: skip
