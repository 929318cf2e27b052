"""Search over recipe keys: which values give the best model on the validation rows. Optuna proposes and prunes; the record is ours.

Every trial is a line in trials.jsonl, and a proposal is a pure function of the seed and the finished lines (`propose`): a sweep that was cut off
goes on with the trials it would have made anyway. The rows of the test split are no argument of anything here.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.errors import RecipeError, TrainingError, missing_extra
from burnish.models import LEARNING_RATES
from burnish.recipe import Recipe, build_recipe, explain, parse_value
from burnish.run import append_line, hash_of, read_lines
from burnish.types import Tell, silent

FIRST_TRIALS = 5  # drawn at random before the sampler (TPE, Bergstra et al. 2011) has something to learn from
UNPRUNED_TRIALS = 3  # whole trials that must be there before one is given up at the median of the others
MOST_TRIALS = 20  # where no budget is given
FINISHED = ("complete", "pruned", "diverged")
# Keys whose values decide which rows there are or what they are for: all trials share the prepared rows.
_FIXED = ("training.objective", "training.replay_data", "training.checkpoint_steps")


@dataclass(frozen=True, slots=True)
class Span:
    """From low to high; even steps of the logarithm where it spans a factor of ten; whole numbers stay whole."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high / self.low >= 10

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high and (not self.whole or value == int(value))

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}" + (" (log)" if self.logarithmic else "")


@dataclass(frozen=True, slots=True)
class Choice:
    values: tuple[Any, ...]

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return ",".join(map(str, self.values))


Space = Mapping[str, Span | Choice]


@dataclass(frozen=True, slots=True)
class Aim:
    """What is searched for. `validation_loss`: the lowest; anything else: the highest score on the validation rows."""

    objective: str = "validation_loss"
    trials: int | None = None
    seconds: float | None = None

    @property
    def direction(self) -> str:
        return "minimize" if self.objective == "validation_loss" else "maximize"

    @property
    def sign(self) -> float:
        return 1.0 if self.objective == "validation_loss" else -1.0


@dataclass(slots=True)
class Outcome:
    """What a whole trial brought: the value that is searched for, and numbers for its line."""

    value: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Pruned(Exception):
    """Raised inside a trial that is given up."""


# (trial's number, recipe, told (examples, validation loss) and may raise Pruned) → what it brought
RunTrial = Callable[[int, Recipe, Callable[[int, float], None]], Outcome]


# -------------------------------------------------------------------------------------------------------------- the space


def parse_space(asked: Sequence[str], recipe: Recipe) -> dict[str, Span | Choice]:
    """`KEY=LOW..HIGH` or `KEY=A,B,C` → the space. Raises RecipeError for unknown keys, values a recipe refuses, and keys that cannot be searched."""
    space: dict[str, Span | Choice] = {}
    for text in asked:
        key, separator, values = (part.strip() for part in text.partition("="))
        if not separator or not values:
            raise RecipeError(f"--over {text}: expected KEY=LOW..HIGH or KEY=A,B,C, for example --over training.learning_rate=1e-5..1e-3")
        explain(key)  # an unknown key: the error names the nearest
        if not key.startswith(("training.", "lora.")) or key in _FIXED:
            raise RecipeError(
                f"--over {key}: a sweep searches keys of `training` and `lora`; all its trials share the same model, rows and evaluation"
            )
        if key in space:
            raise RecipeError(f"--over {key}: given twice; keep one")
        space[key] = _span_or_choice(key, values)
        bounds = space[key]
        for value in (bounds.low, bounds.high) if isinstance(bounds, Span) else bounds.values:
            changed(recipe, {key: value})
    return space


def _span_or_choice(key: str, text: str) -> Span | Choice:
    low, dots, high = text.partition("..")
    if not dots:
        values = tuple(dict.fromkeys(parse_value(part) for part in text.split(",") if part.strip()))
        if len(values) < 2:
            raise RecipeError(f"--over {key}={text}: one value is nothing to choose from; give several, or set it with --set")
        return Choice(values)
    ends = [parse_value(end) for end in (low, high)]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) or not ends[0] < ends[1]:
        raise RecipeError(f"--over {key}={text}: expected two numbers, the lower one first")
    return Span(ends[0], ends[1])


