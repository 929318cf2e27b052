"""The words of the whole package: frozen, plain, no imports from the package.

A conversation is a tuple of `Message`s, and a message is a plain dict: at once the file format, the input of the chat template and the
wire format. Everything a step hands to the next is one of the types below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

Message = dict[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": str}`, on assistant messages optionally `"weight": 0 | 1`."""


Tell = Callable[[str, int, int, str], None]
"""How a long step tells its progress: (what, done, total, detail). The library is silent; the command line draws bars."""


def silent(what: str, done: int, total: int, detail: str) -> None:
    """The default `Tell`."""


class Verdict(StrEnum):
    BETTER = "BETTER"
    WORSE = "WORSE"
    CANT_TELL = "CAN'T TELL"


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation. The last assistant message is the reference; the same object trains and evaluates."""

    id: str  # 16 hex digits, a hash of the messages: the same row has the same id in every file and every run
    messages: tuple[Message, ...]
    group: str  # rows of one group never part at a split (a source, a template, a user); the id where no group is known
    source: str  # file:line, for errors and the report
    metadata: dict[str, Any] = field(default_factory=dict)
    rejected: str | None = None  # of a preference pair: the worse answer; the messages hold the better one

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the reference."""
        return self.messages[: self._last_assistant()]

    @property
    def reference(self) -> str:
        """The text of the last assistant message: what a candidate should have answered."""
        return str(self.messages[self._last_assistant()]["content"])

    @property
    def question(self) -> str:
        """The text of the last user message before the reference: what retrieval looks for."""
        for message in reversed(self.prompt):
            if message["role"] == "user":
                return str(message["content"])
        return ""

    @property
    def worse(self) -> Example | None:
        """The same conversation with the rejected answer in the reference's place; None where there is none."""
        if self.rejected is None:
            return None
        answer: Message = {**self.messages[self._last_assistant()], "content": self.rejected}
        return replace(self, messages=(*self.prompt, answer), rejected=None)

    def _last_assistant(self) -> int:
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "assistant":
                return index
        raise ValueError(f"{self.source}: no assistant message")


@dataclass(frozen=True, slots=True)
class Dataset:
    train: Sequence[Example]  # of a prepared run: read from its file row by row
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    manifest: dict[str, Any]  # hashes, counts and the reason of every row left out
    replay: Sequence[Example] = ()  # general rows mixed into training against forgetting


@dataclass(frozen=True, slots=True)
class Tokens:
    """One training sequence. `labels[i]` is `input_ids[i]` where it is trained and -100 where it is not (no shift yet)."""

    input_ids: list[int]
    labels: list[int]
    number: int | None = field(
        default=None, compare=False
    )  # of its first token among all tokens of a training, where they are kept on disk

    @property
    def target_tokens(self) -> int:
        """How many tokens are trained. The first token of a sequence has nothing before it and never is."""
        return sum(label != -100 for label in self.labels[1:])


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer of one candidate to one example."""

    example: str  # Example.id
    candidate: str
    text: str
    finish_reason: str  # stop: the model ended its turn · stop_text: cut where answers end here · length: cut at max_new_tokens
    prompt_tokens: int
    completion_tokens: int
    seconds: float  # from the start of the row's batch to the row's last token: what a user of this batch would have waited


@dataclass(frozen=True, slots=True)
class Score:
    """A number, or *unscored* with the reason; never a guess."""

    value: float | None
    reason: str | None = None

    @property
    def scored(self) -> bool:
        return self.value is not None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against a baseline on the same rows, in the metric's unit (fractions, not per cent)."""

    candidate: str
    baseline: str
    metric: str
    n: int
    difference: float  # candidate minus baseline
    low: float  # of the paired bootstrap interval of the difference
    high: float
    p_value: float  # exact McNemar for right/wrong metrics, sign-flip permutation for the others
    p_adjusted: float  # Holm over all comparisons of the run
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Trained weights on disk, in PEFT's format."""

    path: str
    step: int
    validation_loss: float | None  # mean nats per target token; None when the run has no validation rows


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do, with the numbers it rests on."""

    verdict: str  # fine-tune · prompt · retrieve · more-data · no · cant-tell
    sentence: str
    reason: str  # with its numbers
    rule: str  # the condition that held, in words
    would_change: tuple[str, ...]  # what would change the decision
    costs: dict[str, Any]  # of training and of answering, and from how many requests on training pays
