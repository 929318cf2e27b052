"""Files → raw rows. Every row remembers `file:line`; every problem is kept, none is raised until all lines were read.

Lines end at `\\n` only: U+2028 and U+0085 occur inside texts. A byte-order mark and CRLF are accepted.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import DataError, Problem, missing_extra

DOCUMENTS = (".txt", ".md")  # each file one text
ROW_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
MAX_LINE_BYTES = 16 * 2**20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    source: str  # file:line
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rows:
    path: str
    rows: list[Row]
    problems: list[Problem]


def read_rows(name: str) -> Rows:
    """Read a data file by its ending, or `hub:OWNER/NAME[:SPLIT]`.

    Raises DataError where there is nothing to read: no such file, a folder, an empty file, an unknown kind, not UTF-8.
    """
    if name.startswith("hub:"):
        return _read_hub(name)
    path = Path(name)
    if not path.exists():
        raise DataError(f"{path}: no such file. Look at the path in the recipe (relative to the recipe's folder)")
    if path.is_dir():
        raise DataError(f"{path}: a folder; expected a .jsonl, .json, .csv, .tsv or .parquet file")
    try:
        empty = path.stat().st_size == 0
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path)
        text = _decode(path)
    except OSError as problem:
        raise DataError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    if empty or not text.strip():
        raise DataError(f"{path}: the file is empty; expected one JSON object a line, or a CSV with a header")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(path, text)
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json", ".txt", ""):
        return _read_json_array(path, text) if text.lstrip().startswith("[") else _read_jsonl(path, text)
    raise DataError(f"{path}: unknown kind of file `{path.suffix}`; expected .jsonl, .json, .csv, .tsv or .parquet")


def read_documents(name: str) -> Rows:
    """Plain text: a .txt or .md file is one document; a folder holds one in each; any other file has rows with a `text`.

    Raises DataError where there is nothing to read.
    """
    path = Path(name)
    if name.startswith("hub:") or not path.exists() or (path.is_file() and path.suffix.lower() not in DOCUMENTS):
        return read_rows(name)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in (*DOCUMENTS, *ROW_FILES))
    if not files:
        raise DataError(f"{path}: no document in this folder; expected {', '.join((*DOCUMENTS, *ROW_FILES))} files")
    rows: list[Row] = []
    problems: list[Problem] = []
    for file in files:
        if file.suffix.lower() not in DOCUMENTS:
            found = read_rows(str(file))
            rows, problems = rows + found.rows, problems + found.problems
            continue
        try:
            content = {"text": _decode(file)}
        except OSError as problem:
            raise DataError(f"{file}: cannot be read: {problem.strerror or problem}") from problem
        if bad := _bad_text(content["text"], content):
            problems.append(Problem(f"{file}:1", bad, "remove it: no tokenizer reads it"))
        else:
            rows.append(Row(f"{file}:1", content))
    return Rows(str(path), rows, problems)


def parse_json(text: str) -> Any:
    """json.loads that refuses what is not JSON (NaN, a key given twice) and never raises anything but ValueError."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            twice = next(key for index, (key, _) in enumerate(items) if key in dict(items[:index]))
            raise ValueError(f"the key {twice!r} is given twice")
        return result

    def constant(value: str) -> Any:
        raise ValueError(f"{value} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as problem:
        raise ValueError(f"bad JSON: {problem.msg} at column {problem.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _decode(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: UTF-16 text; save it as UTF-8")
    if content.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: gzip-compressed; unpack it first")
    if content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        bad = content[problem.start]
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{bad:02x}); save the file as UTF-8") from None


def _read_jsonl(path: Path, text: str) -> Rows:
    rows: list[Row] = []
    problems: list[Problem] = []
    lines = text.split("\n")
    last = len(lines) if lines[-1].strip() else 0  # a last line without an end of line may have been cut
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            problems.append(Problem(where, f"a line of {len(line):,} characters", f"at most {MAX_LINE_BYTES:,}: split the row"))
            continue
        try:
            content = parse_json(line)
        except ValueError as problem:
            if number == last and not line.rstrip().endswith("}"):
                problems.append(Problem(where, f"truncated last line ({problem})", "the file was cut off: copy or export it again"))
            else:
                problems.append(Problem(where, str(problem), "write one JSON object on this line"))
            continue
        if not isinstance(content, dict):
            hint = line.strip()[:20]
            problems.append(Problem(where, f"not a JSON object (the line starts with {hint!r})", "write one JSON object a line"))
            continue
        if found := _bad_text(line, content):
            problems.append(Problem(where, found, "remove it: no tokenizer reads it"))
            continue
        rows.append(Row(where, content))
    return Rows(str(path), rows, problems)


