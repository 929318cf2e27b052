"""`burnish decide --bases`: several base models on the same rows. Each is decided on in a run of its own; one table, one recommendation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from burnish import advice, evaluation
from burnish.errors import RecipeError
from burnish.models import find_model, licence_of, load_base, load_chat, negative_log_likelihood, weights_bytes
from burnish.pipeline.decide import Wish, decide
from burnish.pipeline.steps import dataset_of, prepare, task_of
from burnish.recipe import Recipe
from burnish.run import Run, hash_of
from burnish.types import Dataset, Example, Tell, silent

TEXT_ROWS = 64  # of the user's text, for bits per byte and tokens per word


def decide_bases(job: Run, names: Sequence[str], *, wish: Wish, tell: Tell = silent) -> dict[str, Any]:
    """Returns what bases.json holds: a row for each base, and which to take. Raises RecipeError for a base that is not there, before any is measured."""
    if len(set(names)) < 2:
        raise RecipeError(f"--bases {','.join(names)}: name at least two different base models, separated by commas")
    for name in names:
        find_model(name)
    dataset = prepare(job, tell=tell)
    rows = [_measure(job, name, dataset, wish, tell) for name in names]
    paired = _paired(job, rows, dataset)
    choice = advice.choose_base(rows, paired)
    content = {**choice, "metric_title": paired["metric_title"], "test_rows": len(dataset.test), "bases": rows, "pairs": paired["pairs"]}
    job.write_json(job.bases_file, content)
    return content


def _paired(job: Run, rows: Sequence[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
    """Every base against every other at its best, and the smallest one tuned against the largest one untrained."""
    answers = {row["base"]: job.path / row["answers"] for row in rows if row["answers"]}
    pairs = [(a, b) for a in answers for b in answers if a != b]
    small, large = (pick(rows, key=lambda row: row["weights_gb"]) for pick in (min, max))
    extra = (small["base"], f"{large['base']}, untrained")
    if small["after"] is not None and large["before_answers"] and small is not large:
        answers[extra[1]] = job.path / large["before_answers"]
        pairs.append(extra)
    recipe = job.recipe()
    paired = evaluation.weigh_runs(answers, recipe, task_of(recipe, dataset), dataset, pairs)
    one = [pair for pair in paired["pairs"] if (pair["candidate"], pair["baseline"]) == extra]
    return {**paired, "small_tuned_against_large": one[0] if one else None}


def _measure(job: Run, name: str, dataset: Dataset, wish: Wish, tell: Tell) -> dict[str, Any]:
    asked = job.recipe_as_asked()
    recipe = asked.model_copy(update={"model": asked.model.model_copy(update={"name": name})})
    folder = job.base_folder(f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')[-40:]}-{hash_of(name)[:6]}")
    with Run.working(folder, recipe) as place:

        def titled(what: str, done: int, total: int, detail: str) -> None:
            tell(f"{name}: {what}", done, total, detail)

        found = decide(place, wish=wish, tell=titled)
        own = dataset_of(place)
        if [e.id for e in own.test] != [e.id for e in dataset.test]:
            raise RecipeError(
                f"{name}: its tokenizer leaves other test rows (too long ones?) than the recipe's own model: raise data.max_length"
            )
        text = _text_facts(recipe, place.recipe(), own.test, titled)
    scores = {row["name"]: row for row in found["candidates"]}
    best = found["best"]
    before = max(
        (best[f] for f in ("prompt", "retrieve") if f in best and scores[best[f]]["name"] != "neighbours"),
        key=lambda n: scores[n]["score"],
        default=None,
    )
    after = best.get("tuned")
    kept = scores[after] if after is not None else scores[before] if before is not None else None
    probed = folder / found["probe"]["folder"] if found["probe"] and found["probe"]["folder"] else folder
    where = {
        candidate: Run(probed if candidate == after else folder).predictions_file(candidate) for candidate in (before, after) if candidate
    }
    shown = {candidate: str(path.relative_to(job.path)) for candidate, path in where.items()}
    return {
        "base": name,
        "answers": shown.get(after or before or ""),
        "before_answers": shown.get(before or ""),
        "before": None if before is None else scores[before]["score"],
        "before_candidate": before,
        "after": None if after is None else scores[after]["score"],
        "after_low": None if after is None else scores[after]["low"],
        "after_high": None if after is None else scores[after]["high"],
        "seconds_p50": None if kept is None else kept["seconds_p50"],
        "cost_per_1000": None if kept is None else kept["cost_per_1000"],
        "training_seconds": found["costs"]["training_seconds"],
        "training_memory_gb": None if found["probe"] is None else round(found["probe"]["memory_bytes"] / 1e9, 3),
        "weights_gb": round(weights_bytes(name) / 1e9, 3),
        "licence": licence_of(name),
        "verdict": found["verdict"],
        **text,
    }


def _text_facts(asked: Recipe, recipe: Recipe, rows: Sequence[Example], tell: Tell) -> dict[str, Any]:
    """How well the untrained base predicts the user's own text, and into how many tokens it cuts a word."""
    chat = load_chat(asked.model, tell)
    texts = [f"{row.question}\n{row.reference}" for row in sorted(rows, key=lambda row: row.id)[:TEXT_ROWS]]
    windows = [tokens for text in texts for tokens in chat.text_tokens(text, recipe.data.max_length)]
    words = sum(len(text.split()) for text in texts)
    model = load_base(recipe, tell)
    nats = negative_log_likelihood(model, windows)
    return {
        "bits_per_byte": round(nats / math.log(2) / sum(len(text.encode()) for text in texts), 4),
        "tokens_per_word": round(sum(window.target_tokens for window in windows) / max(1, words), 3),
    }
