"""`burnish curve`: short trainings on nested parts of the training rows, judged on validation rows. The test rows are never read."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from burnish import advice, report, training
from burnish.advice.curve import to_json
from burnish.errors import DataError, RecipeError, TrainingError
from burnish.models import base_state, load_chat
from burnish.pipeline.judged import Judge, metric_for, seeded
from burnish.pipeline.steps import prepare_once, rows_of, task_of, with_rate
from burnish.recipe import Recipe
from burnish.run import Run, append_line, hash_of, read_lines
from burnish.training import Pruned, ShortTrainings
from burnish.types import Dataset, Tell, silent

LEAST_ROWS = 4  # of the smallest part: with fewer, it is chance which rows they are


@dataclass(frozen=True, slots=True)
class CurvePlan:
    """What is trained. The points are made seed by seed, the small sizes first: what a budget cuts off is the repetition, not a size."""

    fractions: tuple[float, ...] = advice.FRACTIONS
    seeds: int = 3
    equal: str = (
        "epochs"  # each size sees its rows as often (as `burnish run` would) · steps: each size gets as many updates as all rows do
    )
    objective: str = "auto"
    seconds: float | None = None  # all sessions together

    def __post_init__(self) -> None:
        if self.equal not in ("epochs", "steps"):
            raise RecipeError(f"--equal {self.equal}: expected epochs or steps")
        if self.seeds < 1:
            raise RecipeError(f"--seeds {self.seeds}: expected 1 or more; an interval needs 2, and 3 make it a good one")
        if not self.fractions or any(not 0 < fraction <= 1 for fraction in self.fractions):
            raise RecipeError(f"--at {','.join(f'{100 * f:g}' for f in self.fractions)}: expected per cents above 0 and at most 100")


@dataclass(frozen=True, slots=True)
class _Part:
    """One training that is wanted."""

    fraction: float
    number: int  # of the seed, from 0
    places: tuple[int, ...]  # in dataset.train

    def is_row(self, row: Mapping[str, Any]) -> bool:
        return (row["fraction"], row["seed"]) == (self.fraction, self.number)

    def __str__(self) -> str:
        return f"{len(self.places)} rows, seed {self.number}"


def curve(job: Run, *, plan: CurvePlan | None = None, tell: Tell = silent) -> dict[str, Any]:
    """Train on nested parts of the rows until the plan or its budget is done; answer what twice the rows would bring, or that it cannot be told.

    Goes on where an earlier call was cut off. Returns what curve.json holds.
    """
    asked, plan = job.recipe_as_asked(), plan or CurvePlan()
    if asked.stages:
        raise RecipeError("a curve is about one training: give it the recipe of one stage, without `stages:`")
    chat = load_chat(asked.model, tell)
    prepare_once(job, chat=chat, tell=tell)
    dataset = rows_of(job, without=("test",))
    detected = "" if asked.training.objective == "text" else task_of(job.recipe(), dataset).metric
    metric = metric_for(plan.objective, asked, detected)
    content = {
        "key": hash_of(asked.to_dict(), [part["file_sha256"] for split, part in dataset.manifest["splits"].items() if split != "test"], base_state(asked)),
        "objective": "validation_loss" if metric is None else metric.name,
        "equal": plan.equal,
        "rows": {split: len(getattr(dataset, split)) for split in ("train", "validation")},
    }  # fmt: skip
    _refuse_another(job, content)
    parts = list(_parts(dataset, plan, asked.seed))
    if not job.curve_points_file.exists():
        job.write_json(job.curve_file, content)
    recipe = with_rate(job, dataset, chat, tell=tell)
    judge = Judge(dataset, chat, metric, tell)
    trainings = ShortTrainings(dataset, chat, folder=job.tokens_folder, reference=job.reference_file, tell=tell)
    _measure_all(job.curve_points_file, parts, trainings, judge, recipe, plan, tell)
    rows = [row for row in read_points(job.curve_points_file) if any(part.is_row(row) for part in parts)]
    return _finish(job, content, parts, rows, judge, recipe, plan)


def read_points(path: Path) -> list[dict[str, Any]]:
    """The last word of each training that came to an end, in the order of the lines."""
    ended = {(row["fraction"], row["seed"]): row for row in (read_lines(path) if path.exists() else ()) if row["state"] != "running"}
    return list(ended.values())


def _parts(dataset: Dataset, plan: CurvePlan, seed: int) -> Iterator[_Part]:
    """Seed by seed, small sizes first. Another seed draws other rows for the smaller sizes, and trains in another order."""
    groups = [example.group for example in dataset.train]
    for number in range(plan.seeds):
        sets = advice.nested(groups, plan.fractions, seed + number)
        seen: set[int] = set()
        for fraction, places in sets.items():
            if len(places) < LEAST_ROWS or len(places) in seen:
                if number == 0 and len(places) < LEAST_ROWS:
                    raise DataError(
                        f"{100 * fraction:g} % of {len(groups)} training rows are {len(places)}, fewer than {LEAST_ROWS}: "
                        "collect more rows, or choose larger parts with --at"
                    )
                continue
            seen.add(len(places))
            yield _Part(fraction, number, tuple(places))


def _measure_all(
    path: Path, parts: Sequence[_Part], trainings: ShortTrainings, judge: Judge, recipe: Recipe, plan: CurvePlan, tell: Tell
) -> None:  # fmt: skip
    for index, part in enumerate(parts):
        rows = read_points(path)
        if any(part.is_row(row) and row["state"] in ("complete", "diverged") for row in rows):
            continue
        tell("curve", index, len(parts), str(part))
        spent = sum(row.get("seconds", 0.0) for row in rows)
        if plan.seconds is not None and rows and spent + _expected(part, rows, plan) > plan.seconds:
            continue
        append_line(path, {"fraction": part.fraction, "seed": part.number, "state": "running"}, sync=True)
        left = None if plan.seconds is None or not rows else plan.seconds - spent
        row = _one(part, trainings, judge, recipe, plan, left)
        append_line(path, row, sync=True)
        said = f"{row['state']} {row['value']:.4f}" if row["value"] is not None else f"{row['state']} ({row['reason']})"
        tell("curve", index + 1, len(parts), f"{part}: {said}")


def _expected(part: _Part, rows: Sequence[Mapping[str, Any]], plan: CurvePlan) -> float:
    """Seconds that the part will take, from the trainings so far: the same size if there is one, else in proportion to the rows, but never less
    than the quickest so far."""
    times = [(row["rows"], row["seconds"]) for row in rows if row["state"] == "complete"]
    if not times:
        return 0.0
    own = [seconds for count, seconds in times if count == len(part.places)]
    if own:
        return float(sum(own) / len(own))
    nearest, seconds = min(times, key=lambda time: abs(time[0] - len(part.places)))
    scale = len(part.places) / nearest if plan.equal == "epochs" else 1.0
    return float(max(min(took for _, took in times), seconds * scale))


def _one(
    part: _Part, trainings: ShortTrainings, judge: Judge, recipe: Recipe, plan: CurvePlan, left: float | None
) -> dict[str, Any]:  # fmt: skip
    """One training's line."""
    started = time.monotonic()

    def watch(step: int, loss: float) -> None:
        if left is not None and time.monotonic() - started > left:
            raise Pruned("the time is up")

    row: dict[str, Any] = {
        "fraction": part.fraction,
        "seed": part.number,
        "rows": len(part.places),
        "state": "complete",
        "value": None,
        "reason": "",
    }
    facts: dict[str, Any] = {}
    try:
        own = seeded(_budgeted(recipe, trainings.dataset, len(part.places), plan), part.number)
        facts = trainings.run(
            own, lambda trained: {**trained.facts(), **judge.measure(trained)}, rows=part.places, title=str(part), watch=watch
        )
    except Pruned as stop:
        row |= {"state": "cut off", "reason": str(stop)}
    except TrainingError as problem:
        if "diverged" not in str(problem):
            raise
        row |= {"state": "diverged", "reason": str(problem)[:300]}
    return {**row, **facts, "seconds": round(time.monotonic() - started, 3)}


