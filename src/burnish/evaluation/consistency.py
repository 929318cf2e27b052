"""Consistency: what the answers keep to besides being right, each check a number with its interval, compared pair by pair like the score itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from burnish.evaluation.candidates import CANDIDATES
from burnish.evaluation.samples import read_samples
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.tasks import (
    CHECKS,
    Difference,
    Material,
    Measure,
    Row,
    Task,
    Unfit,
    bootstrap_interval,
    chosen_checks,
    compare,
    counts,
    effective_rows,
    find_metric,
    headline,
    holm,
    values,
    verdict,
    wilson,
)
from burnish.types import Example, Prediction, Score, Tell, silent

_TOLD_EACH = 50  # scores
UNTRAINED = "base"  # whose answers are the other voice for the check of tone


@dataclasses.dataclass(frozen=True, slots=True)
class Answered:
    """What all candidates answered to the same rows."""

    test: Sequence[Example]
    predictions: Mapping[str, Sequence[Prediction]]  # by candidate, in the order of `test`
    best_baseline: str | None

    @property
    def groups(self) -> list[str]:
        return [example.group for example in self.test]


def consistency(
    run: Run, recipe: Recipe, task: Task, *, answered: Answered, train: Sequence[str], tell: Tell = silent
) -> dict[str, Any]:  # fmt: skip
    """Every measure for every candidate, and the tuned one against the best baseline with Holm's correction over the measures.

    `train`: the training answers. A check that has nothing to say about this data is listed with its reason.
    """
    asked = recipe.evaluation.checks
    samples = {name: read_samples(run.samples_file(name)) for name in answered.predictions}
    untrained = answered.predictions.get(UNTRAINED)
    with ExitStack() as stack:
        material = Material(
            kind=task.kind,
            metric=find_metric(task.metric),
            train=train,
            references=[example.reference for example in answered.test],
            groups=answered.groups,
            untrained=None if untrained is None else [prediction.text for prediction in untrained],
            has_samples=any(samples.values()),
            seed=recipe.seed,
            stack=stack,
        )
        checks = chosen_checks(material) if asked is None else [(check.name, check.settings) for check in asked]
        measures, refused = _measures(checks, material, tell)
        scores: dict[str, dict[str, list[Score]]] = {measure.key: {} for measure in measures}
        done, total = 0, len(measures) * len(answered.predictions) * len(answered.test)
        for name, made in answered.predictions.items():
            rows = _rows(answered.test, made, samples[name])
            for measure in measures:
                part = scores[measure.key].setdefault(name, [])
                for row in rows:
                    part.append(measure.score(row))
                    done += 1
                    if done % _TOLD_EACH == 0:
                        tell("consistency", done, total, measure.title)
    found = {
        measure.key: {name: _value(part, measure, answered, recipe) for name, part in scores[measure.key].items()} for measure in measures
    }
    trained = [name for name in answered.predictions if CANDIDATES[name].trained]
    compared = {name: _compared(name, measures, scores, answered, recipe) for name in trained} if answered.best_baseline else {}
    return {
        "chosen": "by the training answers" if asked is None else "by the recipe",
        "against": answered.best_baseline,
        "measures": [
            {
                **{key: getattr(measure, key) for key in ("key", "title", "reads", "binary", "lower_is_better", "note")},
                "candidates": found[measure.key],
                "comparisons": {name: compared[name][measure.key] for name in compared if measure.key in compared[name]},
            }
            for measure in measures
        ],
        "refused": refused,
    }  # fmt: skip


def mean_interval(
    kept: Sequence[float], groups: Sequence[str], *, binary: bool, recipe: Recipe
) -> tuple[float, float]:  # fmt: skip
    """The interval of the mean of row values: Wilson's for right or wrong, on as many rows as the groups are worth; else the bootstrap."""
    settings = recipe.evaluation
    if binary:
        worth = effective_rows(kept, groups)
        return wilson(float(np.mean(kept)) * worth, worth, settings.confidence)
    return bootstrap_interval(kept, groups=groups, confidence=settings.confidence, resamples=settings.resamples, seed=recipe.seed)


def _measures(checks: Sequence[tuple[str, Any]], material: Material, tell: Tell) -> tuple[list[Measure], list[dict[str, str]]]:
    measures: list[Measure] = []
    refused: list[dict[str, str]] = []
    for name, settings in checks:
        tell("consistency", 0, 0, name.replace("_", " "))
        try:
            made = CHECKS[name].measures(settings, material)
        except Unfit as problem:
            refused.append({"check": name, "reason": str(problem)})
            continue
        for measure in made:
            same = sum(other.key.split(" ")[0] == measure.key for other in measures)  # two patterns, two glossaries
            measures.append(dataclasses.replace(measure, key=f"{measure.key} {same + 1}") if same else measure)
    return measures, refused


def _rows(test: Sequence[Example], made: Sequence[Prediction], samples: Mapping[str, tuple[str, ...]]) -> list[Row]:
    return [
        Row(
            index,
            "\n\n".join(str(message["content"]) for message in example.prompt),
            example.reference,
            prediction.text,
            prediction.finish_reason,
            samples.get(example.id),
        )
        for index, (example, prediction) in enumerate(zip(test, made, strict=True))
    ]


def _value(scores: Sequence[Score], measure: Measure, answered: Answered, recipe: Recipe) -> dict[str, Any]:
    number, kept = headline(scores), values(scores)
    content: dict[str, Any] = {"value": None, "low": None, "high": None}
    if kept:
        groups = [group for group, score in zip(answered.groups, scores, strict=True) if counts(score)]
        low, high = mean_interval(kept, groups, binary=measure.binary, recipe=recipe)
        content = {"value": round(float(np.mean(kept)), 6), "low": round(low, 6), "high": round(high, 6)}
    return {**content, "n": number.n, "unscored": number.unscored, "unscored_reasons": number.reasons, "left_out": number.left_out}


def _compared(
    name: str, measures: Sequence[Measure], scores: Mapping[str, Mapping[str, Sequence[Score]]], answered: Answered, recipe: Recipe
) -> dict[str, dict[str, Any]]:
    """One trained candidate against the best baseline, measure by measure; p-values adjusted over the measures."""
    settings, differences = recipe.evaluation, {}
    for measure in measures:
        ours, theirs = scores[measure.key][name], scores[measure.key][str(answered.best_baseline)]
        both = [counts(left) and counts(right) for left, right in zip(ours, theirs, strict=True)]
        pairs = [(left.value or 0.0, right.value or 0.0) for left, right, keep in zip(ours, theirs, both, strict=True) if keep]
        if not pairs:
            continue
        differences[measure.key] = compare(
            [left for left, _ in pairs],
            [right for _, right in pairs],
            binary=measure.binary,
            groups=[group for group, keep in zip(answered.groups, both, strict=True) if keep],
            confidence=settings.confidence,
            resamples=settings.resamples,
            seed=recipe.seed,
        )
    adjusted = dict(zip(differences, holm([found.p_value for found in differences.values()]), strict=True))
    lower = {measure.key: measure.lower_is_better for measure in measures}
    return {key: _comparison(found, adjusted[key], lower[key], 1 - settings.confidence) for key, found in differences.items()}


def _comparison(found: Difference, p_adjusted: float, lower_is_better: bool, alpha: float) -> dict[str, Any]:
    """`difference` is tuned minus baseline as measured; the verdict knows which direction is good."""
    good = (-found.difference, -found.high, -found.low) if lower_is_better else (found.difference, found.low, found.high)
    return {**dataclasses.asdict(found), "p_adjusted": p_adjusted, "verdict": str(verdict(*good, p_adjusted, alpha))}
