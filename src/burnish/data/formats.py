"""Raw rows → conversations. FORMATS is the table; the format is recognised from the rows' keys, never guessed.

    chat        {"messages": [{"role", "content", "weight"?}, …]}            OpenAI
    completion  {"prompt", "completion"}                                     OpenAI's older form, TRL
    alpaca      {"instruction", "input"?, "output"}                          Stanford Alpaca
    sharegpt    {"conversations": [{"from": "human" | "gpt", "value"}, …]}   ShareGPT, Vicuna
    columns     any columns that the recipe names (data.prompt_column, data.completion_column)
    preference  {"input": {"messages"}, "preferred_output", "non_preferred_output"}   OpenAI
                {"prompt"?, "chosen", "rejected"}, texts or lists of messages         TRL
    text        {"text": …}, or a .txt or .md file: plain text               only with training.objective: text

To add a format: write a function row → messages, and add a line to FORMATS; tests/contract/test_formats.py then runs on it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.read import Row
from burnish.errors import DataError, Problem
from burnish.recipe import DataSection
from burnish.types import Example, Message

ROLES = ("system", "user", "assistant")
_RENAMED_ROLES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_MESSAGE_KEYS = {"role", "content", "weight", "name"}


Found = list[tuple[str, str, str]]  # problems of one row: (field, what was found, what to do)


@dataclass(frozen=True, slots=True)
class Format:
    keys: tuple[str, ...]  # what a row of this format must have
    messages: Callable[[dict[str, Any], DataSection, Found], list[Message]]
    example: str  # a row, for errors and docs
    other_keys: tuple[tuple[str, ...], ...] = ()  # other sets of keys that do as well
    rejected: Callable[[dict[str, Any], Found], str | None] | None = None  # the worse answer, where rows have one
    objective: str = "supervised"  # `text`: read by training.objective text only, and never recognised by its keys

    def missing(self, row: dict[str, Any]) -> list[str]:
        """Keys that the row lacks: of the set it comes nearest to."""
        lacking = [[key for key in keys if key not in row] for keys in (self.keys, *self.other_keys)]
        return min(lacking, key=len)


def _chat(row: dict[str, Any], _: DataSection, problems: Found) -> list[Message]:
    return _message_list(row["messages"], "messages", ("role", "content"), problems)


def _sharegpt(row: dict[str, Any], _: DataSection, problems: Found) -> list[Message]:
    return _message_list(row["conversations"], "conversations", ("from", "value"), problems)


def _completion(row: dict[str, Any], _: DataSection, problems: Found) -> list[Message]:
    # Both forms are in use: plain texts, and lists of messages (TRL's conversational prompt/completion).
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return [
            *_message_list(row["prompt"], "prompt", ("role", "content"), problems),
            *_message_list(row["completion"], "completion", ("role", "content"), problems),
        ]
    return _pair(row, "prompt", "completion", problems)


def _alpaca(row: dict[str, Any], _: DataSection, problems: Found) -> list[Message]:
    messages = _pair(row, "instruction", "output", problems)
    extra = row.get("input")
    if isinstance(extra, str) and extra.strip():
        messages[0]["content"] = f"{messages[0]['content']}\n\n{extra}"
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _columns(row: dict[str, Any], data: DataSection, problems: Found) -> list[Message]:
    messages = _pair(row, str(data.prompt_column), str(data.completion_column), problems)
    if data.context_column is not None:
        context = row.get(data.context_column)
        if not isinstance(context, str):
            problems.append(
                (
                    data.context_column,
                    "missing" if context is None else f"not a text: {str(context)[:40]!r}",
                    "every row needs the context column",
                )
            )
        elif context.strip():
            messages[0]["content"] = f"{context}\n\n{messages[0]['content']}"
    return messages


def _preference(row: dict[str, Any], _: DataSection, problems: Found) -> list[Message]:
    """Prompt and better answer. Earlier answers are part of the prompt (weight 0): a preference is about the last one."""
    prompt, (better, worse) = _preference_parts(row, problems)
    if better is not None and worse is not None and better.strip() == worse.strip():
        problems.append((_answer_keys(row)[1], "the same text as the chosen answer", "a pair needs two different answers: remove the row"))
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]
    return [*context, {"role": "assistant", "content": better or ""}]


def _rejected(row: dict[str, Any], problems: Found) -> str | None:
    return _preference_parts(row, [])[1][1]  # its problems were told with the messages


def _answer_keys(row: dict[str, Any]) -> tuple[str, str]:
    return ("preferred_output", "non_preferred_output") if "preferred_output" in row else ("chosen", "rejected")


def _preference_parts(row: dict[str, Any], problems: Found) -> tuple[list[Message], tuple[str | None, str | None]]:
    """(prompt, (better, worse)) of either form."""
    prompt: list[Message] = []
    given = row["input"] if "preferred_output" in row else row.get("prompt")
    if "preferred_output" in row:
        found = given.get("messages") if isinstance(given, dict) else None
        prompt = _message_list(found, "input.messages", ("role", "content"), problems)
    elif isinstance(given, list):
        prompt = _message_list(given, "prompt", ("role", "content"), problems)
    elif given is not None:
        prompt = [_text_message(row, "prompt", "user", problems)]
    answers: list[str | None] = []
    prompts: list[list[Message]] = []  # those that stand in the answers, where they are whole conversations
    for key in _answer_keys(row):
        if not isinstance(row[key], list):
            answers.append(_text_message(row, key, "assistant", problems)["content"] or None)
            prompts.append([])
            continue
        messages = _message_list(row[key], key, ("role", "content"), problems)
        if messages and (messages[-1]["role"] != "assistant" or (len(messages) > 1 and messages[0]["role"] == "assistant")):
            problems.append((key, "not one assistant message", "write the one answer that is compared"))
        answers.append(str(messages[-1]["content"]) if messages else None)
        prompts.append(messages[:-1])
    if prompts[0] != prompts[1]:
        problems.append((_answer_keys(row)[1], "follows another conversation than the chosen answer", "both must answer the same prompt"))
    elif prompts[0]:
        # TRL's implicit prompt; a `prompt` beside it (UltraFeedback) only repeats its question.
        if prompt and prompt != prompts[0] and not any(message["content"] == prompt[-1]["content"] for message in prompts[0]):
            problems.append(("prompt", "not what the answers' conversations begin with", "leave the prompt out of one of them"))
        prompt = prompts[0]
    return prompt, (answers[0], answers[1])


def _text(row: dict[str, Any], _: DataSection, problems: list[tuple[str, str, str]]) -> list[Message]:
    """The document as one message of the model: its reference is what is learnt."""
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        problems.append(
            (
                "text",
                "empty" if text in ("", None) or isinstance(text, str) else f"not a text: {str(text)[:40]!r}",
                "write the text or remove it",
            )
        )
    return [{"role": "assistant", "content": text}]


FORMATS: dict[str, Format] = {
    "chat": Format(("messages",), _chat, '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'),
    "completion": Format(("prompt", "completion"), _completion, '{"prompt": "…", "completion": "…"}'),
    "alpaca": Format(("instruction", "output"), _alpaca, '{"instruction": "…", "input": "…", "output": "…"}'),
    "sharegpt": Format(
        ("conversations",), _sharegpt, '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'
    ),
    "columns": Format((), _columns, '{"YOUR_PROMPT_COLUMN": "…", "YOUR_COMPLETION_COLUMN": "…"}'),
    "preference": Format(
        ("input", "preferred_output", "non_preferred_output"),
        _preference,
        '{"prompt": "…", "chosen": "…", "rejected": "a worse …"}',
        other_keys=(("chosen", "rejected"),),
        rejected=_rejected,
    ),
    "text": Format(("text",), _text, '{"text": "…"}', objective="text"),
}

# Pairs of column names that people use; only ever proposed (by errors and `burnish init`), never taken silently.
_KNOWN_PAIRS = (
    ("input", "output"), ("question", "answer"), ("query", "response"), ("text", "label"), ("source", "target"), ("utterance", "intent"),
    ("input", "target"), ("x", "y"), ("user", "assistant"), ("email", "reply"), ("ticket", "reply"), ("document", "summary"), ("text", "summary"),
    ("sentence", "label"), ("message", "category"), ("text", "category"),
)  # fmt: skip


def recognise(rows: Sequence[Row], data: DataSection, path: str) -> str:
    """The one format that the rows' keys fit. None or two is a DataError that names the keys found."""
    if data.prompt_column is not None:
        if data.format not in ("auto", "columns"):
            raise DataError(f"data.prompt_column is given, but data.format is {data.format}: leave one of them out")
        return "columns"
    if data.format != "auto":
        return data.format
    known = {name: form for name, form in FORMATS.items() if form.keys and form.objective == "supervised"}
    counts = Counter(name for row in rows for name, form in known.items() if not form.missing(row.content))
    fitting = [name for name, count in counts.items() if count * 2 > len(rows)]
    if len(fitting) == 1:
        return fitting[0]
    keys = Counter(key for row in rows for key in row.content)
    found = ", ".join(key for key, _ in keys.most_common(20)) or "none"
    if fitting:
        raise DataError(f"{path}: the rows fit two formats ({' and '.join(fitting)}; keys found: {found}). Choose one with data.format")
    guess = guess_columns(list(keys))
    advice = (
        f"name the columns: data.prompt_column: {guess[0]}, data.completion_column: {guess[1]}"
        if guess
        else "name them with data.prompt_column and data.completion_column, or write rows like " + FORMATS["chat"].example
    )
    raise DataError(f"{path}: no known format fits the keys found: {found}. {advice[0].upper()}{advice[1:]}")


