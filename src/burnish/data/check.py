"""Examples → what is wrong with them, all at once, and what they look like in numbers.

The tokenizer comes in as a function, so that this room needs no torch and counts with the same code that trains.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from burnish.data.formats import make_example
from burnish.errors import ModelError, Problem
from burnish.recipe import DataSection
from burnish.types import Example, Tell, Tokens, silent

Tokenize = Callable[[Example], list[Tokens]]
FindControl = Callable[[str], str | None]


@dataclass(slots=True)
class Checked:
    """What stays, what was left out and why, what stops the run, what should be known."""

    examples: list[Example]
    removed: list[tuple[Example, str]] = field(default_factory=list)  # (row, reason)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)  # Example.id → (tokens, target tokens)


def check_examples(
    examples: Sequence[Example],
    data: DataSection,
    *,
    tokenize: Tokenize | None = None,
    find_control: FindControl | None = None,
    tell: Tell = silent,
) -> Checked:
    """Duplicates, contradictions, control tokens inside text, rows over data.max_length, rows that train no token.

    `tokenize` turns an example into the sequences it is trained as; without it, lengths are not checked. `find_control` returns the first
    control token inside a text, or None.
    """
    checked = Checked([])
    first_seen: dict[str, Example] = {}
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    pairs: dict[tuple[str, str, str], str] = {}  # (prompt, better, worse) → source; one prompt may have many
    for number, example in enumerate(examples, 1):
        if number % 500 == 0 or number == len(examples):
            tell("checking rows", number, len(examples), "")
        if example.id in first_seen:
            checked.removed.append((example, "duplicate"))
            checked.warnings.append(
                Problem(example.source, f"duplicate of {first_seen[example.id].source}", "nothing: the first is kept, this one is left out")
            )
            continue
        first_seen[example.id] = example
        if find_control is not None and (found := _control_tokens(example, find_control)):
            checked.problems += found
            continue
        kept = example if tokenize is None else _fit(example, data, tokenize, checked)
        if kept is None:
            continue
        if not kept.prompt:
            pass  # plain text answers nothing
        elif kept.rejected is None:
            answers[repr([message["content"] for message in kept.prompt])].setdefault(kept.reference, kept.source)
        elif opposite := pairs.get((prompt := repr([message["content"] for message in kept.prompt]), kept.rejected, kept.reference)):
            do = "decide which is right: a model can learn only one"
            checked.warnings.append(Problem(kept.source, f"prefers the opposite of {opposite}", do))
        else:
            pairs[prompt, kept.reference, kept.rejected] = kept.source
        checked.examples.append(kept)
    for by_answer in answers.values():
        if len(by_answer) > 1:
            first, *others = by_answer.values()
            checked.warnings += [
                Problem(other, f"another answer to the same prompt as {first}", "decide which is right: a model can learn only one")
                for other in others
            ]
    return checked


def statistics(checked: Checked, total: int) -> dict[str, Any]:
    """Counts, percentiles of token lengths, duplicate share (of all rows read)."""
    reasons = Counter(reason for _, reason in checked.removed)
    result: dict[str, Any] = {
        "rows": total,
        "kept": len(checked.examples),
        "groups": len({example.group for example in checked.examples}),
        "duplicate_fraction": round(reasons["duplicate"] / total, 6) if total else 0.0,
        "removed": dict(reasons),
        "turns_mean": round(float(np.mean([len(e.messages) for e in checked.examples])), 2) if checked.examples else 0.0,
    }
    if lengths := token_lengths(checked.examples, checked.lengths):
        result["token_lengths"] = lengths
    return result


def token_lengths(examples: Sequence[Example], lengths: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Percentiles in tokens over the examples whose lengths are known; empty where none is."""
    known = np.array([lengths[e.id] for e in examples if e.id in lengths])  # (N, 2): all tokens, target tokens
    if not len(known):
        return {}
    result: dict[str, int] = {}
    for name, column in (("", known[:, 0]), ("target_", known[:, 1])):
        result |= {f"{name}p{q}": int(np.percentile(column, q, method="higher")) for q in (50, 90, 99)}
        result |= {f"{name}max": int(column.max()), f"{name}total": int(column.sum())}
    return result


def _control_tokens(example: Example, find_control: FindControl) -> list[Problem]:
    do = "remove it: the template writes control tokens, a text must not"
    texts = [(f"messages[{index}].content", message["content"]) for index, message in enumerate(example.messages)]
    texts += [] if example.rejected is None else [("rejected", example.rejected)]
    return [
        Problem(f"{example.source}:{field}", f"the control token {token} inside the text", do)
        for field, text in texts
        if (token := find_control(text)) is not None
    ]


def _sequences(example: Example, tokenize: Tokenize) -> tuple[list[Tokens], list[Tokens]]:
    """What the row is computed as, and (of a preference pair) its rejected answer's conversation."""
    return tokenize(example), tokenize(example.worse) if example.worse is not None else []


def _longest(sequences: tuple[list[Tokens], list[Tokens]]) -> int:
    return max((len(tokens.input_ids) for part in sequences for tokens in part), default=0)


def _fit(example: Example, data: DataSection, tokenize: Tokenize, checked: Checked) -> Example | None:
    """Apply data.over_length and refuse a row that trains nothing. None: the row is out (and said so)."""
    try:
        sequences = _sequences(example, tokenize)
    except ModelError as problem:
        checked.problems.append(Problem(example.source, str(problem), "change the row or the template"))
        return None
    length = _longest(sequences)
    if length > data.max_length:
        found = f"{length} tokens, over data.max_length {data.max_length}"
        if data.over_length == "error":
            checked.problems.append(
                Problem(example.source, found, "shorten it, raise data.max_length, or set data.over_length to drop or truncate-prompt")
            )
            return None
        shorter = _truncate_prompt(example, data.max_length, tokenize) if data.over_length == "truncate-prompt" else None
        if shorter is None:
            why = "over-long" if data.over_length == "drop" else "over-long even without its prompt"
            checked.removed.append((example, why))
            checked.warnings.append(Problem(example.source, found, f"left out ({why})"))
            return None
        checked.warnings.append(Problem(example.source, found, "the start of its longest user message was cut"))
        example, sequences = shorter, _sequences(shorter, tokenize)
        length = _longest(sequences)
    targets = sum(tokens.target_tokens for tokens in sequences[0])
    if targets == 0:
        checked.problems.append(
            Problem(example.source, "no token of this row is trained", "give it an answer, or a weight of 1, or remove it")
        )
        return None
    checked.lengths[example.id] = (length, targets)
    return example


def _truncate_prompt(example: Example, max_length: int, tokenize: Tokenize) -> Example | None:
    """Cut the start of the longest user text until the row fits; never the answer. None where even that does not do."""
    index = max((i for i, m in enumerate(example.messages) if m["role"] == "user"), key=lambda i: len(example.messages[i]["content"]))
    text = example.messages[index]["content"]

    def cut(keep: int) -> Example:
        messages = list(example.messages)
        messages[index] = {**messages[index], "content": text[len(text) - keep :].lstrip() or "…"}
        return make_example(messages, source=example.source, group=example.group, metadata=example.metadata, rejected=example.rejected)

    def fits(keep: int) -> bool:
        return _longest(_sequences(cut(keep), tokenize)) <= max_length

    low, high = 1, len(text)  # the largest `keep` that fits lies in [low, high)
    if not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return cut(low)
