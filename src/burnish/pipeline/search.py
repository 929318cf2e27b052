"""`burnish sweep`: many short trainings on the prepared rows, judged on validation rows. The test rows are split off and then never read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from burnish import evaluation, report, training
from burnish.errors import RecipeError
from burnish.models import Chat, base_state, load_chat
from burnish.pipeline.steps import prepare_once, rows_of, task_of, with_rate
from burnish.recipe import Recipe, dump_recipe, load_recipe
from burnish.run import Run, hash_of
from burnish.tasks import find_metric
from burnish.training import Aim
from burnish.types import Dataset, Tell, silent


def sweep(job: Run, *, over: Sequence[str] = (), aim: Aim | None = None, tell: Tell = silent) -> dict[str, Any]:
    """Search recipe keys (`over`: KEY=LOW..HIGH or KEY=A,B,C) until the budget is spent; write the winner as a recipe and a page.

    Goes on where an earlier call was cut off. Returns what sweep.json holds.
    """
    asked, aim = job.recipe_as_asked(), aim or Aim()
    if asked.stages:
        raise RecipeError("a sweep searches one training: give it the recipe of one stage, without `stages:`")
    space = training.parse_space(over, asked) or training.default_space(asked)
    chat = load_chat(asked.model, tell)
    prepare_once(job, chat=chat, tell=tell)
    dataset = rows_of(job, without=("test",))
    metric = None
    if aim.objective != "validation_loss":
        metric = find_metric(task_of(job.recipe(), dataset).metric if aim.objective == "validation_score" else aim.objective)
    content = {
        "key": hash_of(asked.to_dict(), [part["file_sha256"] for split, part in dataset.manifest["splits"].items() if split != "test"], base_state(asked)),
        "objective": aim.objective,
        "metric_title": "validation loss, nats per token" if metric is None else f"{metric.title}, validation rows",
        "space": {key: str(part) for key, part in space.items()},
        "rows": {split: len(getattr(dataset, split)) for split in ("train", "validation")},
    }  # fmt: skip
    _refuse_another(job, content)
    if not job.trials_file.exists():
        job.write_json(job.sweep_file, content)
    recipe = job.recipe() if "training.learning_rate" in space else with_rate(job, dataset, chat, tell=tell)
    score = _score(dataset, chat, metric, tell) if metric is not None else None
    run_trial = training.trial_runner(dataset, chat, folder=job.tokens_folder, reference=job.reference_file, score=score, tell=tell)
    rows = training.sweep(job.trials_file, recipe, space, aim, run_trial=run_trial, tell=tell)
    return _finish(job, recipe, content, rows, aim)


def _score(dataset: Dataset, chat: Chat, metric: Any, tell: Tell) -> Callable[[Any, Recipe], float | None]:
    return lambda model, recipe: evaluation.validation_score(model, dataset, recipe, chat, metric, tell)


def _refuse_another(job: Run, content: dict[str, Any]) -> None:
    """Trials of another space, objective or data do not compare with those that would follow."""
    before = job.read_json(job.sweep_file) if job.sweep_file.exists() else content
    if not job.trials_file.exists() or all(before.get(name) == content[name] for name in ("key", "objective", "space")):
        return
    differ = "; ".join(
        f"{name}: {before.get(name)} → {content[name]}" for name in ("objective", "space") if before.get(name) != content[name]
    )
    raise RecipeError(
        f"{job.path} holds a sweep with other {'values (' + differ + ')' if differ else 'rows or weights'}. "
        "Choose another --run, or --fresh to start it anew and delete what is there"
    )


def _finish(job: Run, recipe: Recipe, content: dict[str, Any], rows: list[dict[str, Any]], aim: Aim) -> dict[str, Any]:
    best = dict(training.best_of(rows, aim) or {})
    asked = job.recipe_as_asked()
    # A rate that was found for all trials belongs to what was chosen.
    values = {"training.learning_rate": recipe.training.learning_rate, **best["values"]}
    winner = training.changed(asked, values).model_copy(update={"name": f"{asked.name[:94]}-best"})
    states = [row["state"] for row in rows]
    counts = {state: states.count(state) for state in dict.fromkeys(states)}
    seconds = round(sum(row.get("seconds", 0.0) for row in rows), 1)
    lines = [
        f"The best of {len(rows)} trials ({', '.join(f'{count} {state}' for state, count in counts.items())}) of `burnish sweep` in {seconds / 60:.1f} minutes,",
        f"chosen on {content['rows']['validation']} validation rows: {content['metric_title']} {best['value']:.4f} (trial {best['trial']}).",
        *(f"  {key}: {best['values'][key]}   of {part}" for key, part in content["space"].items()),
        "Chosen as the best of several, this number flatters: `burnish run` measures on the test rows, which the sweep never read.",
    ]
    text = "".join(f"# {line}\n" for line in lines) + dump_recipe(winner, short=True)
    job.write_text(job.best_recipe_file, text)
    if load_recipe(job.best_recipe_file) != winner:
        raise RecipeError(f"{job.best_recipe_file}: reads back as another recipe; this is our fault")
    content |= {"best": best, "counts": counts, "seconds": seconds, "recipe": str(job.best_recipe_file)}
    job.write_json(job.sweep_file, content)
    report.sweep_report(job)
    return content
