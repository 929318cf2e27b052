"""Predictions → scores with intervals, paired comparisons, one verdict. Reads files only; no model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from burnish.errors import DataError
from burnish.evaluation.candidates import CANDIDATES
from burnish.evaluation.predict import read_predictions
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.tasks import (
    Metric,
    Task,
    bootstrap_interval,
    build_comparisons,
    compare_corpus,
    corpus_bootstrap,
    counts,
    detectable_difference,
    find_metric,
    headline,
    json_fields,
    judge,
    measure,
    score_rows,
    texts,
    values,
    wilson,
)
from burnish.types import Comparison, Example, Prediction, Score, Verdict


def compare_run(run: Run, recipe: Recipe, task: Task, test: Sequence[Example]) -> dict[str, Any]:
    """Compare what the run has predicted. Returns what comparison.json holds; raises DataError where answers are missing."""
    predictions: dict[str, list[Prediction]] = {name: _complete(run, name, test) for name in recipe.evaluation.candidates}
    metric = find_metric(task.metric)
    references = [example.reference for example in test]
    scores = {name: score_rows(metric, [p.text for p in made], references) for name, made in predictions.items()}
    kept = [index for index in range(len(test)) if all(counts(part[index]) for part in scores.values())]
    if not kept:
        raise DataError(f"task.metric: {metric.name} can score none of the {len(test)} test rows: {next(iter(scores.values()))[0].reason}")
    trained = [name for name in predictions if CANDIDATES[name].trained]
    baselines = [name for name in predictions if not CANDIDATES[name].trained]
    comparisons = _comparisons(metric, scores, predictions, references, recipe, trained, baselines)
    table = [_row(name, metric, scores[name], predictions[name], references, recipe, task, run) for name in predictions]
    by_name = {row["name"]: row for row in table}
    verdict = overall(comparisons, by_name)
    best = max(baselines, key=lambda name: _number(by_name[name]["score"]), default=None)
    content: dict[str, Any] = {
        "metric": metric.name,
        "metric_title": metric.title,
        "metric_reads": metric.reads,
        "metric_reason": task.reason,
        "binary": metric.binary,
        "confidence": recipe.evaluation.confidence,
        "rows": len(kept),
        "left_out": len(test) - len(kept),
        "detectable_difference": detectable(len(kept), recipe, metric),
        "verdict": str(verdict),
        "best_baseline": best,
        "batch_size": recipe.evaluation.batch_size,
        "candidates": table,
        "comparisons": [{**dataclasses.asdict(item), "verdict": str(item.verdict)} for item in comparisons],
        "fields": _fields(task, predictions, references),
        "rows_detail": _details(test, predictions, scores),
    }
    content["sentence"] = sentence(content)
    return content


def detectable(rows: int, recipe: Recipe, metric: Metric) -> float | None:
    """The smallest gain over a baseline in the middle of the scale that the test rows show with 80 % probability, as a fraction."""
    baselines = sum(not CANDIDATES[name].trained for name in recipe.evaluation.candidates)
    spread = None if metric.binary else 0.35
    found = detectable_difference(rows, confidence=recipe.evaluation.confidence, spread=spread, comparisons=max(1, baselines))
    return None if found is None else round(found, 4)


def overall(comparisons: Sequence[Comparison], candidates: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """BETTER: better than every baseline. WORSE: worse than the best of them. Else CAN'T TELL."""
    if not comparisons:
        return Verdict.CANT_TELL
    if all(item.verdict is Verdict.BETTER for item in comparisons):
        return Verdict.BETTER
    best = max(comparisons, key=lambda item: _number(candidates[item.baseline]["score"]))
    return Verdict.WORSE if best.verdict is Verdict.WORSE else Verdict.CANT_TELL


def sentence(content: Mapping[str, Any]) -> str:
    """The verdict as a person would say it, with its numbers."""
    rows, title = content["rows"], content["metric_title"]
    candidates = {row["name"]: row for row in content["candidates"]}
    comparisons = content["comparisons"]
    if not comparisons:
        return f"No verdict: nothing trained was compared with a baseline. Measured: {title} on {rows} test rows."
    tuned, best = candidates[comparisons[0]["candidate"]], candidates[content["best_baseline"]]
    item = next(c for c in comparisons if c["baseline"] == best["name"])
    numbers = (
        f"{_percent(tuned['score'])} against {_percent(best['score'])} for the best baseline ({best['title']}): "
        f"{100 * item['difference']:+.1f} points [{100 * item['low']:+.1f}, {100 * item['high']:+.1f}], {rows} test rows, {title.lower()}"
    )
    if content["verdict"] == Verdict.BETTER:
        others = "every baseline" if len(comparisons) > 1 else "the baseline"
        return f"The fine-tuned model is better than {others}: {numbers}."
    if content["verdict"] == Verdict.WORSE:
        return f"The fine-tuned model is worse than the best baseline: {numbers}. Do not ship it."
    needed = content["detectable_difference"]
    hint = (
        f"; {rows} rows show differences of about {100 * needed:.0f} points"
        if needed is not None
        else "; so few rows show no difference at all"
    )
    not_better = [c["baseline"] for c in comparisons if c["verdict"] != Verdict.BETTER]
    return f"Can't tell whether the fine-tuned model is better than {' and '.join(not_better)}: {numbers}{hint}."


