"""judge: a language model behind an endpoint compares the run's answers pair by pair, by a rubric; asked twice, the places swapped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from burnish import evaluation, report
from burnish.errors import DataError, RecipeError
from burnish.evaluation import CANDIDATES, Client, Endpoint, endpoint_of
from burnish.evaluation.judge import Pair, agreement, judge_pairs_with, read_labels, read_rubric, summarize
from burnish.pipeline.steps import dataset_of
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.types import Tell, silent

JUDGED_ROWS = 100  # test rows at most, the first ones by id: each costs two requests
KEPT_DETAILS = 500


def judge(
    job: Run, *, endpoint: Endpoint | None = None, rubric: Path | None = None, labels: Path | None = None, against: str | None = None,
    rows: int = JUDGED_ROWS, tell: Tell = silent,
) -> dict[str, Any]:  # fmt: skip
    """Judge the tuned candidate against the best baseline (or `against`), write judge.json and the report anew, return what was found.

    `endpoint`, `rubric`: none: evaluation.endpoint, and the rubric that evaluation.checks names. Answers of the judge are kept in the run.
    """
    recipe = job.recipe()
    comparison = job.read_json(job.comparison_file)
    text = read_rubric(rubric or _rubric_of(recipe))
    subject, other = _candidates(comparison, against)
    pairs = _pairs(job, subject, other, rows)
    named = None if labels is None else read_labels(labels, {subject: "won", other: "lost", "tie": "tied"})
    asked = endpoint or _endpoint_of(recipe)
    client = Client(asked, job.endpoint_file(asked.name))
    settings: dict[str, Any] = {"confidence": recipe.evaluation.confidence, "resamples": recipe.evaluation.resamples, "seed": recipe.seed}
    groups = [pair.group for pair in pairs]
    judgements = judge_pairs_with(client, pairs, text, tell=tell)
    content = {
        "subject": subject,
        "against": other,
        "model": asked.model,
        "base_url": asked.base_url,
        "judges_itself": CANDIDATES[other].by == "endpoint" and recipe.evaluation.endpoint is not None and recipe.evaluation.endpoint.model == asked.model,
        "rubric": text,
        "confidence": recipe.evaluation.confidence,
        "rows": len(pairs),
        "of_rows": len(comparison["rows_detail"]),
        **summarize(judgements, groups, **settings),
        "labels": None if named is None else agreement(judgements, named, groups, **settings),
        "spent": client.spent if asked.max_spend is not None else None,
        "judgements": [dataclasses.asdict(one) for one in judgements[:KEPT_DETAILS]],
    }  # fmt: skip
    job.write_json(job.judge_file, content)
    job.event("judged", model=asked.model, rows=len(pairs), win_rate=content["win_rate"], verdict=content["verdict"])
    if job.status()["steps"].get("report", {}).get("state") == "done":
        report.report(job)
    return content


def _rubric_of(recipe: Recipe) -> Path:
    found = [check.settings.rubric for check in recipe.evaluation.checks or () if check.name == "judge"]
    if not found:
        raise RecipeError(
            "no rubric: give --rubric FILE, a text that says what makes an answer better, or `- judge: {rubric: FILE}` in evaluation.checks"
        )
    return Path(found[0])


def _endpoint_of(recipe: Recipe) -> Endpoint:
    if recipe.evaluation.endpoint is None:
        raise RecipeError("no endpoint: give --endpoint URL and --model NAME, or evaluation.endpoint in the recipe")
    return dataclasses.replace(endpoint_of(recipe.evaluation.endpoint), name="judge")


def _candidates(comparison: dict[str, Any], against: str | None) -> tuple[str, str]:
    names = [row["name"] for row in comparison["candidates"]]
    trained = [name for name in names if CANDIDATES[name].trained]
    other = against or comparison.get("best_baseline")
    if not trained or other is None:
        raise DataError("nothing to judge: the run has no trained candidate beside a baseline (run `burnish run` first)")
    subject = "tuned" if "tuned" in trained else trained[0]
    if other not in names or other == subject:
        known = ", ".join(name for name in names if name != subject)
        raise RecipeError(f"--against {other}: expected one of the run's other candidates: {known}")
    return subject, str(other)


def _pairs(job: Run, subject: str, other: str, rows: int) -> list[Pair]:
    dataset = dataset_of(job)
    answered = {}
    for name in (subject, other):
        if not evaluation.is_answered(job, name, dataset.test):
            raise DataError(f"{job.predictions_file(name)}: answers to test rows are missing: run `burnish evaluate` first")
        answered[name] = {prediction.example: prediction.text for prediction in evaluation.read_predictions(job.predictions_file(name))}
    return [
        Pair(
            example.id,
            example.group,
            "\n\n".join(f"{message['role']}: {message['content']}" for message in example.prompt),
            example.reference,
            answered[subject][example.id],
            answered[other][example.id],
        )
        for example in sorted(dataset.test, key=lambda example: example.id)[:rows]
    ]
