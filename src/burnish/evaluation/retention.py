"""What a model can do besides its task, row by row. SUITES is the table: each kind of suite is measured by a function of the same form.

    choice         the choice with the highest log-likelihood per byte of its text, after the question      1 right, 0 wrong
    continuation   whether greedy generation would write the continuation (LAMBADA); its log-likelihood beside it
    text           bits per byte of each passage; lower is better
    prompts        an answer to a prompt, in the chat template: `must_contain`, or a metric against `answer`
    harness        a task of lm-evaluation-harness, document by document

Log-likelihoods are of plain text, without a chat template: what is asked is what the weights still know, not whether the form of the task is kept. Per byte and not per
token: the number then means the same for every tokenizer (the harness' acc_norm divides by characters). To add a kind: write (model, items, ground) → rows, and add a line
here and to `suites.KINDS`.

Every row is on the disk as soon as it is measured, under a hash of the weights and of what was asked: nothing is measured twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import DataError, Problem
from burnish.evaluation.harness import run_harness
from burnish.evaluation.suites import Item, Suite
from burnish.models import Chat, Limits, continuation_tokens, generate, negative_log_likelihood, score_continuations
from burnish.run import append_line, hash_of, read_lines
from burnish.tasks import METRICS
from burnish.types import Tell, silent

RULES = 1  # of measuring; a change makes the rows on the disk another measurement's
_AT_ONCE = 32  # items between two writes
_SHOWN_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Ground:
    """How rows are asked."""

    chat: Chat
    window: int  # tokens that the model can read at once
    batch_size: int
    harness_rows: int | None = None
    tell: Tell = silent


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of one suite by one model."""

    item: str
    value: float
    facts: Mapping[str, Any]  # what a person may want to see beside the number: the answer, nats, tokens


Measure = Callable[[Any, Suite, Sequence[Item], Ground], Iterator[Measured]]


@dataclass(frozen=True, slots=True)
class Way:
    title: str
    measure: Measure
    binary: bool  # every value is 0 or 1, whatever the rows
    lower_is_better: bool = False
    unit: str | None = None  # none: a fraction


def choice(model: Any, suite: Suite, items: Sequence[Item], ground: Ground) -> Iterator[Measured]:
    """Length-normalised log-likelihood: argmax over the choices of log p(choice | question) ÷ its bytes in UTF-8."""
    sequences = [_tokens(ground, suite, item, question_of(item.row), f" {text.strip()}") for item in items for text in item.row["choices"]]
    scored = iter(score_continuations(model, sequences))
    for item in items:
        choices = item.row["choices"]
        rates = [-next(scored).nats / len(text.strip().encode("utf-8")) for text in choices]
        best = max(range(len(rates)), key=rates.__getitem__)
        yield Measured(
            item.id,
            float(choices[best] == choices[item.row["gold"]]),
            {"answer": choices[best], "nats_per_byte": round(-rates[item.row["gold"]], 6)},
        )


def question_of(row: Mapping[str, Any]) -> str:
    """What stands before a choice. A question asks for an answer; a beginning goes on by itself."""
    query = str(row["query"]).strip()
    return f"{query}\nAnswer:" if query.startswith("Question:") else query


def continuation(model: Any, suite: Suite, items: Sequence[Item], ground: Ground) -> Iterator[Measured]:
    """LAMBADA (arXiv 1606.06031): is the last word what greedy decoding writes?"""
    sequences = [_tokens(ground, suite, item, item.row["context"].rstrip(), f" {item.row['continuation'].strip()}") for item in items]
    for item, found in zip(items, score_continuations(model, sequences), strict=True):
        yield Measured(item.id, float(found.greedy), {"nats": round(found.nats, 6), "tokens": found.tokens})


def text(model: Any, suite: Suite, items: Sequence[Item], ground: Ground) -> Iterator[Measured]:
    for item in items:
        windows = ground.chat.text_tokens(item.row["text"], ground.window)
        bits = negative_log_likelihood(model, windows) / math.log(2)
        yield Measured(item.id, bits / len(item.row["text"].encode("utf-8")), {"tokens": sum(window.target_tokens for window in windows)})


def prompts(model: Any, suite: Suite, items: Sequence[Item], ground: Ground) -> Iterator[Measured]:
    """Greedy answers in the chat template, the same limits for every model."""
    limits = _limits(suite, ground.chat)
    asked = [ground.chat.prompt_ids([{"role": "user", "content": item.row["prompt"]}]) for item in items]
    if long := [item for item, ids in zip(items, asked, strict=True) if len(ids) + limits.max_new_tokens > ground.window]:
        raise _too_long(long[0], "prompt", ground.window)
    for batch in generate(model, ground.chat, asked, limits, batch_size=ground.batch_size):
        for index, answer in batch:
            item = items[index]
            yield Measured(item.id, judge_answer(item.row, answer.text), {"answer": answer.text[:_SHOWN_CHARACTERS]})


