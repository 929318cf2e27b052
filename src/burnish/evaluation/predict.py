"""Answers of one candidate to many examples: batched, kept as they come, taken up again by example id."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from burnish.evaluation.candidates import CANDIDATES, Context, Setting, fitting
from burnish.evaluation.endpoint import Request
from burnish.models import Generation, Limits, end_at_stop, generate
from burnish.run import append_line, hash_of, read_lines
from burnish.types import Example, Prediction, Tell, silent

_VOTES_AT_ONCE, _ASKED_AT_ONCE = 64, 16  # answers written down together


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
    already there (to the same prompts with the same limits) are not made again. `model` is not looked at where somebody else answers."""
    limits = limits if not CANDIDATES[candidate].trained else Limits(limits.max_new_tokens)  # a tuned model must stop by itself
    asked, shown = _asked(candidate, examples, setting, context)
    key = hash_of(candidate, dataclasses.asdict(setting), options.identity, dataclasses.asdict(limits), sorted(asked.items()))
    done = _kept(options.keep, key)
    missing = [example for example in examples if example.id not in done]
    if options.keep is not None and not done:
        options.keep.unlink(missing_ok=True)
        append_line(options.keep, {"key": key, "candidate": candidate, **dataclasses.asdict(setting), "shots_shown": round(shown, 2)})
    title = options.title or CANDIDATES[candidate].title

    def tell(what: str, count: int, total: int, detail: str) -> None:
        options.tell(title, count + len(done), total + len(done), detail)

    answered = dict(done)
    started = time.perf_counter()
    by = {"model": _by_model, "neighbours": _by_neighbours, "endpoint": _by_endpoint}[CANDIDATES[candidate].by]
    work = _Work(model, [asked[example.id] for example in missing], missing, setting, context, limits, options.batch_size, tell)
    for batch in by(work) if missing else ():
        for index, answer in batch:
            prediction = Prediction(
                example=missing[index].id,
                candidate=candidate,
                text=answer.text,
                finish_reason=answer.finish_reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                seconds=round(answer.seconds, 6),
            )
            answered[prediction.example] = prediction
            if options.keep is not None:
                append_line(options.keep, dataclasses.asdict(prediction))
        if options.keep is not None:
            append_line(options.keep, {"batch_rows": len(batch), "batch_seconds": round(time.perf_counter() - started, 6)}, sync=True)
        started = time.perf_counter()
    return [answered[example.id] for example in examples]


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    model: Any
    asked: Sequence[Any]  # tokens, messages, or (question, state of what votes)
    examples: Sequence[Example]
    setting: Setting
    context: Context
    limits: Limits
    batch_size: int
    tell: Tell


Batches = Iterator[Sequence[tuple[int, Generation]]]


def _asked(candidate: str, examples: Sequence[Example], setting: Setting, context: Context) -> tuple[dict[str, Any], float]:
    """What each row's answerer is given, and how many shots it sees on average: fewer than asked for where some did not fit."""
    by, library = CANDIDATES[candidate].by, context.library
    questions = [example.question for example in examples]
    if by == "neighbours":  # what answers is the pool: the same question to another pool is another question
        state = library.state(setting.pool)
        return {example.id: (example.question, state) for example in examples}, float(setting.shots)
    if setting.shots:
        library.ask(questions, setting.way, "examples")
    if setting.passages:  # of the shots, too, each of which brings its own
        shown = (
            [shot.question for question in questions for shot in library.examples(question, setting.shots, setting.way)]
            if setting.shots
            else []
        )
        library.ask([*questions, *shown], setting.way, "passages")
    arranged = {example.id: fitting(candidate, example, setting, context) for example in examples}
    mean = sum(shots for _, _, shots in arranged.values()) / max(1, len(arranged))
    return {name: messages if by == "endpoint" else ids for name, (messages, ids, _) in arranged.items()}, mean


def _by_model(work: _Work) -> Batches:
    return generate(work.model, work.context.chat, work.asked, work.limits, batch_size=work.batch_size, tell=work.tell)


def _by_neighbours(work: _Work) -> Batches:
    """Each waits for its batch's questions to be embedded, where meaning decides, and for its own vote."""
    library, setting = work.context.library, work.setting
    for start in range(0, len(work.asked), _VOTES_AT_ONCE):
        questions = [question for question, _ in work.asked[start : start + _VOTES_AT_ONCE]]
        began = time.perf_counter()
        library.ask(questions, setting.way, setting.pool, again=True)
        made_ready = time.perf_counter() - began
        batch: list[tuple[int, Generation]] = []
        for index, question in enumerate(questions, start):
            began = time.perf_counter()
            text = library.vote(question, setting.shots, setting.way, setting.pool)
            batch.append((index, Generation(text, "stop", 0, 0, made_ready + time.perf_counter() - began)))
        work.tell("", start + len(batch), len(work.asked), "")
        yield batch


def _by_endpoint(work: _Work) -> Batches:
    """Many at a time, so that what was paid for is written down soon."""
    client = work.context.client
    assert client is not None
    for start in range(0, len(work.asked), _ASKED_AT_ONCE):
        part = work.asked[start : start + _ASKED_AT_ONCE]
        answers = client.ask_all([Request(tuple(messages), work.limits.max_new_tokens) for messages in part])
        work.tell("", start + len(part), len(work.asked), f"spent {client.spent:.4f}")
        yield [
            (
                start + index,
                Generation(
                    end_at_stop(answer.text, work.limits),
                    answer.finish_reason,
                    answer.prompt_tokens or 0,
                    answer.completion_tokens or 0,
                    answer.seconds,
                ),
            )
            for index, answer in enumerate(answers)
        ]


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
