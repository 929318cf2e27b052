"""The whole story, the doors called in order. Read this first.

    data      collect the rows, check them, split them                                          prepare
    evaluate  measure what needs no training: prompts, examples, neighbours, documents          baselines
    train     fine-tune; keep the checkpoint with the best validation loss                      train
    evaluate  the fine-tuned model answers the same test rows                                   evaluate
    compare   scores with intervals, paired tests, one verdict                                  compare
    retain    what the tuned model has forgotten, where the recipe's `retain` asks              retain
    report    one HTML page, one JSON file, the model's card                                    report

Each function here takes a Run, reads from its folder and writes into it. A step that already ended well on the same inputs is not done again,
so a run that was cut off goes on where it stopped.

    steps.py      the steps of one run                   chain.py     train, in one training or in stages
    decide.py     should you fine-tune                   bases.py     and which base model
    estimate.py   what a run will cost                   search.py    sweep: recipe keys tried on validation rows
    curve.py      how much more data would bring         value.py     which rows help or hurt
    retention.py, repair.py    what was forgotten, and a point that loses less
    judge.py      a language model's opinion of the answers, and how far to believe it
"""

from __future__ import annotations

import json
from pathlib import Path

from burnish.evaluation import CANDIDATES
from burnish.models import load_chat
from burnish.pipeline.bases import decide_bases
from burnish.pipeline.chain import train
from burnish.pipeline.curve import CurvePlan, curve
from burnish.pipeline.decide import Wish, decide
from burnish.pipeline.estimate import estimate
from burnish.pipeline.judge import judge
from burnish.pipeline.retention import RetainOptions, gate_of, retain
from burnish.pipeline.search import sweep
from burnish.pipeline.steps import assist, check, compare, dataset_of, evaluate, machine, merge, prepare, task_of, versions, write_report
from burnish.pipeline.value import ValuePlan, value
from burnish.recipe import Recipe, build_recipe, load_recipe
from burnish.run import Run
from burnish.training import Aim, read_trials, refuse_unchangeable
from burnish.types import Tell, silent

DEMO = {
    "name": "demo",
    "model": "gemma-3-270m",
    "data": {"train": "demo:home-assistant/en", "train_rows": 1600, "validation_rows": 64, "test_rows": 150},
    "training": {"epochs": 1, "micro_batch_size": 16, "validations_per_epoch": 4, "learning_rate": 1e-3},
}


def run_recipe(
    recipe: Recipe | str | Path, *, folder: str | Path | None = None, fresh: bool = False, forecast: bool = False, tell: Tell = silent
) -> Run:
    """Do everything. Returns the run; its verdict is in `run.comparison_file`. Raises BurnishError.

    `forecast`: foretell what it costs before the first baseline, where that is not done yet; the report then compares it with the facts.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    with Run.working(folder or Path("runs") / recipe.name, recipe, fresh=fresh) as job:
        job.note(versions=versions(), machine=machine())
        chat = load_chat(recipe.model, tell)
        dataset = prepare(job, chat=chat, tell=tell)
        if forecast and not job.estimate_file.exists():
            here = estimate(job, chat=chat, tell=tell).here
            tell("forecast", 0, 0, f"{here.total_seconds / 60:.1f} minutes, {here.memory['total'] / 1e9:.1f} GB")
        evaluate(job, trained=False, dataset=dataset, chat=chat, tell=tell)
        if any(CANDIDATES[name].trained for name in job.recipe().evaluation.candidates):
            train(job, dataset=dataset, chat=chat, tell=tell)
            evaluate(job, trained=True, dataset=dataset, chat=chat, tell=tell)
        compare(job, tell=tell)
        if recipe.retain.given and job.training_file.exists():
            retain(job, dataset=dataset, chat=chat, tell=tell)
        write_report(job, tell=tell)
    return job


def demo_recipe(language: str = "en") -> Recipe:
    content = json.loads(json.dumps(DEMO))
    content["data"]["train"] = f"demo:home-assistant/{language}"
    return build_recipe(content)


__all__ = [
    "DEMO", "Aim", "CurvePlan", "RetainOptions", "ValuePlan", "Wish", "assist", "check", "compare", "curve", "dataset_of", "decide",
    "decide_bases", "demo_recipe", "estimate", "evaluate", "gate_of", "judge", "machine", "merge", "prepare", "read_trials",
    "refuse_unchangeable", "retain", "run_recipe", "sweep", "task_of", "train", "value", "versions", "write_report",
]  # fmt: skip