def guess_columns(keys: Sequence[str]) -> tuple[str, str] | None:
    """A likely (prompt, completion) pair among column names, or None. Two columns in all are taken in their order."""
    by_name = {key.lower(): key for key in keys}
    for prompt, completion in _KNOWN_PAIRS:
        if prompt in by_name and completion in by_name:
            return by_name[prompt], by_name[completion]
    return (keys[0], keys[1]) if len(keys) == 2 else None


def to_examples(rows: Sequence[Row], format_name: str, data: DataSection) -> tuple[list[Example], list[Problem]]:
    """Convert and validate every row; a row with a problem gives no example."""
    form = FORMATS[format_name]
    examples: list[Example] = []
    problems: list[Problem] = []
    for row in rows:
        found: Found = []
        missing = form.missing(row.content)
        if missing:
            found.append((missing[0], f"missing (keys found: {', '.join(list(row.content)[:12]) or 'none'})", f"expected {form.example}"))
            messages: list[Message] = []
        else:
            messages = form.messages(row.content, data, found)
        if data.system is not None and form.objective == "supervised" and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": data.system})
        if not found and form.objective == "supervised":
            found += _conversation_problems(messages, row.content)
        group = None
        if data.group_column is not None:
            group = row.content.get(
                data.group_column,
                row.content.get("metadata", {}).get(data.group_column) if isinstance(row.content.get("metadata"), dict) else None,
            )
            if group is None:
                found.append((data.group_column, "missing", "every row needs the group column, or leave data.group_column out"))
        problems += [Problem(f"{row.source}:{field}", what, do) for field, what, do in found]
        if not found:
            rejected = form.rejected(row.content, found) if form.rejected is not None else None
            named = None if group is None else str(group)
            metadata = {} if form.objective == "supervised" else {"kind": form.objective}
            examples.append(make_example(messages, source=row.source, group=named, rejected=rejected, metadata=metadata))
    return examples, problems