def _complete(run: Run, name: str, test: Sequence[Example]) -> list[Prediction]:
    found = {
        prediction.example: prediction
        for prediction in (read_predictions(run.predictions_file(name)) if run.predictions_file(name).exists() else [])
    }
    missing = [example for example in test if example.id not in found]
    if missing:
        raise DataError(
            f"{run.predictions_file(name)}: answers to {len(missing)} of {len(test)} test rows are missing: run `burnish evaluate` first"
        )
    return [found[example.id] for example in test]


def _comparisons(
    metric: Metric, scores: Mapping[str, list[Score]], predictions: Mapping[str, list[Prediction]], references: list[str], recipe: Recipe,
    trained: Sequence[str], baselines: Sequence[str],
) -> list[Comparison]:  # fmt: skip
    settings = recipe.evaluation
    made: list[Comparison] = []
    for name in trained if baselines else ():
        if metric.corpus is None:
            made += build_comparisons(
                {key: values(part) for key, part in scores.items()}, name, baselines=baselines, metric=metric,
                confidence=settings.confidence, resamples=settings.resamples, seed=recipe.seed,
            )  # fmt: skip
            continue
        clean = {key: texts(scores[key], [p.text for p in part], references) for key, part in predictions.items()}
        differences = {
            key: compare_corpus(
                metric.corpus,
                clean[name][0],
                baseline=clean[key][0],
                references=clean[name][1],
                confidence=settings.confidence,
                seed=recipe.seed,
            )
            for key in baselines
        }
        made += judge(differences, name, metric=metric.name, confidence=settings.confidence)
    return made


def _row(
    name: str, metric: Metric, scores: list[Score], made: list[Prediction], references: list[str], recipe: Recipe, task: Task, run: Run
) -> dict[str, Any]:  # fmt: skip
    """One line of the table of candidates."""
    number = headline(scores)
    answers = [prediction.text for prediction in made]
    value, low, high = _with_interval(metric, answers, references, recipe)
    seconds = np.array([prediction.seconds for prediction in made])
    setting = next(iter(run.read_jsonl(run.predictions_file(name))), {})
    training = run.read_json(run.training_file) if CANDIDATES[name].trained and run.training_file.exists() else None
    return {
        "name": name,
        "title": CANDIDATES[name].title,
        "score": value,
        "low": low,
        "high": high,
        "n": number.n,
        "unscored": number.unscored,
        "unscored_reasons": number.reasons,
        "metrics": {
            key: {
                "title": find_metric(key).title,
                **dict(zip(("value", "low", "high"), _with_interval(find_metric(key), answers, references, recipe), strict=True)),
            }
            for key in task.further_metrics
        },
        "seconds_p50": round(float(np.percentile(seconds, 50)), 4),
        "seconds_p95": round(float(np.percentile(seconds, 95)), 4),
        "rows_per_second": setting.get("rows_per_second"),
        "prompt_tokens_mean": round(float(np.mean([p.prompt_tokens for p in made])), 1),
        "completion_tokens_mean": round(float(np.mean([p.completion_tokens for p in made])), 1),
        "stopped_fraction": round(float(np.mean([p.finish_reason == "stop" for p in made])), 4),
        "training_seconds": training["seconds"] if training else None,
        "prompt_form": setting.get("prompt_form"),
        "shots": setting.get("shots"),
    }


def _with_interval(
    metric: Metric, answers: list[str], references: list[str], recipe: Recipe
) -> tuple[float | None, float | None, float | None]:
    settings = recipe.evaluation
    scores = score_rows(metric, answers, references)
    kept = values(scores)
    if not kept:
        return None, None, None
    if metric.corpus is not None:
        clean, wanted = texts(scores, answers, references)
        low, high = corpus_bootstrap(metric.corpus, clean, references=wanted, confidence=settings.confidence, seed=recipe.seed)
        value = measure(metric, answers, references).value
        return (None if value is None else round(value, 6)), round(low, 6), round(high, 6)
    value = float(np.mean(kept))
    if metric.binary:
        low, high = wilson(round(sum(kept)), len(kept), settings.confidence)
    else:
        low, high = bootstrap_interval(kept, confidence=settings.confidence, resamples=settings.resamples, seed=recipe.seed)
    return round(value, 6), round(low, 6), round(high, 6)


def _fields(task: Task, predictions: Mapping[str, list[Prediction]], references: list[str]) -> dict[str, Any] | None:
    if task.kind != "json":
        return None
    return {
        name: {field: dataclasses.asdict(score) for field, score in json_fields([p.text for p in made], references).items()}
        for name, made in predictions.items()
    }


def _details(
    test: Sequence[Example], predictions: Mapping[str, list[Prediction]], scores: Mapping[str, list[Score]]
) -> list[dict[str, Any]]:
    return [
        {
            "example": example.id,
            "source": example.source,
            "question": example.question,
            "reference": example.reference,
            "answers": {name: made[index].text for name, made in predictions.items()},
            "scores": {name: part[index].value for name, part in scores.items()},
            "reasons": {name: part[index].reason for name, part in scores.items() if part[index].reason},
        }
        for index, example in enumerate(test)
    ]


def _number(value: float | None) -> float:
    return -1.0 if value is None else value


def _percent(value: float | None) -> str:
    return "no score" if value is None else f"{100 * value:.1f} %"
