"""Short trainings that leave nothing on the disk: the trials of a sweep, the points of a learning curve, the folds of `value`.

Rows become tokens once, and the base model is read once where it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel

from burnish.models import METHODS, Chat, load_base, trainable_parameters
from burnish.recipe import Recipe
from burnish.training.items import Items, make_items, only_rows, with_references
from burnish.training.loop import run_loop
from burnish.training.objective import Objective, make_objective
from burnish.training.progress import Batching, Hooks, Progress
from burnish.training.ready import equip, order_of, start_state, tokens_key
from burnish.training.sweep import Outcome, RunTrial
from burnish.types import Dataset, Tell, silent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Trained:
    """What a short training hands over before it is forgotten: the model with its best weights, in evaluation mode."""

    model: Any
    recipe: Recipe
    objective: Objective  # with the paths that this model takes
    items: Items  # of all rows, also those that were not trained on
    at_once: int
    progress: Progress | None  # None: untrained, a fresh adapter changes nothing

    def facts(self) -> dict[str, Any]:
        """Numbers for the training's line in a record."""
        if (done := self.progress) is None:
            return {}
        facts = {"steps": done.step, "best_step": done.best_step, "validation_loss": done.best_loss}
        return {**facts, "base_validation_loss": done.validation_losses[0][1] if done.validation_losses else None}


def _unwatched(step: int, loss: float) -> None:
    """The default of `watch`."""


class ShortTrainings:
    """Trainings on the rows of one data set, or on some of them.

    `folder` keeps the rows as tokens, `reference` what the base says of preference pairs. The data set must hold no test rows: what chooses between
    recipes or rows must not see them.
    """

    def __init__(self, dataset: Dataset, chat: Chat, *, folder: Path, reference: Path, tell: Tell = silent) -> None:
        if dataset.test:
            raise ValueError("a short training is given the test rows; what it decides must be decided without them")
        self.dataset, self.chat, self.folder, self.reference, self.tell = dataset, chat, folder, reference, tell
        self._base: Any = None
        self._items: Items | None = None

    def run(
        self, recipe: Recipe, after: Callable[[Trained], T], *, rows: Collection[int] | None = None, title: str = "training",
        watch: Callable[[int, float], None] = _unwatched,
    ) -> T:  # fmt: skip
        """Train on `rows` (places in dataset.train; None: all) and return what `after` makes of the model with its best weights.

        `watch` is told (step, validation loss) and may raise. Raises TrainingError where training diverges.
        """
        with _Turn(self, recipe, title) as turn:
            best: dict[str, torch.Tensor] = {}

            def log(row: dict[str, Any]) -> None:
                if row.get("validation_loss") is not None and row["step"] > 0:
                    watch(row["step"], row["validation_loss"])

            def keep_best(step: int, loss: float | None) -> None:
                best.update({name: parameter.detach().clone() for name, parameter in trainable_parameters(turn.model).items()})

            items = turn.items if rows is None else only_rows(turn.items, rows)
            batching = Batching(at_once=turn.at_once, order=order_of(turn.objective, items, recipe))
            hooks = Hooks(log=log, keep_best=keep_best, tell=turn.tell)
            progress = run_loop(
                turn.model, items.mixed, items.validation, objective=turn.objective, settings=recipe.training, seed=recipe.seed, hooks=hooks, batching=batching
            )  # fmt: skip
            with torch.no_grad():
                for name, parameter in trainable_parameters(turn.model).items():
                    parameter.copy_(best[name])
            return after(turn.trained(progress))

    def untrained(self, recipe: Recipe, after: Callable[[Trained], T], *, title: str = "base model") -> T:
        """What `after` makes of the model before its first step."""
        with _Turn(self, recipe, title) as turn:
            return after(turn.trained(None))


class _Turn:
    """One use of the shared base: a fresh adapter on it, and the base as it was read afterwards."""

    def __init__(self, owner: ShortTrainings, recipe: Recipe, title: str) -> None:
        self.owner, self.recipe, self.title = owner, recipe, title
        self.objective = make_objective(recipe)
        self.model: Any = None

    def tell(self, what: str, done: int, total: int, detail: str) -> None:
        self.owner.tell(f"{self.title}: {what}", done, total, detail)

    def __enter__(self) -> _Turn:
        owner, recipe = self.owner, self.recipe
        if owner._items is None:
            key = tokens_key(recipe, owner.dataset, owner.chat)
            owner._items = make_items(self.objective, owner.chat, owner.dataset, folder=owner.folder, key=key, tell=owner.tell)
        base, owner._base = owner._base, None
        self.model = METHODS[recipe.training.method](load_base(recipe, owner.tell) if base is None else base, recipe)
        try:
            plan = equip(self.model, self.objective, owner._items, recipe, tell=self.tell)
            self.at_once, state = plan.at_once, start_state(self.model, recipe)
            self.items = with_references(
                owner._items, self.objective, self.model, cache=owner.reference, state=state, at_once=plan.at_once, tell=self.tell
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def trained(self, progress: Progress | None) -> Trained:
        return Trained(self.model.eval(), self.recipe, self.objective, self.items, self.at_once, progress)

    def __exit__(self, *_: object) -> None:
        # An adapter is taken off and the base is as it was read; weights that were trained themselves are read again.
        if isinstance(self.model, PeftModel) and self.recipe.training.method != "qlora":
            self.owner._base = self.model.unload().requires_grad_(False).eval()
        self.model = None


def trial_runner(
    dataset: Dataset,
    chat: Chat,
    *,
    folder: Path,
    reference: Path,
    score: Callable[[Any, Recipe], float | None] | None = None,
    tell: Tell = silent,
) -> RunTrial:
    """What `sweep` calls for each trial. `score` (model with its best weights, recipe) → value; none: the best validation loss is the value."""
    trainings = ShortTrainings(dataset, chat, folder=folder, reference=reference, tell=tell)

    def run(number: int, recipe: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        batch = int(recipe.training.micro_batch_size) * recipe.training.gradient_accumulation_steps

        def outcome(trained: Trained) -> Outcome:
            facts = trained.facts()
            return Outcome(facts["validation_loss"] if score is None else score(trained.model, recipe), facts)

        return trainings.run(recipe, outcome, title=f"trial {number}", watch=lambda step, loss: watch(step * batch, loss))

    return run
