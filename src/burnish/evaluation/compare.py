"""Predictions → scores with intervals, paired comparisons, one verdict. Reads files only; no model is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.errors import DataError
from burnish.evaluation.candidates import CANDIDATES
from burnish.evaluation.consistency import Answered, consistency, mean_interval
from burnish.evaluation.predict import read_predictions, rows_per_second
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.tasks import (
    CORPUS_RESAMPLES,
    Difference,
    Metric,
    Task,
    compare,
    compare_corpus,
    corpus_bootstrap,
    counts,
    detectable_difference,
    find_metric,
    headline,
    json_fields,
    judge_pairs,
    measure,
    score_rows,
    texts,
    values,
)
from burnish.types import Comparison, Example, Prediction, Score, Tell, Verdict, silent

# Intervals of further corpus metrics (BLEU, chrF) are for looking; no verdict rests on them, and chrF over 200 rows takes 0.1 s.
_FURTHER_RESAMPLES = 60


@dataclasses.dataclass(frozen=True, slots=True)
class Ground:
    """What every candidate is judged on: the test rows whose references the metric can read."""

    recipe: Recipe
    task: Task
    metric: Metric
    test: list[Example]
    predictions: dict[str, list[Prediction]]
    scores: dict[str, list[Score]]
    tell: Tell = silent

    @property
    def references(self) -> list[str]:
        return [example.reference for example in self.test]

    @property
    def groups(self) -> list[str]:
        return [example.group for example in self.test]

    def answers(self, name: str) -> list[str]:
        return [prediction.text for prediction in self.predictions[name]]


def compare_run(
    run: Run, recipe: Recipe, task: Task, test: Sequence[Example], *, train: Sequence[str] = (), tell: Tell = silent
) -> dict[str, Any]:
    """Compare what the run has predicted. Returns what comparison.json holds; raises DataError where answers are missing.

    `train`: the training answers, by which the checks of consistency are chosen and their tone is learnt.
    """
    ground = ground_of(run, recipe, task, test, tell)
    metric, rows = ground.metric, len(ground.test)
    comparisons = _comparisons(ground)
    table = [candidate_row(run, ground, name) for name in ground.predictions]
    by_name = {row["name"]: row for row in table}
    baselines = [name for name in ground.predictions if not CANDIDATES[name].trained]
    content: dict[str, Any] = {
        "metric": metric.name,
        "metric_title": metric.title,
        "metric_reads": metric.reads,
        "metric_reason": task.reason,
        "binary": metric.binary,
        "confidence": recipe.evaluation.confidence,
        "rows": rows,
        "groups": len(set(ground.groups)),
        "left_out": len(test) - rows,
        "detectable_difference": detectable(rows, recipe, metric),
        "verdict": str(overall(comparisons, by_name)),
        "best_baseline": max(baselines, key=lambda name: _number(by_name[name]["score"]), default=None),
        "batch_size": recipe.evaluation.batch_size,
        "candidates": table,
        "comparisons": [{**dataclasses.asdict(item), "verdict": str(item.verdict)} for item in comparisons],
        "fields": _fields(ground),
        "rows_detail": _details(ground),
    }
    content["sentence"] = sentence(content)
    answered = Answered(ground.test, ground.predictions, content["best_baseline"])
    content["consistency"] = consistency(run, recipe, task, answered=answered, train=train, tell=tell)
    return content


def ground_of(run: Run, recipe: Recipe, task: Task, test: Sequence[Example], tell: Tell) -> Ground:
    predictions: dict[str, list[Prediction]] = {name: complete(run.predictions_file(name), test) for name in recipe.evaluation.candidates}
    metric = find_metric(task.metric)
    references = [example.reference for example in test]
    scores = {name: score_rows(metric, [p.text for p in made], references) for name, made in predictions.items()}
    kept = [index for index in range(len(test)) if all(counts(part[index]) for part in scores.values())]
    if not kept:
        reason = next(iter(scores.values()))[0].reason
        raise DataError(
            f"task.metric: {metric.name} can score none of the {len(test)} test rows (the first: {reason}); choose another metric"
        )
    return Ground(
        recipe,
        task,
        metric,
        [test[index] for index in kept],
        {name: [made[index] for index in kept] for name, made in predictions.items()},
        {name: [part[index] for index in kept] for name, part in scores.items()},
        tell,
    )


def detectable(rows: int, recipe: Recipe, metric: Metric) -> float | None:
    """The smallest gain over a baseline in the middle of the scale that the test rows show with 80 % probability, as a fraction."""
    baselines = sum(not CANDIDATES[name].trained for name in recipe.evaluation.candidates)
    spread = None if metric.binary else 0.35
    found = detectable_difference(rows, confidence=recipe.evaluation.confidence, spread=spread, comparisons=max(1, baselines))
    return None if found is None else round(found, 4)


def overall(comparisons: Sequence[Comparison], candidates: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """BETTER: the first candidate compared (the tuned model, as it was trained) is better than every baseline. WORSE: worse than the best of them.
    Else CAN'T TELL."""
    comparisons = [item for item in comparisons if item.candidate == comparisons[0].candidate]
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
    comparisons = [item for item in content["comparisons"] if item["candidate"] == content["comparisons"][0]["candidate"]]
    if not comparisons:
        return f"No verdict: nothing trained was compared with a baseline. Measured: {title} on {rows} test rows."
    tuned, best = candidates[comparisons[0]["candidate"]], candidates[content["best_baseline"]]
    item = next(c for c in comparisons if c["baseline"] == best["name"])
    numbers = (
        f"{_percent(tuned['score'])} against {_percent(best['score'])} for the best baseline ({best['title']}): "
        f"{100 * item['difference']:+.1f} points [{100 * item['low']:+.1f}, {100 * item['high']:+.1f}], {rows} test rows{_in_groups(content)}, {title.lower()}"
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
    not_better = [f"({candidates[c['baseline']]['title']})" for c in comparisons if c["verdict"] != Verdict.BETTER]
    return f"Can't tell whether the fine-tuned model is better than {' and '.join(not_better)}: {numbers}{hint}."


def is_answered(run: Run, name: str, test: Sequence[Example]) -> bool:
    """Whether the candidate's answers to all test rows are on the disk."""
    path = run.predictions_file(name)
    return path.exists() and {example.id for example in test} <= {prediction.example for prediction in read_predictions(path)}


def complete(path: Path, test: Sequence[Example]) -> list[Prediction]:
    """The answers to all test rows, in their order. Raises DataError where some are missing."""
    found = {prediction.example: prediction for prediction in (read_predictions(path) if path.exists() else [])}
    missing = [example for example in test if example.id not in found]
    if missing:
        raise DataError(f"{path}: answers to {len(missing)} of {len(test)} test rows are missing: run `burnish evaluate` first")
    return [found[example.id] for example in test]


def _comparisons(ground: Ground) -> list[Comparison]:
    trained = [name for name in ground.predictions if CANDIDATES[name].trained]
    baselines = [name for name in ground.predictions if not CANDIDATES[name].trained]
    return weigh_pairs(ground, [(name, baseline) for name in trained for baseline in baselines])


def weigh_pairs(ground: Ground, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Each (candidate, baseline) compared row by row, with Holm over all of them."""
    settings, metric = ground.recipe.evaluation, ground.metric
    options: dict[str, Any] = {"confidence": settings.confidence, "seed": ground.recipe.seed}
    found: dict[tuple[str, str], Difference] = {}
    for a, b in pairs:
        if metric.corpus is None:
            one, other = values(ground.scores[a]), values(ground.scores[b])
            options |= {"binary": metric.binary, "groups": ground.groups, "resamples": settings.resamples}
            found[a, b] = compare(one, other, **options)
            continue
        (one_texts, wanted), (other_texts, _) = (texts(ground.scores[name], ground.answers(name), ground.references) for name in (a, b))
        found[a, b] = compare_corpus(metric.corpus, one_texts, baseline=other_texts, references=wanted, **options)
    return judge_pairs(found, metric=metric.name, confidence=settings.confidence)


def candidate_row(run: Run, ground: Ground, name: str) -> dict[str, Any]:
    """One line of the table of candidates."""
    number, made = headline(ground.scores[name]), ground.predictions[name]
    file = run.predictions_file(name)
    value, low, high = _with_interval(ground, ground.metric, name)
    per_second = rows_per_second(file)
    seconds = np.array([prediction.seconds for prediction in made])
    setting = next(iter(run.read_jsonl(file)), {})
    training = run.read_json(run.training_file) if CANDIDATES[name].trained else None
    further: dict[str, dict[str, Any]] = {}
    total = len(ground.predictions) * len(ground.task.further_metrics)
    for key in ground.task.further_metrics:
        metric = find_metric(key)
        ground.tell(
            "further metrics", list(ground.predictions).index(name) * len(ground.task.further_metrics) + len(further) + 1, total, key
        )
        further[key] = {"title": metric.title, **dict(zip(("value", "low", "high"), _with_interval(ground, metric, name), strict=True))}
    return {
        "name": name,
        "title": CANDIDATES[name].title,
        "score": value,
        "low": low,
        "high": high,
        "n": number.n,
        "unscored": number.unscored,
        "unscored_reasons": number.reasons,
        "metrics": further,
        "seconds_p50": round(float(np.percentile(seconds, 50)), 4),
        "seconds_p95": round(float(np.percentile(seconds, 95)), 4),
        "rows_per_second": per_second,
        "prompt_tokens_mean": round(float(np.mean([p.prompt_tokens for p in made])), 1),
        "completion_tokens_mean": round(float(np.mean([p.completion_tokens for p in made])), 1),
        "stopped_fraction": round(float(np.mean([p.finish_reason != "length" for p in made])), 4),
        "cost_per_1000": cost_per_1000(name, ground.recipe, per_second, made),
        "training_seconds": training["seconds"] if training else None,
        "prompt_form": setting.get("prompt_form"),
        "shots": setting.get("shots_shown"),
        "passages": setting.get("passages"),
        "way": setting.get("way"),
    }


def cost_per_1000(name: str, recipe: Recipe, per_second: float | None, made: Sequence[Prediction]) -> float | None:
    """What 1,000 answers cost: measured seconds at the recipe's price of this machine, or an endpoint's price for the tokens it counted.
    None: no price is stated."""
    endpoint, price = recipe.evaluation.endpoint, recipe.evaluation.price_per_hour
    if CANDIDATES[name].by == "endpoint":
        if endpoint is None or not (endpoint.price_in or endpoint.price_out):
            return None
        spent = sum(p.prompt_tokens * endpoint.price_in + p.completion_tokens * endpoint.price_out for p in made) / 1e6
        return round(1000 * spent / len(made), 8)
    return None if price is None or not per_second else round(1000 / per_second * price / 3600, 8)


def _with_interval(ground: Ground, metric: Metric, name: str) -> tuple[float | None, float | None, float | None]:
    settings, answers = ground.recipe.evaluation, ground.answers(name)
    scores = score_rows(metric, answers, ground.references)
    kept = values(scores)
    if not kept:
        return None, None, None
    if metric.corpus is not None:
        clean, wanted = texts(scores, answers, ground.references)
        resamples = CORPUS_RESAMPLES if metric is ground.metric else _FURTHER_RESAMPLES
        options: dict[str, Any] = {"confidence": settings.confidence, "resamples": resamples, "seed": ground.recipe.seed}
        low, high = corpus_bootstrap(metric.corpus, clean, references=wanted, **options)
        found = measure(metric, answers, ground.references).value
        return (None if found is None else round(found, 6)), round(low, 6), round(high, 6)
    value = float(np.mean(kept))
    groups = [group for group, score in zip(ground.groups, scores, strict=True) if counts(score)]
    low, high = mean_interval(kept, groups, binary=metric.binary, recipe=ground.recipe)
    return round(value, 6), round(low, 6), round(high, 6)


def _fields(ground: Ground) -> dict[str, Any] | None:
    if ground.task.kind != "json":
        return None
    return {
        name: {field: dataclasses.asdict(score) for field, score in json_fields(ground.answers(name), ground.references).items()}
        for name in ground.predictions
    }


def _details(ground: Ground) -> list[dict[str, Any]]:
    return [
        {
            "example": example.id,
            "source": example.source,
            "question": example.question,
            "reference": example.reference,
            "answers": {name: made[index].text for name, made in ground.predictions.items()},
            "scores": {name: part[index].value for name, part in ground.scores.items()},
            "reasons": {name: part[index].reason for name, part in ground.scores.items() if part[index].reason},
        }
        for index, example in enumerate(ground.test)
    ]


def _in_groups(content: Mapping[str, Any]) -> str:
    groups = content.get("groups")
    return f" in {groups} groups" if groups and groups < content["rows"] else ""


def _number(value: float | None) -> float:
    return -1.0 if value is None else value


def _percent(value: float | None) -> str:
    return "no score" if value is None else f"{100 * value:.1f} %"
