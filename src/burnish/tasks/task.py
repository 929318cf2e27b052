"""What the data set asks for: `detect_task` looks at the training references, `TASKS` holds the kinds it knows.

Scoring follows one rule. An *unscored prediction* (the model was asked for JSON and wrote prose) counts as 0 in every
headline number and comparison, and is counted and shown beside it: leaving it out would reward a model for answering
only what it can. A row whose *reference* is unscorable is left out, for all candidates alike: nothing could be right
there.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from burnish.errors import DataError, RecipeError
from burnish.tasks.metrics import METRICS, Metric, Unreadable, label_of, parse_json
from burnish.types import Score

LABEL_CHARACTERS = 80  # at most, for a reference to be a label
ROWS_PER_LABEL = 5  # on average at least; with fewer, few distinct answers may be chance
STRUCTURED_CHARACTERS = 300  # median; beyond it one slip would decide too much
STRUCTURED_WORDS = 4  # median; shorter answers than this (names, codes, spans) are right or wrong whatever they look like
MOST = 0.95  # share of the references that must fit where a few odd rows are to be expected


@dataclass(frozen=True, slots=True)
class Task:
    kind: str  # a key of TASKS
    metric: str  # the primary metric: a key of METRICS or path/to/file.py:function
    further_metrics: tuple[str, ...]
    labels: tuple[str, ...] | None  # for classification, as the references spell them, sorted
    reason: str  # why this metric


@dataclass(frozen=True, slots=True)
class Kind:
    fits: Callable[[Sequence[str]], str | None]  # the reason, or None
    metric: str
    further_metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """One candidate's number."""

    value: float | None  # 0..1; None where no row could be scored at all
    n: int  # rows that count
    unscored: int  # of these, predictions that could not be read; they count as 0
    reasons: dict[str, int]  # why, most frequent first
    left_out: int  # rows whose reference is unscorable, the same for every candidate


# Detection


def _json(references: Sequence[str]) -> str | None:
    readable = 0
    for reference in references:
        try:
            readable += isinstance(parse_json(reference), dict | list)
        except Unreadable:
            continue
    if readable == len(references):
        return f"all {readable:,} references are JSON objects or lists"
    return None


def _numeric(references: Sequence[str]) -> str | None:
    marked = sum(bool(re.search(r"####\s*[-−$€£]*\.?\d", reference)) for reference in references)
    if marked >= MOST * len(references):
        return f"{marked:,} of {len(references):,} references give their answer as `#### number`"
    return None


def _labels(references: Sequence[str]) -> str | None:
    distinct = {label_of(reference) for reference in references}
    short = all(_one_line(reference) and len(reference) <= LABEL_CHARACTERS for reference in references)
    if short and 2 <= len(distinct) <= len(references) / ROWS_PER_LABEL:
        return f"{len(references):,} references share {len(distinct):,} distinct short answers: they are labels"
    return None


_STATEMENT = re.compile(r"\s*(select|insert|update|delete|create|with)\b", re.IGNORECASE)
_NOTATION = re.compile(r"[(\[{<].*[)\]}>]|[=|\\]|\w_\w")


def _structured(references: Sequence[str]) -> str | None:
    """Short answers in a notation (a call, SQL, a command), or so short that there is one right way to write them."""
    one_line = sum(map(_one_line, references))
    characters = median(map(len, references))
    if one_line < MOST * len(references) or characters > STRUCTURED_CHARACTERS:
        return None
    words = median(len(reference.split()) for reference in references)
    written = sum(bool(_STATEMENT.match(text) or _NOTATION.search(text)) for text in references)
    if written >= 0.8 * len(references):
        return f"{written:,} of {len(references):,} references are a line of notation (median {characters:.0f} characters)"
    if words <= STRUCTURED_WORDS:
        return f"references are short (median {words:.0f} words, one line)"
    return None


def _text(references: Sequence[str]) -> str | None:
    words = median(len(reference.split()) for reference in references)
    return f"references are free text (median {words:.0f} words): there is more than one right way to write them"


def _one_line(text: str) -> bool:
    return "\n" not in text.strip()


# In the order in which they are tried; the last one always fits.
TASKS: dict[str, Kind] = {
    "json": Kind(_json, "json_match", ("json_field_f1", "edit_similarity")),
    "numeric": Kind(_numeric, "numeric_answer", ("rouge_l", "edit_similarity")),
    "classification": Kind(_labels, "label_accuracy", ("macro_f1",)),
    "structured": Kind(_structured, "exact_match", ("edit_similarity", "bleu", "chrf")),
    "text": Kind(_text, "rouge_l", ("bleu", "chrf", "edit_similarity")),
}


def detect_task(references: Sequence[str]) -> Task:
    """The kind of task, judged by the references of the training split alone. DataError without references."""
    if not references:
        raise DataError("no references to judge the task by: the training split is empty")
    for name, kind in TASKS.items():
        reason = kind.fits(references)
        if reason is not None:
            labels = _spelt(references) if name == "classification" else None
            return Task(name, kind.metric, kind.further_metrics, labels, reason)
    raise AssertionError("the last kind of TASKS fits everything")


def _spelt(references: Sequence[str]) -> tuple[str, ...]:
    """Each label once, in its most frequent spelling."""
    spellings: dict[str, Counter[str]] = {}
    for reference in references:
        spellings.setdefault(label_of(reference), Counter())[reference.strip()] += 1
    return tuple(sorted(found.most_common(1)[0][0] for found in spellings.values()))