def default_space(recipe: Recipe) -> dict[str, Span | Choice]:
    """What is worth searching where nothing is named: the rate around the method's usual one, and the adapter's rank."""
    usual = LEARNING_RATES[recipe.training.method]
    space: dict[str, Span | Choice] = {"training.learning_rate": Span(float(f"{usual / 10:.2g}"), float(f"{usual * 10:.2g}"))}
    if recipe.training.method != "full":
        space["lora.rank"] = Choice((4, 8, 16, 32))
    return space


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values. Raises RecipeError where it refuses one."""
    return build_recipe(recipe.to_dict(), overrides=[f"{key}={json.dumps(value)}" for key, value in values.items()], origin="sweep")


# ------------------------------------------------------------------------------------------------------------- the record


def read_trials(path: Path) -> list[dict[str, Any]]:
    """The last line of each trial, in order of their numbers."""
    rows = {row["trial"]: row for row in read_lines(path)} if path.exists() else {}
    return [rows[number] for number in sorted(rows)]


def close_cut_off(path: Path) -> list[dict[str, Any]]:
    """Mark the trial that was running when the process died as failed. Returns all trials."""
    for row in read_trials(path):
        if row["state"] == "running":
            append_line(path, {**row, "state": "failed", "reason": "cut off; the sweep goes on with the same values"}, sync=True)
    return read_trials(path)


def best_of(rows: Sequence[Mapping[str, Any]], aim: Aim) -> Mapping[str, Any] | None:
    """The best whole trial; the earlier of two that are equal."""
    whole = [row for row in rows if row["state"] == "complete"]
    return min(whole, key=lambda row: (aim.sign * row["value"], row["trial"]), default=None)


# ----------------------------------------------------------------------------------------------------------- Optuna's part


def propose(
    space: Space, rows: Sequence[Mapping[str, Any]], *, aim: Aim, seed: int, first: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Optuna's trial and the values to try next: a pure function of the finished rows. `first` (the recipe's own values) is tried first."""
    finished = [row for row in rows if row["state"] in FINISHED]
    with missing_extra("sweep", "`burnish sweep`", TrainingError):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(part) for key, part in space.items()}
    drawn = int(hash_of(seed, len(finished)), 16) % 2**32
    sampler = optuna.samplers.TPESampler(seed=drawn, n_startup_trials=FIRST_TRIALS)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS)
    study = optuna.create_study(sampler=sampler, pruner=pruner, direction=aim.direction)
    for row in finished:
        study.add_trial(_as_trial(row, distributions, aim))
    if not finished and all(first.get(key) in part for key, part in space.items()):
        study.enqueue_trial({key: first[key] for key in space})
    trial = study.ask(distributions)
    return trial, {key: _rounded(trial.params[key], part) for key, part in space.items()}


def _distribution(part: Span | Choice) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(part, Choice):
        return CategoricalDistribution(part.values)
    if part.whole:
        return IntDistribution(int(part.low), int(part.high), log=part.logarithmic)
    return FloatDistribution(float(part.low), float(part.high), log=part.logarithmic)


def _rounded(value: Any, part: Span | Choice) -> Any:
    """Three digits say all that a trial can know; the ends of the span stay inside."""
    if isinstance(part, Choice) or part.whole:
        return value
    return min(max(float(f"{value:.3g}"), part.low), part.high)


def _as_trial(row: Mapping[str, Any], distributions: Mapping[str, Any], aim: Aim) -> Any:
    from optuna.trial import TrialState, create_trial

    # A trial that diverged counts as pruned before its first validation: Optuna holds that for the worst.
    return create_trial(
        state=TrialState.COMPLETE if row["state"] == "complete" else TrialState.PRUNED,
        value=row["value"] if row["state"] == "complete" else None,
        params=dict(row["values"]),
        distributions=dict(distributions),
        intermediate_values={} if row["state"] == "diverged" else {int(at): aim.sign * loss for at, loss in row["losses"]},
    )


# ---------------------------------------------------------------------------------------------------------------- the loop


