"""Dataset + model → Checkpoint.

in          a run with its data prepared, and a recipe whose `auto` values are numbers
out         run.adapter_folder: the best checkpoint in PEFT's format; training/metrics.jsonl and summary.json
invariant   the loss is divided by the target tokens counted; weights that are not finite are never saved; success needs proof
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from burnish.errors import TrainingError
from burnish.models import Chat, trainable_parameters, verify_adapter, weights_hash
from burnish.recipe import Recipe
from burnish.run import Run, append_line
from burnish.training.checkpoint import save_adapter
from burnish.training.loop import Hooks, peak_memory_bytes, run_loop
from burnish.training.rate import RangeTest, range_test
from burnish.training.stages import BASE, MEASURED_ROWS, Start, adopt, carries_on, drawn, judge_gate, measure_losses, merge, start_model
from burnish.training.sweep import Aim, Space, best_of, changed, default_space, parse_space, read_trials, sweep
from burnish.training.trial import trial_runner
from burnish.types import Dataset, Example, Tell, Tokens, silent


def train(run: Run, dataset: Dataset, recipe: Recipe, chat: Chat, tell: Tell = silent, *, start: Start = BASE) -> dict[str, Any]:
    """Train and keep the best checkpoint. Returns the summary that is also written to training/summary.json."""
    started = time.perf_counter()
    sequences, validation = tokenize_all(chat, dataset.train), tokenize_all(chat, dataset.validation)
    sources = [example.source for example in dataset.train for _ in chat.training_tokens(example)]
    model = start_model(recipe, start, tell)
    base_sha256 = weights_hash(recipe.model.name)
    before = _fingerprint(model)
    run.metrics_file.unlink(missing_ok=True)  # training starts at step 0: rows of a run that was cut off do not belong to it
    facts = {"base_model": recipe.model.name, "base_sha256": base_sha256, "method": recipe.training.method, "seed": recipe.seed}

    def keep_best(step: int, loss: float | None) -> None:
        save_adapter(model, chat, run.adapter_folder, {**facts, "step": step, "validation_loss": loss})

    hooks = Hooks(
        log=lambda row: append_line(run.metrics_file, row),
        keep_best=keep_best,
        tell=tell,
        describe=lambda chosen: ", ".join(sources[i] for i in chosen[:8]),
    )
    progress = run_loop(model, sequences, validation, settings=recipe.training, seed=recipe.seed, hooks=hooks)
    if _fingerprint(model) == before:
        raise TrainingError("training changed no weight: the learning rate is too small for the compute type, or every step was skipped")
    base_loss = progress.validation_losses[0][1] if progress.validation_losses else None
    if base_loss is not None and progress.best_loss is not None and progress.best_loss >= base_loss:
        tell("no gain", 0, 0, f"the best validation loss, {progress.best_loss:.4f}, is not below the base model's, {base_loss:.4f}")
    manifest = verify_adapter(run.adapter_folder, base_sha256)
    parameters = trainable_parameters(model)
    summary = {
        "method": recipe.training.method,
        "base_model": recipe.model.name,
        "base_sha256": base_sha256,
        "adapter_sha256": manifest["files"]["adapter_model.safetensors"]["sha256"],
        "steps": progress.step,
        "planned_steps": progress.planned_steps,
        "skipped_steps": progress.skipped_steps,
        "epochs": round(progress.examples / len(sequences), 3),
        "examples": progress.examples,
        "seconds": round(time.perf_counter() - started, 2),
        "step_seconds": round(progress.seconds, 2),
        "tokens": progress.tokens,
        "target_tokens": progress.target_tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "examples_per_second": round(progress.examples / progress.seconds, 3),
        "base_validation_loss": base_loss,
        "best_step": progress.best_step or progress.step,
        "best_validation_loss": progress.best_loss,
        "stopped_early": progress.stopped_early,
        "learning_rate": recipe.training.learning_rate,
        "trainable_parameters": sum(p.numel() for p in parameters.values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    run.write_json(run.training_file, summary)
    return summary


def tokenize_all(chat: Chat, examples: Sequence[Example]) -> list[Tokens]:
    return [tokens for example in examples for tokens in chat.training_tokens(example)]


def _fingerprint(model: Any) -> list[float]:
    return [float(parameter.detach().double().sum()) for parameter in trainable_parameters(model).values()]


__all__ = [
    "BASE", "MEASURED_ROWS", "Aim", "RangeTest", "Space", "Start", "adopt", "best_of", "carries_on", "changed", "default_space", "drawn", "judge_gate",
    "measure_losses", "merge", "parse_space", "range_test", "read_trials", "start_model", "sweep", "tokenize_all", "train", "trial_runner",
]  # fmt: skip