def task_for(metric: str, references: Sequence[str]) -> Task:
    """The detected task with `metric` (a key of METRICS, or path/to/file.py:function) as its primary metric.

    RecipeError for an unknown metric, a function that cannot be loaded, or a metric that can read none of the
    references.
    """
    found = find_metric(metric)
    task = detect_task(references)
    # A user's own function is not run here: it may be slow, and it may judge what it is not given.
    if metric in METRICS and not any(found.score(text, text).scored for text in references):
        raise RecipeError(
            f"metric {metric} can score none of {len(references):,} references "
            f"(the first: {found.score(references[0], references[0]).reason}); "
            f"they look like the task {task.kind!r}, whose metric is {task.metric}: {task.reason}"
        )
    further = tuple(name for name in (task.metric, *task.further_metrics) if name != metric)
    return Task(task.kind, metric, further, task.labels, "chosen in the recipe")


# Metrics by name


def find_metric(name: str) -> Metric:
    """The metric called `name`: a key of METRICS, or `path/to/file.py:function`. RecipeError if there is none."""
    if name in METRICS:
        return METRICS[name]
    if names_code(name):
        return _load(name)
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.4)
    raise RecipeError(
        f"unknown metric {name!r}"
        + (f"; did you mean {near[0]}?" if near else "")
        + f" Metrics: {', '.join(METRICS)}. Your own: path/to/file.py:function"
    )


def names_code(name: str) -> bool:
    """Whether `name` is a user's own code. `find_metric` runs it: who takes names from the network refuses these."""
    return ":" in name or name.endswith(".py")


def _load(name: str) -> Metric:
    """Run the user's file and wrap `function(prediction, reference) -> float | bool | None` (None: unscored)."""
    place, _, function_name = name.rpartition(":")
    path = Path(place).expanduser()
    if not function_name.isidentifier() or path.suffix != ".py":
        raise RecipeError(f"metric {name!r}: expected path/to/file.py:function")
    if not path.is_file():
        raise RecipeError(f"metric {name!r}: no file {path} (looked in {Path.cwd()})")
    module_name = f"burnish_user_metric_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"metric {name!r}: Python cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        raise RecipeError(f"metric {name!r}: {path} does not run: {type(problem).__name__}: {problem}") from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"metric {name!r}: {path} has no function {function_name}; it has {', '.join(there) or 'none'}")
    return Metric(name, function_name, _wrapped(function, name), None, False, f"{function_name} of {path.name}, your own.")


def _wrapped(function: Callable[[str, str], Any], name: str) -> Callable[[str, str], Score]:
    """A fault in the user's function stops the run: scored as 0 it would look like a bad model."""

    def score(prediction: str, reference: str) -> Score:
        try:
            value = function(prediction, reference)
        except Exception as problem:
            raise RecipeError(
                f"metric {name!r} raised {type(problem).__name__}: {problem} "
                f"for prediction {prediction[:80]!r} and reference {reference[:80]!r}; "
                "return None for an answer that cannot be scored"
            ) from problem
        if value is None:
            return Score(None, "prediction cannot be scored (the metric returned None)")
        if not isinstance(value, bool | int | float | np.bool_ | np.number) or not _in_range(value):
            raise RecipeError(f"metric {name!r} returned {value!r}; expected a number in 0..1, True, False or None")
        return Score(float(value))

    return score


def _in_range(value: Any) -> bool:
    try:
        return math.isfinite(value) and 0 <= value <= 1
    except (TypeError, OverflowError):  # a complex number, an int no float can hold
        return False


# Scores and headlines


def score_rows(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> list[Score]:
    """One score per row. ValueError for unequal lengths."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; expected one per row")
    return [metric.score(given, expected) for given, expected in zip(predictions, references, strict=True)]


def counts(score: Score) -> bool:
    """Whether the row of `score` counts, which depends on its reference alone."""
    return score.scored or not (score.reason or "").startswith("reference")


def values(scores: Sequence[Score]) -> list[float]:
    """The numbers of the rows that count, an unscored prediction as 0.0: the same rows for every candidate."""
    return [score.value if score.value is not None else 0.0 for score in scores if counts(score)]


def texts(scores: Sequence[Score], predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """(predictions, references) of the rows that count, for a corpus metric; an unscored prediction is ""."""
    rows = [row for row in zip(scores, predictions, references, strict=True) if counts(row[0])]
    return [given if score.scored else "" for score, given, _ in rows], [expected for _, _, expected in rows]


def headline(scores: Sequence[Score]) -> Headline:
    """The mean over the rows that count. For a metric with a `corpus` function use `measure`."""
    kept = values(scores)
    reasons = Counter(score.reason or "no reason given" for score in scores if counts(score) and not score.scored)
    return Headline(
        value=math.fsum(kept) / len(kept) if kept else None,
        n=len(kept),
        unscored=reasons.total(),
        reasons=dict(reasons.most_common()),
        left_out=len(scores) - len(kept),
    )


def measure(metric: Metric, predictions: Sequence[str], references: Sequence[str]) -> Headline:
    """The headline of `metric`: of the whole corpus where the metric says so, else the mean over rows."""
    scores = score_rows(metric, predictions, references)
    found = headline(scores)
    if metric.corpus is None or not found.n:
        return found
    value = metric.corpus(*texts(scores, predictions, references))
    return Headline(value, found.n, found.unscored, found.reasons, found.left_out)
