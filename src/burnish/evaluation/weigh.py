"""Everything that was measured on the test rows, weighed against everything else that a decision asks for. Reads files only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.evaluation.candidates import CANDIDATES
from burnish.evaluation.compare import Ground, candidate_row, complete, detectable, ground_of, weigh_pairs
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.tasks import Task, counts, find_metric, score_rows, values
from burnish.types import Dataset, Prediction, Tell, silent

CONSTANT = "constant"  # the most frequent training answer, to every question: what scores no better knows nothing of the questions


def weigh(run: Run, recipe: Recipe, task: Task, dataset: Dataset, tell: Tell = silent) -> dict[str, Any]:
    """The run's candidates with their intervals, the best of each family, and the pairs that a decision rests on, with Holm over all of these.

    Raises DataError where answers are missing.
    """
    ground = ground_of(run, recipe, task, dataset.test, tell)
    rows = {name: candidate_row(run, ground, name) for name in ground.predictions}
    best: dict[str, str] = {}
    for name, row in rows.items():
        family = CANDIDATES[name].family
        if row["score"] is not None and (family not in best or row["score"] > rows[best[family]]["score"]):
            best[family] = name
    _add_constant(ground, [example.reference for example in dataset.train])
    untrained = [name for name in rows if not CANDIDATES[name].trained]
    pairs = [(best["tuned"], name) for name in untrained] if "tuned" in best else []
    pairs += [
        (best[a], best[b]) for a, b in (("retrieve", "prompt"), ("larger", "prompt"), ("larger", "retrieve")) if a in best and b in best
    ]
    pairs += [(name, CONSTANT) for name in best.values()]
    return {
        "metric": ground.metric.name,
        "metric_title": ground.metric.title,
        "metric_reads": ground.metric.reads,
        "confidence": recipe.evaluation.confidence,
        "test_rows": len(ground.test),
        "train_rows": len(dataset.train),
        "detectable_difference": detectable(len(ground.test), recipe, ground.metric),
        "candidates": [{**row, "family": CANDIDATES[name].family} for name, row in rows.items()],
        "best": best,
        "constant": {"answer": _most_frequent([e.reference for e in dataset.train]), "score": _mean(values(ground.scores[CONSTANT]))},
        "pairs": [{**dataclasses.asdict(item), "verdict": str(item.verdict)} for item in weigh_pairs(ground, pairs)],
    }


def weigh_runs(
    answers: Mapping[str, Path], recipe: Recipe, task: Task, dataset: Dataset, pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Answers of several runs to the same test rows, compared in pairs with Holm over all of them. `answers`: name → predictions file."""
    metric, references = find_metric(task.metric), [example.reference for example in dataset.test]
    predictions = {name: complete(path, dataset.test) for name, path in answers.items()}
    scores = {name: score_rows(metric, [p.text for p in made], references) for name, made in predictions.items()}
    kept = [index for index in range(len(references)) if all(counts(part[index]) for part in scores.values())]
    ground = Ground(
        recipe,
        task,
        metric,
        [dataset.test[index] for index in kept],
        {name: [made[index] for index in kept] for name, made in predictions.items()},
        {name: [part[index] for index in kept] for name, part in scores.items()},
    )
    return {
        "metric": metric.name,
        "metric_title": metric.title,
        "pairs": [{**dataclasses.asdict(item), "verdict": str(item.verdict)} for item in weigh_pairs(ground, pairs)],
    }


def _add_constant(ground: Ground, references: list[str]) -> None:
    answer = _most_frequent(references)
    ground.predictions[CONSTANT] = [Prediction(example.id, CONSTANT, answer, "stop", 0, 0, 0.0) for example in ground.test]
    ground.scores[CONSTANT] = score_rows(ground.metric, [answer] * len(ground.test), ground.references)


def _most_frequent(references: list[str]) -> str:
    return Counter(references).most_common(1)[0][0]


def _mean(numbers: list[float]) -> float:
    return round(sum(numbers) / len(numbers), 6) if numbers else 0.0
