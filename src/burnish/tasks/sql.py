"""SQL from a model: does it parse, and does it find the same rows as the reference? It runs in a process of its own that is killed in time.

in          statements as text, and an SQLite file (of which a copy is read) or CREATE TABLE statements
out         a Result each: rows, or an error and its kind
invariant   nothing but a read-only copy is read; no statement takes longer than its limit, whatever it does; a killed process is replaced
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import DataError
from burnish.types import Score

TIME_LIMIT_SECONDS = 2.0
_GRACE_SECONDS = 0.5  # for the worker to stop a statement by itself
_START_SECONDS = 20.0
_LARGEST_RESULT_BYTES = 64 * 2**20
_REMEMBERED_ROWS = 1_000  # candidates often answer alike, and each reference comes once for each candidate
_LONGEST_SCHEMA = 20_000  # characters of one CREATE TABLE
_DIGITS = 12  # of a number that is compared: sums in another order differ in the last bits
_FENCE = re.compile(r"\s*```(?:sql|sqlite|SQL)?[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)
_CREATE = re.compile(r"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?", re.IGNORECASE)
# Strings, quoted names and comments: nothing in them is a word of the statement.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?(?:\*/|$)", re.DOTALL)

Rows = list[list[Any]]


@dataclass(frozen=True, slots=True)
class Result:
    rows: Rows | None
    error: str | None = None
    kind: str | None = None  # syntax · name (no such table, column, function) · denied · limit · killed · other


class SqlRunner:
    """Runs statements in one worker process, which answers many and is started anew when it was killed. `with open_runner(...)` closes it."""

    def __init__(self, database: Path | None, folder: Path, time_limit_seconds: float) -> None:
        self._database, self._folder, self._limit = database, folder, time_limit_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[tuple[str, tuple[str, ...], bool], Result] = {}
        self.kills = 0

    def rows(self, query: str) -> Result:
        """What the statement finds in the database."""
        return self._ask(query, (), run=True)

    def parse(self, query: str, schema: Sequence[str] = ()) -> Result:
        """Whether SQLite would run the statement, on the database or on tables made by `schema`. No rows."""
        return self._ask(query, tuple(schema), run=False)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
        self._process = None

    def _ask(self, query: str, schema: tuple[str, ...], *, run: bool) -> Result:
        key = (query, schema, run)
        if key in self._known:
            return self._known[key]
        result = self._run({"schema": schema, "query": query, "run": run})
        if len(result.rows or ()) <= _REMEMBERED_ROWS:
            self._known[key] = result
        return result

    def _run(self, request: dict[str, Any]) -> Result:
        process = self._process or self._start()
        line = (json.dumps(request) + "\n").encode()
        reply = self._exchange(process, line, self._limit + _GRACE_SECONDS)
        if reply is None:
            self.kills += 1
            self.close()
            return Result(None, f"took longer than {self._limit:g} s or broke its process, which was killed", "killed")
        return Result(**{"rows": None, **reply})

    def _start(self) -> subprocess.Popen[bytes]:
        # -I -S: nothing of the environment or of installed packages is read; an empty environment, because keys are in ours.
        worker = Path(__file__).with_name("sql_worker.py")
        settings = json.dumps([None if self._database is None else str(self._database), self._limit])
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(worker), settings],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=self._folder, env={}, close_fds=True, start_new_session=True,
        )  # fmt: skip
        self._process = process
        if self._exchange(process, b"", _START_SECONDS, ready=True) is None:
            self.close()
            raise DataError("the process that runs SQL does not start: is there memory for another Python process (512 MiB)?")
        return process

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes, seconds: float, *, ready: bool = False) -> Any:
        """Send a line and wait for one. None: it came not in time, not whole, or is no JSON."""
        assert process.stdin is not None
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        received = bytearray()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while not received.endswith(b"\n"):
                    left = deadline - time.monotonic()
                    if left <= 0 or not selector.select(left) or len(received) > _LARGEST_RESULT_BYTES:
                        return None
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    if not part:
                        return None
                    received += part
            return True if ready else json.loads(received)
        except (OSError, ValueError):
            return None


@contextmanager
def open_runner(database: str | Path | None = None, *, time_limit_seconds: float = TIME_LIMIT_SECONDS) -> Iterator[SqlRunner]:
    """A runner over a copy of an SQLite file (None: over an empty database). Raises DataError for a file that is none."""
    folder = Path(tempfile.mkdtemp(prefix="burnish-sql-"))
    try:
        copy = None if database is None else copy_database(Path(database), folder / "copy.sqlite")
        runner = SqlRunner(copy, folder, time_limit_seconds)
        try:
            yield runner
        finally:
            runner.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def copy_database(source: Path, target: Path) -> Path:
    """A copy of the file's pages, with what its write-ahead log holds; opened read-only, its schema and its triggers unread."""
    check_database(source)
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.resolve().as_uri()}?mode=ro", uri=True)) as read,
            contextlib.closing(sqlite3.connect(target)) as written,
        ):
            read.backup(written)
    except sqlite3.Error as problem:
        raise DataError(f"{source}: cannot be copied ({problem}): is it a whole SQLite file?") from problem
    return target


