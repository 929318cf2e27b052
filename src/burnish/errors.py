"""Every error a user can cause, and the exit code that tells it.

    BurnishError
    ├── RecipeError      2   the recipe is wrong: a key, a value, two keys that do not go together
    ├── DataError        2   the rows are wrong, or too few, or not there
    ├── ModelError       2   weights, tokenizer or template are missing, foreign or unsafe
    ├── TrainingError    1   training could not go on (diverged, nothing to train, disk full)
    │   └── GateError    3   a stage did not pass its gate: an answer, with its numbers; what came before it is kept
    └── ServingError     1   an export or a request could not be served
        └── EndpointError   1   a model behind an address gave no answer, or asking it would pass the spending cap

    KeyboardInterrupt
    └── Stopped  130 or 143  somebody asked to stop (Ctrl-C, SIGTERM): what was done is saved, the same command goes on

A message says what was found, where, what was expected and what to do. All problems of one input travel in one error.
To add a kind: derive it here, draw it above, and give it an exit code.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

# Exit codes of the command line. 3 and 4 are answers, not errors: see burnish.cli.
EXIT_DONE, EXIT_OUR_FAULT, EXIT_USER_INPUT, EXIT_GATE_SAID_NO, EXIT_CANT_TELL = 0, 1, 2, 3, 4
SHOWN_PROBLEMS = 100
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_ERRORS = _FULL | {
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
}


@dataclass(frozen=True, slots=True)
class Problem:
    where: str  # file:line:field · recipe.yaml:7 training.learning_rate · a tensor's name
    found: str
    do: str  # what was expected and what to do

    def __str__(self) -> str:
        return f"{self.where} — {self.found} — {self.do}"


class BurnishWarning(UserWarning):
    """Something the user should know that does not stop the run."""


class BurnishError(Exception):
    exit_code: ClassVar[int] = EXIT_OUR_FAULT

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        self.message = message
        self.problems = tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems[:SHOWN_PROBLEMS])]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  … and {len(self.problems) - SHOWN_PROBLEMS} more")
        return "\n".join(lines)


class RecipeError(BurnishError):
    exit_code = EXIT_USER_INPUT


class DataError(BurnishError):
    exit_code = EXIT_USER_INPUT


class ModelError(BurnishError):
    exit_code = EXIT_USER_INPUT


class TrainingError(BurnishError):
    """`code` is for programs: diverged · out_of_memory · insufficient_storage (the disk is full) · unwritable · other_training · None."""

    def __init__(self, message: str, problems: Iterable[Problem] = (), *, code: str | None = None) -> None:
        super().__init__(message, problems)
        self.code = code


class GateError(TrainingError):
    exit_code = EXIT_GATE_SAID_NO


class ServingError(BurnishError):
    pass


class EndpointError(ServingError):
    """`code` is for programs: spending_cap · rate_limit · key_refused · refused · unreachable · unreadable (not a chat completion) · stopped."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class Stopped(KeyboardInterrupt):
    """A stop that was asked for and came at a safe place. `signal` is its number; the exit code is 128 + signal, as shells have it."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


@contextmanager
def missing_extra(extra: str, purpose: str, kind: type[BurnishError] = ModelError) -> Iterator[None]:
    """Turn the ImportError of an optional library into an error that names the extra to install."""
    try:
        yield
    except ImportError as problem:
        raise kind(f"{purpose} needs the extra `{extra}` ({problem.name} is not installed): pip install 'burnish[{extra}]'") from problem


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of a write into an error that says which place is full, read-only or forbidden."""
    try:
        yield
    except Exception as problem:
        full = "No space left on device" in str(problem)  # safetensors tells it in an error of its own
        if not full and not (isinstance(problem, OSError) and problem.errno in _DISK_ERRORS):
            raise
        what = getattr(problem, "strerror", None) or str(problem)
        raise TrainingError(
            f"cannot write {os.fspath(path)}: {what}. Nothing half-written is left; free space or choose another place with --run, "
            "then repeat the command: finished steps are kept",
            code="insufficient_storage" if full or getattr(problem, "errno", None) in _FULL else "unwritable",
        ) from problem
