"""A run's files → one dict: what report.json holds and report.html shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.errors import DataError
from burnish.recipe import dump_recipe
from burnish.report.consistency import consistency_facts, judge_facts
from burnish.report.curve import curve_facts
from burnish.report.forecast import forecast_facts
from burnish.report.pareto import retain_facts
from burnish.report.texts import encodable, is_number
from burnish.run import Run, hash_of

SCHEMA_VERSION = 1  # of report.json; raise it when a key changes its meaning or goes
SHOWN_WINS, SHOWN_LOSSES, SHOWN_FAILURES = 12, 12, 8
FAILS_BELOW = 0.5  # a score of a metric between 0 and 1 under which a row counts as failed
CURVE_POINTS = 800  # steps kept for the curve; more cannot be told apart on a page

_COMPARISON = {
    "metric": "score",
    "metric_title": None,
    "metric_reads": None,
    "metric_reason": None,
    "binary": False,
    "confidence": None,
    "rows": None,
    "groups": None,
    "left_out": None,
    "batch_size": None,
    "detectable_difference": None,
    "unit": None,
    "lower_is_better": False,
    "verdict": None,
    "sentence": None,
    "best_baseline": None,
}
_CANDIDATE: dict[str, Any] = {
    "title": None,
    "score": None,
    "low": None,
    "high": None,
    "n": None,
    "unscored": 0,
    "unscored_reasons": {},
    "metrics": {},
    "seconds_p50": None,
    "seconds_p95": None,
    "rows_per_second": None,
    "prompt_tokens_mean": None,
    "completion_tokens_mean": None,
    "stopped_fraction": None,
    "cost_per_1000": None,
    "training_seconds": None,
    "prompt_form": None,
    "shots": None,
}
_PAIR = dict.fromkeys(("baseline", "metric", "n", "difference", "low", "high", "p_value", "p_adjusted", "verdict"))
_TRAINING = dict.fromkeys(
    (
        "steps",
        "planned_steps",
        "epochs",
        "seconds",
        "tokens_per_second",
        "examples_per_second",
        "target_tokens",
        "best_step",
        "best_validation_loss",
        "stopped_early",
        "trainable_parameters",
        "total_parameters",
        "peak_memory_bytes",
        "learning_rate",
        "method",
        "base_model",
    )
)
_DATA = dict.fromkeys(("sources", "splits", "removed_counts", "duplicate_fraction", "token_lengths", "attribution", "warnings"))
_SELECTION = dict.fromkeys(("metric", "rows", "tried", "chosen", "instruction", "example_prompts"))
_ROW: dict[str, Any] = {
    "example": None,
    "source": None,
    "question": "",
    "reference": "",
    "answers": {},
    "scores": {},
    "reasons": {},
}


def gather(run: Run) -> dict[str, Any]:
    """Everything the report says, as plain JSON values. A missing optional file leaves an empty or null section."""
    comparison = _comparison(run)
    recipe = run.recipe()
    candidates, pairs = comparison["candidates"], _titled(comparison["comparisons"], comparison["candidates"])
    percent = _is_fraction(comparison)
    subject = _subject(candidates, pairs)
    against = _best_baseline(comparison, subject)
    status = run.status()
    return encodable(
        {
            "schema_version": SCHEMA_VERSION,
            "run": {"name": recipe.name, "created": status.get("created"), "model": recipe.model.name},
            "verdict": {**{key: comparison[key] for key in _COMPARISON}, "percent": percent},
            "subject": subject,
            "best_baseline": against,
            "candidates": candidates,
            "comparisons": pairs,
            "fields": comparison.get("fields") or None,
            "decision": run.read_json(run.decision_file) if run.decision_file.exists() else None,
            "training": _training(run),
            "stages": _stages(run),
            "forecast": forecast_facts(run),
            "curve": curve_facts(run),
            "retain": retain_facts(run),
            "consistency": consistency_facts(comparison),
            "judge": judge_facts(run),
            "rows": _rows(comparison, subject, against, percent),
            "data": _optional(run, run.manifest_file, _DATA),
            "baselines": _optional(run, run.selection_file, _SELECTION),
            "recipe": {"text": dump_recipe(recipe), "hash": hash_of(recipe.to_dict()), "values": recipe.to_dict()},
            "versions": status.get("versions") or {},
            "machine": status.get("machine") or {},
            # The report cannot know how long writing the report takes.
            "steps": {name: step for name, step in (status.get("steps") or {}).items() if name != "report"},
        }
    )


def _comparison(run: Run) -> dict[str, Any]:
    content = run.read_json(run.comparison_file)
    rows = content.get("candidates") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("name") for row in rows):
        raise DataError(
            f"{run.comparison_file} is not a comparison (expected a `candidates` list whose entries have a `name`): "
            "run `burnish compare` again"
        )
    return {
        **_COMPARISON,
        **content,
        "metric_title": content.get("metric_title") or content.get("metric") or "score",
        "candidates": [{**_CANDIDATE, **row, "title": row.get("title") or row["name"]} for row in rows],
        "comparisons": [{"candidate": "tuned", **_PAIR, **pair} for pair in content.get("comparisons") or []],
        "rows_detail": [{**_ROW, **row} for row in content.get("rows_detail") or []],
    }


def _titled(pairs: list[dict[str, Any]], candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pair with the words that stand before its bar. The first candidate is the one that the report is about and goes without saying."""
    titles = {row["name"]: row["title"] for row in candidates}
    told = [f"{titles.get(pair['candidate'], pair['candidate'])} " if pair["candidate"] != pairs[0]["candidate"] else "" for pair in pairs]
    return [
        {**pair, "title": f"{who}against {titles.get(pair['baseline'], pair['baseline'])}"} for pair, who in zip(pairs, told, strict=True)
    ]


