"""What one model scores on rows of the task, row by row and kept on the disk: for models that are no candidates, such as an adapter at half its scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.evaluation.candidates import Setting, make_context
from burnish.evaluation.likelihood import BITS_PER_BYTE
from burnish.evaluation.predict import Options, predict
from burnish.evaluation.retention import Ground, measure_suite
from burnish.evaluation.retrieve import Library
from burnish.evaluation.suites import Item, Suite
from burnish.models import Chat, Limits
from burnish.recipe import Recipe
from burnish.run import append_line, hash_of, read_lines
from burnish.tasks import Task, counts, find_metric, score_rows
from burnish.types import Dataset, Example, Tell, silent

_LONGEST_PROMPT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one split, and how they are judged. A metric of the whole corpus (BLEU) counts by its rows' own scores here: they pair."""

    dataset: Dataset
    rows: tuple[Example, ...]
    recipe: Recipe
    chat: Chat
    task: Task | None  # none: plain text
    answers: Path  # what is answered goes here, as it comes
    known: Path | None = None  # a file of answers by the very weights that are asked, taken up where it fits

    @property
    def title(self) -> str:
        if self.task is None:
            return "bits per byte of the run's own text, turned round"
        metric = find_metric(self.task.metric)
        return metric.title if metric.corpus is None else f"{metric.title} (mean over rows)"


def score_task(
    path: Path, state: str, model: Callable[[], Any], wanted: TaskRows, *, title: str = "", tell: Tell = silent
) -> dict[str, float]:
    """{example: value, more is better} of every row that the metric can judge, as the tuned candidate is asked. Values are appended to `path`.

    `state` names the weights. `model` is called where answers are missing.
    """
    recipe, rows = wanted.recipe, wanted.rows
    if wanted.task is None:
        return _text_values(path, state, model, wanted, title=title, tell=tell)
    key = hash_of("task", state, [row.id for row in rows], wanted.task.metric, recipe.to_dict()["evaluation"], wanted.chat.template_hash)
    kept = {
        row["example"]: row["value"] for row in (read_lines(path) if path.exists() else ()) if row.get("key") == key and "example" in row
    }
    if not all(row.id in kept for row in rows):
        if wanted.known is not None and wanted.known.exists() and not wanted.answers.exists():
            wanted.answers.parent.mkdir(parents=True, exist_ok=True)
            wanted.answers.write_bytes(wanted.known.read_bytes())
        instruction = recipe.task.instruction or ""  # a tuned model is asked without one
        context = make_context(wanted.chat, wanted.task, Library(()), instruction=instruction, prompt_limit=_LONGEST_PROMPT_TOKENS)
        limits = Limits(int(recipe.evaluation.max_new_tokens))
        options = Options(recipe.evaluation.batch_size, identity=state, keep=wanted.answers, title=title, tell=tell)
        made = predict(model(), "tuned", rows, setting=Setting(), context=context, limits=limits, options=options)
        scores = score_rows(find_metric(wanted.task.metric), [answer.text for answer in made], [row.reference for row in rows])
        for row, score in zip(rows, scores, strict=True):
            kept[row.id] = (score.value or 0.0) if counts(score) else None
            append_line(path, {"key": key, "example": row.id, "value": kept[row.id]})
    return {row.id: kept[row.id] for row in rows if kept[row.id] is not None}


def _text_values(path: Path, state: str, model: Callable[[], Any], wanted: TaskRows, *, title: str, tell: Tell) -> dict[str, float]:
    """Plain text: bits per byte, turned round."""
    items = tuple(Item(row.id, {"text": row.reference}, row.source) for row in wanted.rows)
    ground = Ground(wanted.chat, wanted.recipe.data.max_length, wanted.recipe.evaluation.batch_size, tell=tell)
    found = measure_suite(path, state, model, Suite(f"task {BITS_PER_BYTE}", "text", items), ground, title=title)
    return {item: -row.value for item, row in found.items()}
