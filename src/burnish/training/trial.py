"""One trial of a sweep: train with the loop and keep nothing of it on disk. Rows become tokens once, and the base model is read once where it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from burnish.models import METHODS, Chat, load_base, trainable_parameters
from burnish.recipe import Recipe
from burnish.training.items import Items, make_items, with_references
from burnish.training.loop import run_loop
from burnish.training.objective import make_objective
from burnish.training.progress import Batching, Hooks
from burnish.training.ready import equip, order_of, start_state, tokens_key
from burnish.training.sweep import Outcome, RunTrial
from burnish.types import Dataset, Tell, silent


def trial_runner(
    dataset: Dataset,
    chat: Chat,
    *,
    folder: Path,
    reference: Path,
    score: Callable[[Any, Recipe], float | None] | None = None,
    tell: Tell = silent,
) -> RunTrial:
    """What `sweep` calls for each trial. `score` (model with its best weights, recipe) → value; none: the best validation loss is the value.

    `folder` keeps the rows as tokens, `reference` what the base says of preference pairs. The data set must hold no test rows: what chooses between
    recipes must not see them.
    """
    if dataset.test:
        raise ValueError("a sweep is given the test rows; it must choose without them")
    base: Any = None
    known: Items | None = None

    def run(number: int, recipe: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        nonlocal base, known
        objective = make_objective(recipe)
        if known is None:
            known = make_items(objective, chat, dataset, folder=folder, key=tokens_key(recipe, dataset, chat), tell=tell)
        model, base = METHODS[recipe.training.method](load_base(recipe, tell) if base is None else base, recipe), None

        def told(what: str, done: int, total: int, detail: str) -> None:
            tell(f"trial {number}: {what}", done, total, detail)

        plan = equip(model, objective, known, recipe, tell=told)
        state = start_state(model, recipe)
        items = with_references(known, objective, model, cache=reference, state=state, at_once=plan.at_once, tell=told)
        best: dict[str, torch.Tensor] = {}
        batch = int(recipe.training.micro_batch_size) * recipe.training.gradient_accumulation_steps

        def log(row: dict[str, Any]) -> None:
            if row.get("validation_loss") is not None and row["step"] > 0:
                watch(row["step"] * batch, row["validation_loss"])

        def keep_best(step: int, loss: float | None) -> None:
            best.update({name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()})

        hooks = Hooks(log=log, keep_best=keep_best, tell=told)
        batching = Batching(at_once=plan.at_once, order=order_of(objective, items, recipe))
        try:
            progress = run_loop(
                model, items.mixed, items.validation, objective=objective, settings=recipe.training, seed=recipe.seed, hooks=hooks, batching=batching
            )  # fmt: skip
            value = progress.best_loss
            if score is not None:
                with torch.no_grad():
                    for name, parameter in trainable_parameters(model).items():
                        parameter.copy_(best[name])
                value = score(model.eval(), recipe)
        finally:
            # An adapter is taken off and the base is as it was read; weights that were trained themselves are read again.
            if isinstance(model, PeftModel) and recipe.training.method != "qlora":
                base = model.unload().requires_grad_(False).eval()
        facts = {"steps": progress.step, "best_step": progress.best_step, "validation_loss": progress.best_loss}
        return Outcome(value, facts={**facts, "base_validation_loss": progress.validation_losses[0][1]})

    return run