def judge_answer(row: Mapping[str, Any], answer: str) -> float:
    """0..1: whether every text of `must_contain` stands in the answer (upper and lower case alike), else the metric against `answer`; unreadable is 0."""
    wanted = row.get("must_contain")
    if wanted:
        parts = wanted if isinstance(wanted, list) else [wanted]
        return float(all(part.casefold() in answer.casefold() for part in parts))
    return METRICS[row.get("metric") or "exact_match"].score(answer, row["answer"]).value or 0.0


def harness(model: Any, suite: Suite, items: Sequence[Item], ground: Ground) -> Iterator[Measured]:
    for document, value, metric in run_harness(
        model, ground.chat, suite.name, window=ground.window, rows=ground.harness_rows, batch_size=ground.batch_size
    ):
        yield Measured(hash_of(suite.name, document), value, {"document": document, "metric": metric})


SUITES: dict[str, Way] = {
    "choice": Way("multiple choice", choice, binary=True),
    "continuation": Way("last word", continuation, binary=True),
    "text": Way("plain text, bits per byte", text, binary=False, lower_is_better=True, unit="bits per byte"),
    "prompts": Way("prompts and answers", prompts, binary=False),
    "harness": Way("lm-evaluation-harness", harness, binary=False),
}


def measure_suite(
    path: Path, state: str, model: Callable[[], Any], suite: Suite, ground: Ground, *, only: frozenset[str] | None = None, title: str = ""
) -> dict[str, Measured]:
    """Every row of the suite (`only`: those items) by the model, {item: row}. Rows are appended to `path` as they come; those there are not measured again.

    `state` names the weights. `model` is called where something is missing. Raises DataError where a row does not fit the model's window.
    """
    key = hash_of(RULES, state, suite.name, suite.kind, ground.chat.template_hash, ground.harness_rows if suite.kind == "harness" else None)
    rows = [row for row in read_lines(path) if row.get("key") == key] if path.exists() else []
    known = {row["item"]: Measured(row["item"], row["value"], row["facts"]) for row in rows if "item" in row}
    if suite.kind == "harness":
        if not any(row.get("whole") for row in rows):
            for found in SUITES["harness"].measure(model(), suite, (), ground):
                known[found.item] = _keep(path, key, found)
            append_line(path, {"key": key, "whole": True}, sync=True)
        return {item: row for item, row in known.items() if only is None or item in only}
    wanted = [item for item in suite.items if only is None or item.id in only]
    missing = [item for item in wanted if item.id not in known]
    loaded = model() if missing else None
    for start in range(0, len(missing), _AT_ONCE):
        part = missing[start : start + _AT_ONCE]
        for found in SUITES[suite.kind].measure(loaded, suite, part, ground):
            known[found.item] = _keep(path, key, found)
        ground.tell(f"{title or 'measuring'}: {suite.name}", len(wanted) - len(missing) + start + len(part), len(wanted), "")
    return {item.id: known[item.id] for item in wanted}


def _keep(path: Path, key: str, found: Measured) -> Measured:
    if not math.isfinite(found.value):
        raise DataError(
            f"a row of a suite was measured as {found.value}: the model's numbers are not finite, so nothing can be said about it"
        )
    append_line(path, {"key": key, "item": found.item, "value": found.value, "facts": dict(found.facts)})
    return found


def _tokens(ground: Ground, suite: Suite, item: Item, context: str, text: str) -> Any:
    try:
        return continuation_tokens(ground.chat, context, text, ground.window)
    except ValueError as problem:
        raise _too_long(item, suite.kind, ground.window, str(problem)) from problem


def _too_long(item: Item, field: str, window: int, why: str = "too long") -> DataError:
    return DataError(
        "a row of a suite does not fit this model",
        [Problem(f"{item.source}:{field}", why, f"shorten it: the model reads {window} tokens at once")],
    )


def _limits(suite: Suite, chat: Chat) -> Limits:
    """The same for base and tuned, from the whole suite. Answers end at a line's end where each of the expected ones is one line."""
    expected = [str(item.row.get("answer") or "") for item in suite.items]
    longest = max((len(chat.text_ids(text)) for text in expected), default=0)
    if all(expected):
        return Limits(min(512, 2 * longest + 12), () if any("\n" in text.strip() for text in expected) else ("\n",))
    return Limits(min(512, max(96, 2 * longest + 12)))
