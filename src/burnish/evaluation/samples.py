"""Several answers to one question, drawn at a temperature, for the check of self-consistency. Kept as they come, like predictions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.evaluation.candidates import CANDIDATES, Context, Setting, fitting
from burnish.evaluation.predict import Options
from burnish.models import Limits, Sampling, generate
from burnish.recipe import Recipe
from burnish.recipe.checks import SelfConsistencySettings
from burnish.run import append_line, hash_of, read_lines
from burnish.types import Example


def drawing_of(recipe: Recipe) -> SelfConsistencySettings | None:
    """How many answers the recipe's checks want drawn, and how. None: none."""
    found = [check.settings for check in recipe.evaluation.checks or () if check.name == "self_consistency"]
    return found[0] if found else None


def draw_samples(
    model: Any, candidate: str, examples: Sequence[Example], *, setting: Setting, context: Context, limits: Limits, options: Options,
    drawing: SelfConsistencySettings, seed: int,
) -> None:  # fmt: skip
    """`drawing.samples` answers to each of the first `drawing.rows` examples by id, into `options.keep`. Draws already there are not made again.

    Only of candidates that the run's model answers; `predict` has looked up what their prompts show. A draw's random numbers come
    from (seed, example, number of the draw): they do not depend on what else is in its batch.
    """
    assert options.keep is not None
    limits = limits if not CANDIDATES[candidate].trained else Limits(limits.max_new_tokens)
    rows = sorted(examples, key=lambda example: example.id)[: drawing.rows]
    prompts = {example.id: fitting(candidate, example, setting, context)[1] for example in rows}
    key = hash_of(candidate, dataclasses.asdict(limits), options.identity, drawing.model_dump(), seed, sorted(prompts.items()))
    head = next(iter(read_lines(options.keep)), {}) if options.keep.exists() else {}
    if head.get("key") != key:
        options.keep.unlink(missing_ok=True)
        append_line(options.keep, {"key": key, "samples": drawing.samples, "temperature": drawing.temperature})
    done = {(row["example"], row["draw"]) for row in read_lines(options.keep) if "draw" in row}
    missing = [(example.id, draw) for draw in range(drawing.samples) for example in rows if (example.id, draw) not in done]
    if not missing:
        return
    title = f"{CANDIDATES[candidate].title}, drawn {drawing.samples} times"

    def tell(what: str, count: int, total: int, detail: str) -> None:
        options.tell(title, count + len(done), total + len(done), detail)

    sampling = Sampling(drawing.temperature, [_seed(seed, *which) for which in missing])
    ids = [prompts[name] for name, _ in missing]
    for batch in generate(model, context.chat, ids, limits, batch_size=options.batch_size, tell=tell, sampling=sampling):
        for index, answer in batch:
            name, draw = missing[index]
            append_line(options.keep, {"example": name, "draw": draw, "text": answer.text})


def read_samples(path: Path) -> dict[str, tuple[str, ...]]:
    """The drawn answers of each example that has them all."""
    found: dict[str, list[str]] = {}
    wanted = 0
    for row in read_lines(path) if path.exists() else ():
        wanted = int(row.get("samples", wanted))
        if "draw" in row:
            found.setdefault(str(row["example"]), []).append(str(row["text"]))
    return {name: tuple(drawn) for name, drawn in found.items() if len(drawn) == wanted}


def _seed(seed: int, example: str, draw: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {example} {draw}".encode()).digest()[:8], "big") >> 1
