"""The process in which SQL from a model runs. Started by `tasks/sql.py` with `python -I -S`, standard library only, killed when it takes too long.

One JSON object a line in, one out: {"schema": [statements], "query": text, "run": bool} → {"rows": [...]} or {"error": text, "kind": word}.
The database is a read-only copy given on the command line, or an empty one in memory that `schema` fills.

What a statement may do is decided three times: SQLite's own limits and the authorizer (SELECT, reads, known functions, nothing else), this
process's limits on memory, files and processes, and the parent's clock. The last one is needed: `printf('%.*c', 1e9, 'x')` is one opcode that
no handler ever interrupts.
"""

import contextlib
import json
import resource
import sqlite3
import sys
import time
from typing import Any

MEMORY_BYTES = 512 * 2**20
MOST_ROWS, MOST_BYTES = 10_000, 4 * 2**20  # of one result
MOST_STATEMENTS = 50  # of a schema
_STEPS = 20_000  # of SQLite's machine between two looks at the clock
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 20_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 100,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 20,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 20,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 1,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
FUNCTIONS = frozenset(
    [
        "abs",
        "avg",
        "cast",
        "ceil",
        "ceiling",
        "char",
        "coalesce",
        "concat",
        "concat_ws",
        "count",
        "cume_dist",
        "date",
        "datetime",
        "dense_rank",
        "exp",
        "first_value",
        "floor",
        "format",
        "glob",
        "group_concat",
        "hex",
        "ifnull",
        "iif",
        "instr",
        "julianday",
        "json_array_length",
        "json_extract",
        "lag",
        "last_value",
        "lead",
        "length",
        "like",
        "ln",
        "log",
        "log10",
        "log2",
        "lower",
        "ltrim",
        "max",
        "min",
        "mod",
        "nth_value",
        "ntile",
        "nullif",
        "percent_rank",
        "pi",
        "pow",
        "power",
        "printf",
        "quote",
        "rank",
        "replace",
        "round",
        "row_number",
        "rtrim",
        "sign",
        "sqrt",
        "strftime",
        "string_agg",
        "substr",
        "substring",
        "sum",
        "time",
        "timediff",
        "total",
        "trim",
        "trunc",
        "typeof",
        "unicode",
        "unixepoch",
        "upper",
        "->",
        "->>",
    ]
)
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_MAKING = {  # what a schema in memory needs besides: CREATE TABLE writes a row of sqlite_master
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_CREATE_INDEX,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_UPDATE,
    sqlite3.SQLITE_REINDEX,
}


def reading_only(action: int, first: str | None, second: str | None, database: str | None, place: str | None) -> int:
    """SQLite's authorizer: called for all that a statement is going to do, before it does it."""
    if action in _READING:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FUNCTIONS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def making_too(action: int, first: str | None, second: str | None, database: str | None, place: str | None) -> int:
    """Besides reading: what fills a database in memory with empty tables."""
    if action in _MAKING and database in (None, "main"):
        return sqlite3.SQLITE_OK
    return reading_only(action, first, second, database, place)


def bound_process() -> None:
    """No more memory, no file that grows, no core, no new process. A system without one of these limits goes without it."""
    limits = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 16}
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def open_database(place: str | None) -> sqlite3.Connection:
    target = ":memory:" if place is None else f"file:{place}?mode=ro&immutable=1"
    connection = sqlite3.connect(target, uri=place is not None, isolation_level=None, cached_statements=0)
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA temp_store=MEMORY")
    connection.execute(f"PRAGMA hard_heap_limit={MEMORY_BYTES // 2}")
    if place is not None:
        connection.execute("PRAGMA query_only=ON")
    # Bytes that are no UTF-8 are shown as such, not refused.
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    for category, limit in LIMITS.items():
        connection.setlimit(category, limit)
    return connection


def answer(connection: sqlite3.Connection, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
    try:
        connection.set_authorizer(making_too)
        for statement in request["schema"][:MOST_STATEMENTS]:
            connection.execute(statement)
        connection.set_authorizer(reading_only)
        query = request["query"]
        if not request["run"]:
            connection.execute(f"EXPLAIN {query}").close()
            return {"rows": []}
        return {"rows": rows_of(connection.execute(query))}
    except MemoryError:
        return {"error": "out of memory", "kind": "limit"}
    except sqlite3.Error as problem:
        return {"error": str(problem)[:200], "kind": kind_of(problem)}
    except (ValueError, UnicodeError) as problem:  # a NUL, a lone surrogate
        return {"error": str(problem)[:200], "kind": "syntax"}


def rows_of(cursor: sqlite3.Cursor) -> list[list[Any]]:
    if cursor.description is None:
        raise sqlite3.OperationalError("no statement that finds rows")
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        plain = [value.hex() if isinstance(value, bytes) else value for value in row]
        size += sum(len(value) if isinstance(value, str) else 8 for value in plain)
        rows.append(plain)
        if len(rows) > MOST_ROWS or size > MOST_BYTES:
            raise sqlite3.DataError("too many rows")
    return rows


def kind_of(problem: sqlite3.Error) -> str:
    """denied · limit · name (a table, column or function that is not there) · syntax · other"""
    text = str(problem)
    if any(part in text for part in ("not authorized", "authorization denied", "prohibited", "vtable constructor")):
        return "denied"
    if any(
        part in text for part in ("interrupted", "too big", "too many", "too large", "too complex", "out of memory", "too deep", "too long")
    ):
        return "limit"
    if any(part in text for part in ("no such", "ambiguous column", "misuse of", "wrong number of arguments")):
        return "name"
    if isinstance(problem, sqlite3.OperationalError | sqlite3.ProgrammingError | sqlite3.Warning):
        return "syntax"
    return "other"


def main() -> None:
    place, seconds = json.loads(sys.argv[1])
    bound_process()
    connection = open_database(place)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if place is None:  # each row has a schema of its own
            connection.close()
            connection = open_database(None)
        sys.stdout.write(json.dumps(answer(connection, json.loads(line), seconds)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
