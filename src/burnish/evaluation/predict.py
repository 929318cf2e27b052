"""Answers of one candidate to many examples: batched, kept as they come, taken up again by example id."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.evaluation.candidates import CANDIDATES, Context, Setting, prompt_ids
from burnish.models import Limits, generate
from burnish.run import append_line, hash_of, read_lines
from burnish.types import Example, Prediction, Tell, silent


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    batch_size: int
    identity: str = ""  # of the weights: answers of other weights are not taken up
    keep: Path | None = None
    title: str = ""
    tell: Tell = silent


def predict(
    model: Any, candidate: str, examples: Sequence[Example], *, setting: Setting, context: Context, limits: Limits, options: Options
) -> list[Prediction]:
    """One prediction for each example, in order. With `options.keep`, answers are appended to that file as batches end, and answers
    already there (to the same prompts with the same limits) are not made again."""
    limits = limits if not CANDIDATES[candidate].trained else Limits(limits.max_new_tokens)  # a tuned model must stop by itself
    arranged = {example.id: prompt_ids(candidate, example, setting, context) for example in examples}
    prompts = {name: ids for name, (ids, _) in arranged.items()}
    shown = sum(shots for _, shots in arranged.values()) / max(1, len(arranged))  # mean; less than setting.shots where some did not fit
    key = hash_of(candidate, dataclasses.asdict(setting), options.identity, dataclasses.asdict(limits), sorted(prompts.items()))
    done = _kept(options.keep, key)
    missing = [example for example in examples if example.id not in done]
    if options.keep is not None and not done:
        options.keep.unlink(missing_ok=True)
        append_line(options.keep, {"key": key, "candidate": candidate, **dataclasses.asdict(setting), "shots_shown": round(shown, 2)})
    title = options.title or CANDIDATES[candidate].title

    def tell(what: str, count: int, total: int, detail: str) -> None:
        options.tell(title, count + len(done), total + len(done), detail)

    answered = dict(done)
    rows = [prompts[example.id] for example in missing]
    started = time.perf_counter()
    for batch in generate(model, context.chat, rows, limits, batch_size=options.batch_size, tell=tell) if missing else ():
        for index, answer in batch:
            prediction = Prediction(
                example=missing[index].id,
                candidate=candidate,
                text=answer.text,
                finish_reason=answer.finish_reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                seconds=round(answer.seconds, 4),
            )
            answered[prediction.example] = prediction
            if options.keep is not None:
                append_line(options.keep, dataclasses.asdict(prediction))
        if options.keep is not None:
            append_line(options.keep, {"batch_rows": len(batch), "batch_seconds": round(time.perf_counter() - started, 4)}, sync=True)
        started = time.perf_counter()
    return [answered[example.id] for example in examples]


def read_predictions(path: Path) -> list[Prediction]:
    """The answers of a file that `predict` wrote."""
    return [Prediction(**row) for row in read_lines(path) if "example" in row]


def rows_per_second(path: Path) -> float | None:
    """Answers per second of all batches that the file tells of."""
    batches = [row for row in read_lines(path) if "batch_seconds" in row]
    seconds = sum(row["batch_seconds"] for row in batches)
    return round(sum(row["batch_rows"] for row in batches) / seconds, 3) if seconds else None


def _kept(path: Path | None, key: str) -> dict[str, Prediction]:
    if path is None or not path.exists():
        return {}
    rows = read_lines(path)
    head = next(rows, {})
    return {row["example"]: Prediction(**row) for row in rows if "example" in row} if head.get("key") == key else {}