def _read_json_array(path: Path, text: str) -> Rows:
    try:
        content = parse_json(text)
    except ValueError as problem:
        return Rows(str(path), [], [Problem(str(path), str(problem), "write a JSON array of objects, or one object a line")])
    rows, problems = [], []
    for number, item in enumerate(content, 1):
        where = f"{path}:[{number}]"
        if isinstance(item, dict) and not (found := _bad_text("\\u0000" if "\\u0000" in text else "", item)):
            rows.append(Row(where, item))
        else:
            problems.append(Problem(where, "not a JSON object" if not isinstance(item, dict) else str(found), "write an array of objects"))
    return Rows(str(path), rows, problems)


def _bad_text(line: str, content: dict[str, Any]) -> str | None:
    """NUL characters and lone surrogates come in through \\u escapes; look only where one is written."""
    if ("\x00" in line or "\\u0000" in line) and any("\x00" in text for text in _strings(content)):
        return "a NUL character"
    if ("\\ud" in line or "\\uD" in line) and any(_LONE_SURROGATE.search(text) for text in _strings(content)):
        return "half of a surrogate pair (a broken \\ud… escape)"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _read_csv(path: Path, text: str) -> Rows:
    first = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    problems: list[Problem] = []
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if "" in header or len(set(header)) != len(header):
                    raise DataError(f"{path}:1: the header has an empty or repeated name ({', '.join(header)}); name each column once")
            elif len(cells) != len(header):
                problems.append(
                    Problem(where, f"{len(cells)} cells, but the header has {len(header)}", "quote cells that hold the delimiter")
                )
            elif any("\x00" in cell for cell in cells):
                problems.append(Problem(where, "a NUL character", "remove it: no tokenizer reads it"))
            else:
                rows.append(Row(where, dict(zip(header, cells, strict=True))))
    except csv.Error as problem:
        problems.append(Problem(f"{path}:{reader.line_num}", f"bad CSV: {problem}", 'close the quotes; write " inside a cell as ""'))
    if not rows and not problems:
        raise DataError(f"{path}: a header ({', '.join(header)}) and no rows")
    return Rows(str(path), rows, problems)


def _read_parquet(path: Path) -> Rows:
    with missing_extra("parquet", f"reading {path.name}", DataError):
        import pyarrow.lib
        import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.lib.ArrowException, OSError) as problem:
        raise DataError(f"{path}: not a readable Parquet file: {problem}") from problem
    rows = [Row(f"{path}:{number}", content) for number, content in enumerate(table.to_pylist(), 1)]
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    return Rows(str(path), rows, [])


def _read_hub(name: str) -> Rows:
    """Download the data files of one split (JSONL, CSV or Parquet; never a loading script) and read them."""
    with missing_extra("hub", f"reading {name}", DataError):
        import huggingface_hub
        import huggingface_hub.errors
    repository, _, split = name.removeprefix("hub:").partition(":")
    split = split or "train"
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository, repo_type="dataset")
        wanted = [
            file
            for file in files
            if re.search(r"\.(jsonl|csv|parquet)$", file) and re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", file)
        ]
        if not wanted:
            raise DataError(f"{name}: no .jsonl, .csv or .parquet file of the split `{split}` among {', '.join(files[:20])}")
        paths = [huggingface_hub.hf_hub_download(repository, file, repo_type="dataset") for file in sorted(wanted)]
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError, ValueError) as problem:
        raise DataError(f"{name}: cannot be fetched: {str(problem)[:300]}. Without a network, name a local file instead") from problem
    parts = [read_rows(path) for path in paths]
    return Rows(name, [row for part in parts for row in part.rows], [problem for part in parts for problem in part.problems])