def make_example(
    messages: Sequence[Message],
    *,
    source: str,
    group: str | None = None,
    metadata: dict[str, Any] | None = None,
    rejected: str | None = None,
) -> Example:
    """The one way to make an Example. Pairs on one prompt are one group: they never part at a split."""
    identity = _hash(list(messages) if rejected is None else [list(messages), rejected])
    if group is None:
        group = identity if rejected is None else _hash(list(messages[:-1]))
    return Example(identity, tuple(messages), group, source, metadata or {}, rejected)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode("utf-8")).hexdigest()[:16]


def _pair(row: dict[str, Any], prompt: str, completion: str, problems: Found) -> list[Message]:
    return [_text_message(row, prompt, "user", problems), _text_message(row, completion, "assistant", problems)]


def _text_message(row: dict[str, Any], key: str, role: str, problems: Found) -> Message:
    value = row.get(key)
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    elif isinstance(value, dict | list) and role == "assistant":
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        what = f"missing (keys found: {', '.join(list(row)[:12]) or 'none'})" if value is None else f"not a text: {str(value)[:40]!r}"
        problems.append((key, what, "every row needs a text here"))
        value = ""
    elif not value.strip():
        problems.append((key, "empty", "write the text or remove the row"))
    return {"role": role, "content": value}