def _budgeted(recipe: Recipe, dataset: Dataset, rows: int, plan: CurvePlan) -> Recipe:
    """With equal steps: as many updates, and as many validations, as all rows get; a smaller part is passed more often.

    Replayed rows, and rows that become several sequences, make epochs longer; the number of updates is what stays."""
    if plan.equal == "epochs":
        return recipe
    settings = recipe.training
    batch = int(settings.micro_batch_size) * settings.gradient_accumulation_steps
    steps = training.planned_steps(len(dataset.train), settings)
    per_epoch = -(-rows // batch)
    whole_epochs = steps / -(-len(dataset.train) // batch)
    epochs = steps / per_epoch
    # A share of a validation per epoch is meant here, and more than 100 epochs may be: neither is a value that a recipe would take.
    update = {"epochs": epochs, "max_steps": steps, "validations_per_epoch": settings.validations_per_epoch * whole_epochs / epochs}
    return recipe.model_copy(update={"training": settings.model_copy(update=update)})


def _refuse_another(job: Run, content: dict[str, Any]) -> None:
    """Points of other rows, another measure or another length of training do not lie on one curve."""
    if not job.curve_points_file.exists():
        return
    before = job.read_json(job.curve_file)
    differ = [f"{name}: {before.get(name)} → {content[name]}" for name in ("objective", "equal") if before.get(name) != content[name]]
    if before.get("key") != content["key"] or differ:
        raise RecipeError(
            f"{job.path} holds a curve with other {'settings (' + '; '.join(differ) + ')' if differ else 'rows or weights'}. "
            "Choose another --run, or --fresh to start it anew and delete what is there"
        )


# ------------------------------------------------------------------------------------------------------------ the answer


def _finish(
    job: Run, content: dict[str, Any], parts: Sequence[_Part], rows: list[dict[str, Any]], judge: Judge, recipe: Recipe, plan: CurvePlan
) -> dict[str, Any]:
    done = [row for row in rows if row["state"] == "complete"]
    # Whole groups come near a fraction, not always equally near: a size is what its trainings had on average.
    sizes = {
        fraction: round(mean(row["rows"] for row in done if row["fraction"] == fraction)) for fraction in {row["fraction"] for row in done}
    }
    confidence = recipe.evaluation.confidence
    drawn = judge.draw(done, seed=recipe.seed) if done else None
    answer = to_json(
        advice.answer_curve(
            [sizes[row["fraction"]] for row in done], [row["value"] for row in done], drawn if drawn is not None else [],  # type: ignore[arg-type]
            lower_is_better=judge.lower_is_better, confidence=confidence, seed=recipe.seed,
        )
    )  # fmt: skip
    missing = [
        {"fraction": part.fraction, "rows": len(part.places), "seed": part.number, "reason": _why_missing(part, rows)}
        for part in parts
        if not any(part.is_row(row) for row in done)
    ]
    content |= {
        **answer,
        "metric_title": judge.title,
        "lower_is_better": judge.lower_is_better,
        "confidence": confidence,
        "plan": {**asdict(plan), "fractions": list(plan.fractions)},
        "points": [{key: value for key, value in row.items() if key not in ("sums", "counts", "answers")} for row in done],
        "missing": missing,
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 1),
    }
    content["sentence"] = sentence(content)
    job.write_json(job.curve_file, content)
    report.curve_report(job)
    return content


def _why_missing(part: _Part, rows: Sequence[Mapping[str, Any]]) -> str:
    return next((f"{row['state']}: {row['reason']}" for row in rows if part.is_row(row)), "the budget was spent")


def sentence(content: Mapping[str, Any]) -> str:
    """The answer as a person would say it, with its numbers, or why there is none."""
    points = content["points"]
    largest = max((point["rows"] for point in points), default=0)
    gone = f" {len(content['missing'])} of {len(content['missing']) + len(points)} trainings are missing." if content["missing"] else ""
    if content["gain"] is None:
        return f"Can't tell what more data would bring: {'; '.join(content['reasons'])}.{gone}"
    low, high = content["low"], content["high"]
    if content["lower_is_better"]:
        worth = f"{content['gain']:+.3f} [{low:+.3f}, {high:+.3f}] nats per token less validation loss"
    else:
        worth = f"{100 * content['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points ({content['metric_title']})"
    sizes = sorted({point["rows"] for point in points})
    measured = f"by {len(points)} trainings on {sizes[0]} to {largest} rows"
    if not content["trustworthy"]:
        return f"Not trustworthy: {'; '.join(content['reasons'])}. The curve would say that doubling your data is worth {worth}, {measured}.{gone}"
    checked = "" if content["held_out"] is not None else "; with three sizes, the largest could not be held out to check it"
    nothing = " That may be nothing." if low <= 0 else ""
    return f"Doubling your data ({largest} → {2 * largest} rows) is worth {worth}, {measured}{checked}.{nothing}{gone}"
