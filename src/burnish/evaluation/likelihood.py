"""Plain text is judged by its likelihood: bits per byte of held-out documents, the tuned model against its base, document by document.

Bytes, not tokens: the number then means the same for every tokenizer. Lower is better. The test is the one of all other verdicts (sign flips over the
paired documents, bootstrap interval); the documents are read in the same windows as in training, so what a window cannot see costs both alike.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.errors import DataError
from burnish.evaluation.candidates import CANDIDATES
from burnish.models import (
    Chat,
    base_state,
    load_base,
    load_trained,
    negative_log_likelihood,
    tokens_of,
    trained_hash,
    verify_adapter,
    weights_hash,
)
from burnish.recipe import Recipe
from burnish.run import Run, append_line, hash_of, read_lines
from burnish.tasks import Difference, bootstrap_interval, compare, judge
from burnish.types import Comparison, Dataset, Example, Tell, Verdict, silent

BITS_PER_BYTE = "bits_per_byte"
TEXT_CANDIDATES = {"base": "base model", "tuned": "fine-tuned"}  # what a text can be measured on: nothing is asked, so nothing can be shown
_SHOWN_CHARACTERS = 600  # of a document, in comparison.json and the report


def measure_text(run: Run, dataset: Dataset, recipe: Recipe, chat: Chat, *, trained: bool, tell: Tell = silent) -> None:
    """Bits of every test document under the base (`trained=False`) or the tuned model. Documents measured already are kept."""
    names = [name for name in recipe.evaluation.candidates if name in TEXT_CANDIDATES and CANDIDATES[name].trained == trained]
    if not names:
        return
    identity = base_state(recipe)
    if trained:
        identity = hash_of(identity, trained_hash(verify_adapter(run.adapter_folder, weights_hash(recipe.model.name))))
    key = hash_of(BITS_PER_BYTE, identity, recipe.data.max_length, chat.template_hash)
    path = run.predictions_file(names[0])
    done = {row["example"] for row in _measured(path, key)}
    if not done:
        path.unlink(missing_ok=True)
        append_line(path, {"key": key, "candidate": names[0]})
    missing = [example for example in dataset.test if example.id not in done]
    model = (load_trained(recipe, run.adapter_folder, tell) if trained else load_base(recipe, tell)) if missing else None
    for number, example in enumerate(missing, 1):
        started = time.perf_counter()
        windows = tokens_of(chat, example, recipe)
        bits = negative_log_likelihood(model, windows) / math.log(2)
        row = {"example": example.id, "bits": bits, "bytes": size_bytes(example), "tokens": sum(window.target_tokens for window in windows)}
        append_line(path, row | {"seconds": round(time.perf_counter() - started, 4)}, sync=True)
        tell(f"bits per byte: {TEXT_CANDIDATES[names[0]]}", len(done) + number, len(dataset.test), "")


def compare_text(run: Run, recipe: Recipe, test: Sequence[Example]) -> dict[str, Any]:
    """What comparison.json holds, from the bits in the run. Raises DataError where documents are missing."""
    names: list[str] = [name for name in recipe.evaluation.candidates if name in TEXT_CANDIDATES]
    measured = {name: _complete(run, name, test) for name in names}
    values: dict[str, list[float]] = {name: [row["bits"] / row["bytes"] for row in rows] for name, rows in measured.items()}
    groups = [example.group for example in test]
    settings = recipe.evaluation
    comparisons = _comparisons(values, groups, recipe)
    content: dict[str, Any] = {
        "metric": BITS_PER_BYTE,
        "metric_title": "Bits per byte",
        "metric_reads": "The mean over the documents of −log2 p(document) ÷ its bytes in UTF-8; lower is better.",
        "metric_reason": "plain text is judged by how well it is predicted",
        "unit": "bits per byte",
        "lower_is_better": True,
        "binary": False,
        "confidence": settings.confidence,
        "rows": len(test),
        "groups": len(set(groups)),
        "left_out": 0,
        "detectable_difference": None,
        "verdict": str(comparisons[0].verdict if comparisons else Verdict.CANT_TELL),
        "best_baseline": "base" if "base" in names else None,
        "batch_size": None,
        "candidates": [_row(run, recipe, name, measured[name], values[name], groups) for name in names],
        "comparisons": [{**dataclasses.asdict(item), "verdict": str(item.verdict)} for item in comparisons],
        "fields": None,
        "rows_detail": [
            {
                "example": example.id,
                "source": example.source,
                "question": "",
                "reference": _shown(example.reference),
                "answers": {},
                "scores": {name: round(part[index], 6) for name, part in values.items()},
                "reasons": {},
            }
            for index, example in enumerate(test)
        ],
    }
    content["sentence"] = _sentence(content)
    return content


def is_measured(run: Run, name: str, test: Sequence[Example]) -> bool:
    """Whether the bits of all test documents are on the disk."""
    path = run.predictions_file(name)
    return path.exists() and {example.id for example in test} <= {row["example"] for row in read_lines(path) if "bits" in row}


def size_bytes(example: Example) -> int:
    return len(example.reference.encode("utf-8"))


def _measured(path: Path, key: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = read_lines(path)
    return [row for row in rows if "bits" in row] if next(rows, {}).get("key") == key else []


def _complete(run: Run, name: str, test: Sequence[Example]) -> list[dict[str, Any]]:
    path = run.predictions_file(name)
    found = {row["example"]: row for row in (read_lines(path) if path.exists() else ()) if "bits" in row}
    if missing := [example for example in test if example.id not in found]:
        raise DataError(f"{path}: {len(missing)} of {len(test)} test documents are not measured: run `burnish evaluate` first")
    return [found[example.id] for example in test]


def _comparisons(values: dict[str, list[float]], groups: list[str], recipe: Recipe) -> list[Comparison]:
    """Tuned against base. The statistics know only that more is better, so they get what was saved and the signs are turned back."""
    if not values.keys() >= {"base", "tuned"}:
        return []
    settings = recipe.evaluation
    saved: Difference = compare(
        values["base"],
        values["tuned"],
        binary=False,
        groups=groups,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=recipe.seed,
    )
    (item,) = judge({"base": saved}, "tuned", metric=BITS_PER_BYTE, confidence=settings.confidence)
    return [dataclasses.replace(item, difference=-item.difference, low=-item.high, high=-item.low)]


def _row(run: Run, recipe: Recipe, name: str, rows: list[dict[str, Any]], values: list[float], groups: list[str]) -> dict[str, Any]:
    settings = recipe.evaluation
    low, high = bootstrap_interval(values, groups=groups, confidence=settings.confidence, resamples=settings.resamples, seed=recipe.seed)
    bits, tokens = sum(row["bits"] for row in rows), sum(row["tokens"] for row in rows)
    further = {
        "corpus_bits_per_byte": ("Bits per byte of all documents together", bits / sum(row["bytes"] for row in rows)),
        "perplexity": ("Perplexity per token", 2 ** (bits / tokens)),
    }
    return {
        "name": name,
        "title": TEXT_CANDIDATES[name],
        "score": round(float(np.mean(values)), 6),
        "low": round(low, 6),
        "high": round(high, 6),
        "n": len(rows),
        "unscored": 0,
        "unscored_reasons": {},
        "metrics": {key: {"title": title, "value": round(value, 6)} for key, (title, value) in further.items()},
        "seconds_p50": round(float(np.percentile([row["seconds"] for row in rows], 50)), 4),
        "seconds_p95": round(float(np.percentile([row["seconds"] for row in rows], 95)), 4),
        "prompt_tokens_mean": round(tokens / len(rows), 1),
        "completion_tokens_mean": 0.0,
        "training_seconds": run.read_json(run.training_file)["seconds"] if CANDIDATES[name].trained else None,
    }


def _sentence(content: dict[str, Any]) -> str:
    scores, rows = {row["name"]: row["score"] for row in content["candidates"]}, content["rows"]
    if not content["comparisons"]:
        return f"No verdict: nothing trained was compared with a baseline. Measured: bits per byte on {rows} test documents."
    (item,) = content["comparisons"]
    groups = f" in {content['groups']} groups" if content["groups"] < rows else ""
    numbers = (
        f"{scores['tuned']:.4f} bits per byte against {scores['base']:.4f} for the base model: {item['difference']:+.4f} "
        f"[{item['low']:+.4f}, {item['high']:+.4f}], lower is better, {rows} test documents{groups}"
    )
    if content["verdict"] == Verdict.BETTER:
        return f"The fine-tuned model predicts the held-out text better than its base: {numbers}."
    if content["verdict"] == Verdict.WORSE:
        return f"The fine-tuned model predicts the held-out text worse than its base: {numbers}. Do not ship it."
    return f"Can't tell whether the fine-tuned model predicts the held-out text better than its base: {numbers}."


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