def _optional(run: Run, path: Path, keys: dict[str, Any]) -> dict[str, Any] | None:
    """A file that not every run has, with every key the report looks for."""
    content = run.read_json(path) if path.exists() else None
    return {**keys, **content} if isinstance(content, dict) else None


def _is_fraction(comparison: dict[str, Any]) -> bool:
    """Whether the metric lies between 0 and 1 (and is shown in per cent); somebody's own rubric may not, and a metric with a unit is not."""
    if comparison["unit"] is not None:
        return False
    values = [row["score"] for row in comparison["candidates"]]
    values += [value for row in comparison["rows_detail"] for value in row["scores"].values()]
    return all(0 <= value <= 1 for value in values if is_number(value))


def _subject(candidates: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str | None:
    """The candidate the verdict is about: the one that is compared with baselines; None when nothing was trained."""
    names = [row["name"] for row in candidates]
    wanted = [pair["candidate"] for pair in pairs] + ["tuned"]
    return next((name for name in wanted if name in names), None)


def _best_baseline(comparison: dict[str, Any], subject: str | None) -> str | None:
    others = [row for row in comparison["candidates"] if row["name"] != subject]
    if comparison["best_baseline"] in [row["name"] for row in others]:
        return str(comparison["best_baseline"])
    scored = [row for row in others if is_number(row["score"])]
    return max(scored, key=lambda row: row["score"])["name"] if scored else None


def _training(run: Run) -> dict[str, Any] | None:
    summary = _optional(run, run.training_file, _TRAINING)
    lines = run.read_jsonl(run.metrics_file)
    if summary is None and not lines:
        return None
    steps = [line for line in lines if is_number(line.get("step")) and is_number(line.get("loss"))]
    checks = [line for line in lines if is_number(line.get("step")) and is_number(line.get("validation_loss"))]
    return {
        "summary": summary or dict(_TRAINING),
        "steps": [
            {key: line.get(key) for key in ("step", "loss", "smoothed_loss", "learning_rate")} for line in _thinned(_smoothed(steps))
        ],
        "validations": [{key: line[key] for key in ("step", "validation_loss")} for line in checks],
        "range_test": _optional(run, run.rate_file, {"learning_rate": None, "reason": None, "examples": None, "points": []}),
    }


def _stages(run: Run) -> dict[str, Any] | None:
    """What each stage of a chain brought. The hashes by which a chain finds what it has measured say nothing to a reader."""
    content = _optional(run, run.stages_file, {"rows": {}, "states": [], "stages": [], "stopped_at": None})
    return None if content is None else {key: value for key, value in content.items() if key != "measured"}


def _smoothed(steps: list[dict[str, Any]], keep: float = 0.9) -> list[dict[str, Any]]:
    """Add `smoothed_loss`: the exponential mean of the losses so far, free of the pull towards its start at 0."""
    mean, weight, result = 0.0, 0.0, []
    for line in steps:
        mean, weight = keep * mean + (1 - keep) * line["loss"], keep * weight + (1 - keep)
        result.append({**line, "smoothed_loss": mean / weight})
    return result


def _thinned(items: list[dict[str, Any]], most: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """At most so many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _rows(comparison: dict[str, Any], subject: str | None, against: str | None, percent: bool) -> dict[str, Any]:
    """Counts over all test rows and the rows worth reading. An unscored answer counts as 0, as it does in the score."""
    rows = comparison["rows_detail"]
    names = [row["name"] for row in comparison["candidates"]]
    wins: list[tuple[float, dict[str, Any]]] = []
    losses: list[tuple[float, dict[str, Any]]] = []
    ties = 0
    if subject and against:
        for row in rows:
            difference = (_value(row, subject) - _value(row, against)) * (-1 if comparison["lower_is_better"] else 1)
            if difference == 0:
                ties += 1
            else:
                (wins if difference > 0 else losses).append((difference, row))
    failures = [(0.0, row) for row in rows if all(_value(row, name) < FAILS_BELOW for name in names)] if percent else []
    binary = bool(comparison["binary"])
    return {
        "count": len(rows),
        "counts": {"wins": len(wins), "losses": len(losses), "ties": ties},
        "all_fail": len(failures) if percent else None,
        "wins": _worth_reading(wins, SHOWN_WINS, binary),
        "losses": _worth_reading(losses, SHOWN_LOSSES, binary),
        "failures": _worth_reading(failures, SHOWN_FAILURES, True),
    }


def _value(row: dict[str, Any], name: str) -> float:
    value = row["scores"].get(name)
    return float(value) if is_number(value) else 0.0


def _worth_reading(rows: list[tuple[float, dict[str, Any]]], most: int, evenly: bool) -> list[dict[str, Any]]:
    """The rows that differ most; where all differ alike, rows evenly spread (neighbours resemble each other)."""
    if evenly:
        return _thinned([row for _, row in rows], most)
    return [row for _, row in sorted(rows, key=lambda item: -abs(item[0]))[:most]]
