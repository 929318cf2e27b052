"""What must not be forgotten, as rows: the embedded suites, a folder of local ones, somebody's own must-still-work prompts, or tasks of lm-evaluation-harness.

    embedded                 ships with the package, written for it: general · text · instructions
    FOLDER                   one suite for each file in it (.jsonl, .json, .csv, .tsv, .parquet), named after the file
    FILE                     one suite
    lm-eval:TASK[,TASK …]    tasks of lm-evaluation-harness (extra `harness`), one suite each

The kind of a file is seen from the keys of its rows; `KINDS` has them. Texts of a suite are data: shown as text, sent to the model, never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from burnish.data.read import ROW_FILES, read_rows
from burnish.errors import DataError, Problem, RecipeError
from burnish.run import hash_of
from burnish.tasks import METRICS

EMBEDDED = "embedded"
EMBEDDED_SUITES = ("general", "text", "instructions")
OPENINGS = "openings"  # questions and beginnings that a base model goes on from, for replay; no suite
HARNESS = "lm-eval:"
DEFAULT_SUITES = (EMBEDDED,)

Found = list[tuple[str, str, str]]  # problems of one row: (field, what was found, what to do)


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a suite."""

    id: str  # a hash of the row: the same in every file and run
    row: Mapping[str, Any]
    source: str  # file:line


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    kind: str  # a key of SUITES
    items: tuple[Item, ...]  # of `harness` none: the harness brings its own


@dataclass(frozen=True, slots=True)
class Kind:
    """What a row of a kind must have."""

    keys: tuple[tuple[str, ...], ...]  # sets of keys, any of which will do
    check: Callable[[Mapping[str, Any], Found], None]
    example: str


def _choice(row: Mapping[str, Any], found: Found) -> None:
    _text(row, "query", found)
    choices = row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        found.append(("choices", f"{str(choices)[:60]!r}", "give a list of two texts or more"))
    elif not isinstance(row["gold"], int) or isinstance(row["gold"], bool) or not 0 <= row["gold"] < len(choices):
        found.append(("gold", f"{str(row['gold'])[:60]!r}", f"give the number of the right choice, 0 to {len(choices) - 1}"))


def _continuation(row: Mapping[str, Any], found: Found) -> None:
    _text(row, "context", found)
    _text(row, "continuation", found)


def _passage(row: Mapping[str, Any], found: Found) -> None:
    _text(row, "text", found)


def _prompt(row: Mapping[str, Any], found: Found) -> None:
    _text(row, "prompt", found)
    if row.get("must_contain") not in (None, "", []):
        wanted = row["must_contain"]
        if not all(isinstance(part, str) and part.strip() for part in (wanted if isinstance(wanted, list) else [wanted])):
            found.append(("must_contain", f"{str(wanted)[:60]!r}", "give a text, or a list of texts"))
    else:
        _text(row, "answer", found)
    name = row.get("metric") or "exact_match"
    if name not in METRICS or METRICS[str(name)].corpus is not None:
        known = ", ".join(key for key, metric in METRICS.items() if metric.corpus is None)
        found.append(("metric", f"{str(name)[:60]!r}", f"give one of {known}; a suite cannot bring code of its own"))


KINDS: dict[str, Kind] = {
    "choice": Kind((("query", "choices", "gold"),), _choice, '{"query": "The sky is", "choices": ["blue", "loud"], "gold": 0}'),
    "continuation": Kind((("context", "continuation"),), _continuation, '{"context": "He opened the", "continuation": "door"}'),
    "prompts": Kind((("prompt", "answer"), ("prompt", "must_contain")), _prompt, '{"prompt": "Who are you?", "must_contain": "Ada"}'),
    "text": Kind((("text",),), _passage, '{"text": "A passage of plain text."}'),
}


