"""What competes on the same rows. CANDIDATES is the table: each turns an example into the messages that its model is given.

To add a candidate: write a function (Example, Setting, Context) → messages, and add a line to CANDIDATES.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from burnish.errors import ModelError
from burnish.evaluation.endpoint import Client
from burnish.evaluation.retrieve import BY_WORDS, Library, varied
from burnish.models import Chat
from burnish.recipe import Recipe
from burnish.tasks import Task
from burnish.types import Example, Message

_READ = "What stands before the question was looked up for it: use it where it helps."
_LISTED_VALUES = 60  # a key with more values than this is described, not listed


@dataclass(frozen=True, slots=True)
class Setting:
    """What is chosen on validation rows."""

    prompt_form: str = "as_is"  # as_is: the row's messages · instructed: with an instruction in front
    shots: int = 0  # training rows shown, or (of the vote) asked
    passages: int = 0  # of the documents
    way: str = BY_WORDS  # how shots or passages are looked up: bm25 · embeddings
    pool: str = "examples"  # of the vote: examples (the training rows) · labelled (passages that know their answer)


@dataclass(frozen=True, slots=True)
class Context:
    chat: Chat
    instruction: str
    library: Library
    prompt_limit: int  # tokens a prompt may have in this model's context
    takes_system: bool  # whether the template has a place for a system message
    client: Client | None = None  # of the larger model

    @property
    def train(self) -> Sequence[Example]:
        return self.library.train


@dataclass(frozen=True, slots=True)
class Candidate:
    title: str
    messages: Callable[[Example, Setting, Context], list[Message]]
    family: str  # prompt: asked cleverly · retrieve: looks something up · larger: another model · tuned
    shots: bool = False  # whether numbers of shots are tried
    reads: bool = False  # passages of documents
    trained: bool = False  # needs the run's adapter
    by: str = "model"  # who answers: the run's model · a vote of neighbours · an endpoint


def _base(example: Example, setting: Setting, context: Context) -> list[Message]:
    return _arrange(example, [], setting, context)


def _few_shot(example: Example, setting: Setting, context: Context) -> list[Message]:
    return _arrange(example, varied(context.train, setting.shots), setting, context)


def _retrieved(example: Example, setting: Setting, context: Context) -> list[Message]:
    """With `setting.shots` training rows and `setting.passages` passages, each of which may be none."""
    shots = context.library.examples(example.question, setting.shots, setting.way) if setting.shots else []
    return _arrange(example, shots, setting, context)


def _tuned(example: Example, setting: Setting, context: Context) -> list[Message]:
    return list(example.prompt)


def _tuned_rag(example: Example, setting: Setting, context: Context) -> list[Message]:
    return _arrange(example, [], setting, context)


CANDIDATES: dict[str, Candidate] = {
    "base": Candidate("base model, zero-shot", _base, "prompt"),
    "few_shot": Candidate("base model, fixed examples", _few_shot, "prompt", shots=True),
    "few_shot_retrieved": Candidate("base model, retrieved examples", _retrieved, "retrieve", shots=True),
    "neighbours": Candidate("nearest neighbours, no model", _tuned, "retrieve", shots=True, by="neighbours"),
    "rag": Candidate("base model, documents", _retrieved, "retrieve", reads=True),
    "rag_few_shot": Candidate("base model, documents and retrieved examples", _retrieved, "retrieve", shots=True, reads=True),
    "endpoint": Candidate("larger model", _retrieved, "larger", shots=True, by="endpoint"),
    "tuned": Candidate("fine-tuned", _tuned, "tuned", trained=True),
    "tuned_rag": Candidate("fine-tuned, documents", _tuned_rag, "tuned", reads=True, trained=True),
}


def candidates_for(recipe: Recipe) -> list[str]:
    """What `evaluation.candidates: auto` stands for: all that the recipe has what they need."""
    documents, endpoint = recipe.data.documents is not None, recipe.evaluation.endpoint is not None
    return [
        name for name, candidate in CANDIDATES.items() if (documents or not candidate.reads) and (endpoint or candidate.by != "endpoint")
    ]


def make_context(
    chat: Chat, task: Task, library: Library, *, instruction: str | None, prompt_limit: int, client: Client | None = None
) -> Context:
    takes_system = True
    try:
        chat.render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], add_generation_prompt=True)
    except ModelError:
        takes_system = False
    instruction = write_instruction(task, library.train) if instruction is None else instruction
    return Context(chat, instruction, library, prompt_limit, takes_system, client)


def fitting(candidate: str, example: Example, setting: Setting, context: Context) -> tuple[list[Message], list[int], int]:
    """The messages a candidate's model is given, their tokens, and how many examples they show. What does not fit the model's context is left
    out: shots first, then passages."""
    while True:
        messages = CANDIDATES[candidate].messages(example, setting, context)
        ids = context.chat.prompt_ids(messages)
        if len(ids) <= context.prompt_limit or not (setting.shots or setting.passages):
            return messages, ids, setting.shots
        if setting.shots:
            setting = replace(setting, shots=setting.shots - max(1, setting.shots // 8))
        else:
            setting = replace(setting, passages=setting.passages - 1)


def write_instruction(task: Task, train: Sequence[Example]) -> str:
    """What a person would tell an untrained model, written from the training rows: the form, the labels, the keys and their values."""
    references = [example.reference for example in train]
    if task.kind == "json":
        return _describe_json(references)
    if task.labels:
        return f"Classify the input. Answer with exactly one of these labels and nothing else: {', '.join(sorted(task.labels))}."
    if task.kind == "numeric":
        return "Solve the problem step by step. End with a last line: #### and the final number."
    shortest = sorted(references, key=lambda text: (abs(len(text) - _median_length(references)), text))[0]
    if task.kind == "structured":
        names = [name for name, _ in Counter(text.split("(")[0] for text in references if "(" in text).most_common(20)]
        known = f" The forms are: {', '.join(names)}." if len(names) > 1 and all(len(name) < 30 for name in names) else ""
        return f"Answer in one line, in exactly the form of this example and nothing else: {shortest}{known}"
    return f"Answer as in this example of an answer: {shortest[:500]}"


def _describe_json(references: Sequence[str]) -> str:
    values: dict[str, Counter[str]] = defaultdict(Counter)
    for text in references:
        try:
            content = json.loads(text)
        except ValueError:
            continue
        for key, value in content.items() if isinstance(content, dict) else ():
            values[key][json.dumps(value, ensure_ascii=False)] += 1
    always = [key for key, counts in values.items() if sum(counts.values()) >= len(references)]
    lines = ["Turn the input into one line of JSON and write nothing else."]
    for key in [*always, *(key for key in values if key not in always)]:
        counts = values[key]
        need = "always" if key in always else "only where the input says it"
        # A key whose values repeat is a choice; one whose values hardly repeat is free text.
        if len(counts) > 1 and all(_is_number(value) for value in counts):
            lines.append(f'"{key}" ({need}): a number, for example {", ".join(value for value, _ in counts.most_common(3))}')
        elif len(counts) <= _LISTED_VALUES and sum(counts.values()) >= 4 * len(counts):
            lines.append(f'"{key}" ({need}): one of {", ".join(sorted(counts))}')
        else:
            lines.append(f'"{key}" ({need}): for example {", ".join(value for value, _ in counts.most_common(3))}')
    return "\n".join(lines)


def _is_number(value: str) -> bool:
    return value.lstrip("-").replace(".", "", 1).isdigit()


def _median_length(texts: Sequence[str]) -> int:
    return sorted(map(len, texts))[len(texts) // 2]


def _arrange(example: Example, shots: Sequence[Example], setting: Setting, context: Context) -> list[Message]:
    """[system] + examples as turns + the question. The row's own system message stays first, the instruction before it. Passages stand before the
    question that they were looked up for, in the examples as in the row itself: how an answer is taken from them is then shown."""
    messages = [dict(message) for message in example.prompt]
    head = [messages.pop(0)["content"]] if messages and messages[0]["role"] == "system" else []
    if setting.prompt_form == "instructed":
        head.insert(0, context.instruction + (f" {_READ}" if setting.passages else ""))
    turns: list[Message] = []
    for shot in shots:
        turns += [
            {"role": "user", "content": _with_passages(shot.question, setting, context)},
            {"role": "assistant", "content": shot.reference},
        ]
    if setting.passages and messages and messages[-1]["role"] == "user":
        messages[-1]["content"] = _with_passages(messages[-1]["content"], setting, context)
    turns += messages
    if not head:
        return turns
    text = "\n\n".join(head)
    if context.takes_system:
        return [{"role": "system", "content": text}, *turns]
    return [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]


def _with_passages(question: str, setting: Setting, context: Context) -> str:
    if not setting.passages:
        return question
    found = context.library.read(question, setting.passages, setting.way)
    return "\n".join([*(passage.text for passage in found), "", question])