def _message_list(value: Any, field: str, keys: tuple[str, str], problems: Found) -> list[Message]:
    if not isinstance(value, list) or not value:
        problems.append((field, "empty" if value == [] else f"not a list of messages: {str(value)[:40]!r}", "write a list of messages"))
        return []
    messages: list[Message] = []
    for index, item in enumerate(value):
        where = f"{field}[{index}]"
        if not isinstance(item, dict):
            problems.append((where, f"not an object: {str(item)[:40]!r}", f'write {{"{keys[0]}": …, "{keys[1]}": …}}'))
            continue
        role = item.get(keys[0])
        role = _RENAMED_ROLES.get(str(role), role)
        if role is None:
            problems.append((f"{where}.{keys[0]}", "missing", f"one of {', '.join(ROLES)}"))
        elif role in ("tool", "function") or item.get("tool_calls") or item.get("function_call"):
            problems.append(
                (
                    f"{where}.{keys[0]}",
                    "a tool call",
                    "tool calls cannot be trained yet: remove the row or write the call as the answer's text",
                )
            )
            continue
        elif role not in ROLES:
            problems.append((f"{where}.{keys[0]}", f"unknown role {str(role)[:40]!r}", f"one of {', '.join(ROLES)}"))
        content = item.get(keys[1])
        if isinstance(content, list) and content and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            what = "missing" if content is None else f"not a text: {str(content)[:40]!r}"
            problems.append((f"{where}.{keys[1]}", what, "write the message's text"))
            continue
        if not content.strip():
            problems.append((f"{where}.{keys[1]}", "empty", "write the text or remove the message"))
        message: Message = {"role": str(role), "content": content}
        if "weight" in item:
            if role != "assistant" or item["weight"] not in (0, 1) or isinstance(item["weight"], bool):
                problems.append((f"{where}.weight", f"{item['weight']!r}", "0 or 1, on assistant messages only"))
            message["weight"] = item["weight"]
        messages.append(message)
    return messages


def _conversation_problems(messages: Sequence[Message], row: dict[str, Any]) -> Found:
    """What makes a well-formed conversation useless for training."""
    field = "messages" if "messages" in row else "conversations" if "conversations" in row else next(iter(row), "row")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return [(field, "no assistant message", "add the answer that is to be learnt")]
    if roles[-1] != "assistant":
        return [(field, f"ends with a {roles[-1]} message", "the last message must be the assistant's answer")]
    if roles[0] == "assistant" or "user" not in roles:
        return [(field, "no user message before the answer", "add the question")]
    if "system" in roles[1:]:
        return [(field, "a system message that is not the first", "put it first")]
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        return [(field, "every assistant message has weight 0: the row trains no token", "give one of them weight 1 or remove the row")]
    return []