def read_suites(names: Sequence[str], *, rows: int | None = None) -> list[Suite]:
    """The suites that these names mean, in order. `rows`: at most so many of each, drawn by hash, always the same.

    Raises RecipeError for a name that means nothing or two suites of one name, DataError with every problem of every file.
    """
    suites: list[Suite] = []
    problems: list[Problem] = []
    for name in names:
        if name == EMBEDDED:
            with resources.as_file(resources.files("burnish.evaluation").joinpath("embedded")) as folder:
                suites += [_read(folder / f"{part}.jsonl", part, problems) for part in EMBEDDED_SUITES]
        elif name.startswith(HARNESS):
            tasks = [task.strip() for task in name.removeprefix(HARNESS).split(",") if task.strip()]
            # The harness takes paths of YAML files, too, which may name code to be run: names only.
            if (
                not tasks
                or not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", task) for task in tasks)
                or any(task.endswith((".yaml", ".yml")) for task in tasks)
            ):
                raise RecipeError(f"retain.suites: {name}: expected {HARNESS}TASK with the name of a task, for example {HARNESS}hellaswag")
            suites += [Suite(task, "harness", ()) for task in tasks]
        else:
            suites += [_read(file, file.stem, problems) for file in _files(name)]
    if problems:
        raise DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the suites of what must be retained", problems)
    names_found = [suite.name for suite in suites]
    if twice := [name for name in dict.fromkeys(names_found) if names_found.count(name) > 1]:
        raise RecipeError(f"retain.suites: two suites are called {twice[0]}; a suite has the name of its file: rename one, or leave it out")
    if not suites:
        raise RecipeError(f"retain.suites: no suite; expected {EMBEDDED}, a file, a folder, or {HARNESS}TASK")
    return [_drawn(suite, rows) for suite in suites]


def openings() -> list[str]:
    """What a base model is asked when it writes rows of its own for replay. None of it stands in a suite."""
    with resources.as_file(resources.files("burnish.evaluation").joinpath(f"embedded/{OPENINGS}.jsonl")) as file:
        return [row.content["prompt"] for row in read_rows(str(file)).rows]


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ROW_FILES)
        if not files:
            raise RecipeError(f"retain.suites: {path}: no suite in this folder; expected {', '.join(ROW_FILES)} files")
        return files
    if not path.exists():
        raise RecipeError(f"retain.suites: {name}: no such file or folder; expected {EMBEDDED}, a file, a folder, or {HARNESS}TASK")
    return [path]


def _read(path: Path, name: str, problems: list[Problem]) -> Suite:
    read = read_rows(str(path))
    problems += read.problems
    if not read.rows:
        return Suite(name, "text", ())  # its problems say why
    kind = _kind(path, read.rows[0].content)
    items: dict[str, Item] = {}
    for row in read.rows:
        content = {key: value for key, value in row.content.items() if value is not None}
        found: Found = []
        if missing := _missing(KINDS[kind], content):
            found.append((missing[0], "missing", f"rows of this file are of the kind `{kind}`: {KINDS[kind].example}"))
        else:
            KINDS[kind].check(content, found)
        problems += [Problem(f"{row.source}:{field}", what, do) for field, what, do in found]
        key = hash_of(kind, content)
        items.setdefault(key, Item(key, content, row.source))  # a row that stands there twice counts once
    return Suite(name, kind, tuple(items.values()))


def _kind(path: Path, first: Mapping[str, Any]) -> str:
    fitting = [name for name, kind in KINDS.items() if not _missing(kind, first)]
    if fitting:
        return fitting[0]
    wanted = "; ".join(f"{name}: {kind.example}" for name, kind in KINDS.items())
    raise DataError(
        f"{path}: the first row has the keys {', '.join(map(str, first)) or 'none'}, which no kind of suite has. Expected one of {wanted}"
    )


def _missing(kind: Kind, row: Mapping[str, Any]) -> list[str]:
    lacking = [[key for key in keys if row.get(key) in (None, "")] for keys in kind.keys]
    return min(lacking, key=len)


def _text(row: Mapping[str, Any], key: str, found: Found) -> None:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found.append((key, "missing" if value is None else f"{str(value)[:60]!r}", "give a text that is not empty"))


def _drawn(suite: Suite, rows: int | None) -> Suite:
    """The rows with the smallest hashes, in the order of the file."""
    if rows is None or len(suite.items) <= rows:
        return suite
    kept = {item.id for item in sorted(suite.items, key=lambda item: item.id)[:rows]}
    return Suite(suite.name, suite.kind, tuple(item for item in suite.items if item.id in kept))
