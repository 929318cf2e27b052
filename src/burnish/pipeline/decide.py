"""`burnish decide`: measure what needs no training, try a short training, and say whether to fine-tune. Nothing here looks at a number before its rule."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from typing import Any

from burnish import advice, evaluation, report, training
from burnish.advice import OF_USE
from burnish.errors import RecipeError
from burnish.evaluation import CANDIDATES
from burnish.models import Chat, load_chat
from burnish.pipeline.chain import train
from burnish.pipeline.steps import evaluate, prepare, task_of
from burnish.recipe import Recipe
from burnish.run import Run, hash_of
from burnish.types import Dataset, Tell, silent

LEAST_PROBE_STEPS = 20  # a shorter training says nothing


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody who asks for a decision may say."""

    budget_seconds: float = 1200.0  # for all of it; the probe gets what is left
    target: float | None = None  # a score that is enough
    of_use: float = OF_USE  # a score that cannot reach this is of no use


def decide(job: Run, *, wish: Wish | None = None, tell: Tell = silent) -> dict[str, Any]:
    """Returns what decision.json holds. Goes on where an earlier call was cut off: answers and trainings that are there are not made again."""
    wish, began = wish or Wish(), time.monotonic()
    if job.recipe_as_asked().training.objective == "text":
        raise RecipeError("decide compares answers; plain text has none: `burnish run` measures its bits per byte before and after")
    chat = load_chat(job.recipe_as_asked().model, tell)
    dataset = prepare(job, chat=chat, tell=tell)
    recipe = job.recipe()
    evaluate(job, trained=False, dataset=dataset, chat=chat, tell=tell)
    tried = _trained_already(job) or _probe(job, dataset, chat, wish.budget_seconds - (time.monotonic() - began), tell)
    place, facts = (job, None) if tried is None else tried
    measured = place.recipe() if tried is not None else _untrained(recipe)
    weighed = evaluation.weigh(place, measured, task_of(recipe, dataset), dataset, tell)
    found, rules = advice.decide(
        weighed, probe=facts, target=wish.target, of_use=wish.of_use, price_per_hour=recipe.evaluation.price_per_hour
    )
    content = {
        **dataclasses.asdict(found),
        "wish": dataclasses.asdict(wish),
        "probe": facts,
        "rules": rules,
        "selection": job.read_json(job.selection_file).get("ways") if job.selection_file.exists() else None,
        **weighed,
    }
    job.write_json(job.decision_file, content)
    report.decision_report(job)
    return dict(job.read_json(job.decision_file))


def _untrained(recipe: Recipe) -> Recipe:
    names = [name for name in recipe.evaluation.candidates if not CANDIDATES[name].trained]
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"candidates": names})})


def _trained_already(job: Run) -> tuple[Run, dict[str, Any]] | None:
    """A run that is trained and evaluated needs no probe: it is the best evidence itself."""
    steps = job.status()["steps"]
    if any(steps.get(step, {}).get("state") != "done" for step in ("train", "evaluate")):
        return None
    return job, _facts(job, job.read_json(job.training_file), None)


def _probe(job: Run, dataset: Dataset, chat: Chat, seconds: float, tell: Tell) -> tuple[Run, dict[str, Any]] | None:
    """A short training in a run of its own, on the same rows, judged on the same test rows; None where the time does not suffice for one."""
    names = [name for name in job.recipe().evaluation.candidates if CANDIDATES[name].trained]
    plan = _plan(job, dataset, chat, seconds, tell) if names else None
    if plan is None or plan["steps"] < min(LEAST_PROBE_STEPS, plan["planned_steps"]):
        tell(
            "no probe",
            0,
            0,
            "no trained candidate is asked for" if plan is None else f"{max(0, plan['steps'])} steps are left of the budget",
        )
        return None
    asked = job.recipe_as_asked()
    whole = plan["steps"] >= plan["planned_steps"]
    recipe = asked if whole else asked.model_copy(update={"training": asked.training.model_copy(update={"max_steps": plan["steps"]})})
    stale = job.probe_folder.exists() and Run(job.probe_folder).recipe_file.exists() and Run(job.probe_folder).recipe_as_asked() != recipe
    with Run.working(job.probe_folder, recipe, fresh=stale) as place:
        rows = prepare(place, chat=chat, tell=_titled(tell))
        _hand_on_answers(job, place)
        evaluate(place, trained=False, dataset=rows, chat=chat, tell=_titled(tell))
        train(place, dataset=rows, chat=chat, tell=_titled(tell))
        evaluate(place, trained=True, dataset=rows, chat=chat, tell=_titled(tell))
    return place, _facts(place, place.read_json(place.training_file), plan)


def _plan(job: Run, dataset: Dataset, chat: Chat, seconds: float, tell: Tell) -> dict[str, Any]:
    """How many steps fit into the time, by a few real steps; written down, so that a call that was cut off goes on with the same number."""
    recipe = job.recipe()
    key = hash_of(recipe.to_dict(), [dataset.manifest["splits"][split]["file_sha256"] for split in ("train", "validation")])
    if (
        job.probe_file.exists()
        and (found := job.read_json(job.probe_file))["key"] == key
        and found["steps"] >= min(LEAST_PROBE_STEPS, found["planned_steps"])
    ):
        return dict(found)
    times = training.time_steps(dataset, chat, recipe, folder=job.tokens_folder, tell=tell)
    fixed = times.training_seconds - times.steps * times.seconds_per_step + _answer_seconds(job, dataset)
    steps = int((seconds - fixed) / times.seconds_per_step)
    plan = {
        "key": key,
        "steps": max(0, min(steps, times.steps)),
        "planned_steps": times.steps,
        "seconds_per_step": round(times.seconds_per_step, 4),
        "planned_seconds": round(times.training_seconds, 1),
        "memory_bytes": times.memory.total,
    }
    job.write_json(job.probe_file, plan)
    return plan


def _answer_seconds(job: Run, dataset: Dataset) -> float:
    """What answering the test rows will take: as long as the zero-shot base took, which reads as much and seldom stops sooner."""
    per_second = evaluation.rows_per_second(job.predictions_file("base")) if job.predictions_file("base").exists() else None
    return len(dataset.test) / per_second if per_second else 0.0


def _hand_on_answers(job: Run, place: Run) -> None:
    """What the run has measured is not measured again."""
    for path in [
        job.selection_file,
        *(job.predictions_file(name) for name in job.recipe().evaluation.candidates if not CANDIDATES[name].trained),
    ]:
        target = place.path / path.relative_to(job.path)
        if path.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _facts(place: Run, summary: dict[str, Any], plan: dict[str, Any] | None) -> dict[str, Any]:
    planned_steps = summary["planned_steps"] if plan is None else plan["planned_steps"]
    epochs = float(place.recipe().training.epochs)
    return {
        "steps": summary["steps"],
        "planned_steps": planned_steps,
        "whole": plan is None or summary["planned_steps"] >= planned_steps,
        "epochs": summary["epochs"],
        "planned_epochs": epochs,
        "seconds": summary["seconds"],
        "planned_seconds": summary["seconds"] if plan is None else plan["planned_seconds"],
        "memory_bytes": summary["peak_memory_bytes"],
        "base_validation_loss": summary["base_validation_loss"],
        "best_validation_loss": summary["best_validation_loss"],
        "folder": None if plan is None else place.path.name,
    }


def _titled(tell: Tell) -> Tell:
    return lambda what, done, total, detail: tell(f"probe: {what}", done, total, detail)