def check_database(source: Path) -> None:
    """DataError where there is no SQLite file, by its first 16 bytes."""
    try:
        with source.open("rb") as file:
            begins = file.read(16)
    except OSError as problem:
        raise DataError(f"{source}: cannot be read: {problem.strerror or problem}") from problem
    if begins != b"SQLite format 3\0":
        raise DataError(f"{source}: not an SQLite database (its first bytes say so): give the file that the answers' statements are about")


def statement_of(text: str) -> str:
    """The statement of an answer: without one Markdown fence around it and without a last semicolon."""
    if fenced := _FENCE.fullmatch(text):
        text = fenced.group(1)
    return text.strip().rstrip(";").rstrip()


def schema_of(text: str) -> list[str]:
    """The CREATE TABLE statements of a prompt. Their columns may stand without types, as WikiSQL's do."""
    found = []
    for match in _CREATE.finditer(text):
        opened = text.find("(", match.end())
        if opened < 0 or opened - match.end() > 200:
            continue
        closed = _closing(text, opened)
        if closed is not None:
            found.append(text[match.start() : closed + 1])
    return found


def _closing(text: str, opened: int) -> int | None:
    """Where the parenthesis at `opened` ends; those in quotes do not count."""
    bare = _QUOTED.sub(lambda match: " " * len(match[0]), text[opened : opened + _LONGEST_SCHEMA])
    depth = 0
    for place, character in enumerate(bare):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return opened + place
    return None


def is_ordered(query: str) -> bool:
    """Whether the outermost SELECT has an ORDER BY: then the order of the rows is part of the answer."""
    bare, depth, outer = _QUOTED.sub(" ", query), 0, []
    for character in bare:
        depth += (character == "(") - (character == ")")
        outer.append(character if depth == 0 else " ")
    return re.search(r"\border\s+by\b", "".join(outer), re.IGNORECASE) is not None


def same_rows(given: Rows, expected: Rows, *, ordered: bool) -> bool:
    """Equal as lists where `ordered`, else as multisets. 1 equals 1.0; names of columns do not matter, their order does."""
    left, right = ([tuple(map(_comparable, row)) for row in rows] for rows in (given, expected))
    return left == right if ordered else Counter(left) == Counter(right)


def _comparable(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{_DIGITS}g}")
    return value


def score_parse(runner: SqlRunner, answer: str, reference: str, prompt: str) -> Score:
    """1 where SQLite takes the answer. Without a schema in the prompt, unknown names are no fault of the answer: only its grammar is judged."""
    schema = schema_of(prompt)
    for name, text in (("reference", reference), ("prediction", answer)):
        found = runner.parse(statement_of(text), schema)
        if found.error is None or (found.kind == "name" and not schema):
            continue
        if name == "reference":
            return Score(None, f"reference does not parse ({found.kind})")
        return Score(0.0) if found.kind in ("syntax", "name") else Score(None, f"prediction was stopped ({found.kind})")
    return Score(1.0)


def score_rows_found(runner: SqlRunner, answer: str, reference: str) -> Score:
    """1 where the answer finds the reference's rows. A reference that finds none is left out: most wrong statements find none, too."""
    expected = runner.rows(statement_of(reference))
    if expected.rows is None:
        return Score(None, f"reference does not run on the database ({expected.kind})")
    if not expected.rows:
        return Score(None, "reference finds no rows, as most wrong statements do")
    given = runner.rows(statement_of(answer))
    if given.rows is None:
        return Score(0.0) if given.kind in ("syntax", "name") else Score(None, f"prediction was stopped ({given.kind})")
    return Score(float(same_rows(given.rows, expected.rows, ordered=is_ordered(statement_of(reference)))))