def sweep(path: Path, recipe: Recipe, space: Space, aim: Aim, *, run_trial: RunTrial, tell: Tell = silent) -> list[dict[str, Any]]:
    """Make trials until the budget is spent; append each to `path`. Returns all of them.

    Trials of earlier sessions count, in number and in time. A trial that is running when the time is up stops at its next validation, unless
    none is whole yet. Raises TrainingError where no trial came to its end.
    """
    rows = close_cut_off(path)
    own = recipe.to_dict()
    first = {key: _own_value(own, key, recipe) for key in space}
    while not _spent(rows, aim):
        trial, values = propose(space, rows, aim=aim, seed=recipe.seed, first=first)
        number = len(rows)
        tell("sweep", *_bar(rows, aim), f"trial {number}: " + ", ".join(f"{key.split('.')[-1]} {value}" for key, value in values.items()))
        append_line(path, {"trial": number, "state": "running", "values": values}, sync=True)
        row = _one(number, trial, values, recipe=recipe, aim=aim, rows=rows, run_trial=run_trial)
        append_line(path, row, sync=True)
        rows.append(row)
        best = best_of(rows, aim)
        said = f"trial {number}: {row['state']}" + (f" {row['value']:.4f}" if row["value"] is not None else f" ({row['reason']})")
        tell("sweep", *_bar(rows, aim), said + (f" · best {best['value']:.4f} (trial {best['trial']})" if best else ""))
    if best_of(rows, aim) is None:
        raise TrainingError(
            f"none of the {len(rows)} trials of the sweep came to its end ({rows[-1]['reason'] if rows else 'the budget is 0'}): "
            "lower the rates of the space or raise the budget"
        )
    return rows


def _one(
    number: int, trial: Any, values: dict[str, Any], *, recipe: Recipe, aim: Aim, rows: Sequence[Mapping[str, Any]], run_trial: RunTrial
) -> dict[str, Any]:
    """One trial's row."""
    started = time.monotonic()
    spent, whole = _seconds(rows), best_of(rows, aim) is not None
    losses: list[tuple[int, float]] = []

    def watch(examples: int, loss: float) -> None:
        losses.append((examples, loss))
        trial.report(aim.sign * loss, examples)
        if trial.should_prune():
            raise Pruned("worse than the median of the trials before it")
        if whole and aim.seconds is not None and spent + time.monotonic() - started > aim.seconds:
            raise Pruned("the time is up")

    row: dict[str, Any] = {"trial": number, "state": "complete", "values": values, "value": None, "reason": ""}
    facts: dict[str, Any] = {}
    try:
        outcome = run_trial(number, changed(recipe, values), watch)
        row["value"], facts = outcome.value, outcome.facts
        if outcome.value is None or not math.isfinite(outcome.value):
            row |= {"state": "diverged", "value": None, "reason": "no finite value on the validation rows"}
    except Pruned as stop:
        row |= {"state": "pruned", "reason": str(stop)}
    except TrainingError as problem:
        if "diverged" not in str(problem):
            raise
        row |= {"state": "diverged", "reason": str(problem)[:300]}
    return {**row, **facts, "losses": [list(pair) for pair in losses], "seconds": round(time.monotonic() - started, 3)}


def _own_value(content: Mapping[str, Any], key: str, recipe: Recipe) -> Any:
    section, name = key.split(".", 1)
    value = content[section][name]
    return LEARNING_RATES[recipe.training.method] if key == "training.learning_rate" and value == "auto" else value


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(row.get("seconds", 0.0)) for row in rows)


def _spent(rows: Sequence[Mapping[str, Any]], aim: Aim) -> bool:
    """Whether the budget is used up. In time: also where an ordinary trial would not fit into what is left."""
    finished = [row for row in rows if row["state"] in FINISHED]
    if aim.trials is not None and len(finished) >= aim.trials:
        return True
    if aim.seconds is None:
        return aim.trials is None and len(finished) >= MOST_TRIALS
    usual = statistics.median(row["seconds"] for row in finished) if finished else 0.0
    return _seconds(rows) + usual > aim.seconds


def _bar(rows: Sequence[Mapping[str, Any]], aim: Aim) -> tuple[int, int]:
    """(done, total) of the progress bar: seconds where only the time is limited, else trials."""
    if aim.trials is None and aim.seconds is not None:
        return min(int(_seconds(rows)), int(aim.seconds)), max(1, int(aim.seconds))
    return sum(row["state"] in FINISHED for row in rows), aim.trials or MOST_TRIALS
