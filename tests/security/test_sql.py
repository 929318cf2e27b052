"""Hostile SQL is stopped: nothing is written, nothing else is read, and no statement outlives its limit (security.md S18)."""

from __future__ import annotations

import ast
import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.errors import DataError
from burnish.tasks import sql_worker
from burnish.tasks.sql import SqlRunner, open_runner


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sql") / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE t(a, b); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (2, 'z');")
    connection.close()
    return path


@pytest.fixture(scope="module")
def runner(database: Path) -> Iterator[SqlRunner]:
    with open_runner(database, time_limit_seconds=0.3) as made:
        yield made


COUNT = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT {} FROM r"
HOSTILE = {
    "SELECT printf('%.*c', 1000000000, 'x')": "killed",  # one opcode: no handler is ever called
    "SELECT format('%.*c', 1000000000, 'x') FROM t": "killed",
    COUNT.format("count(*)"): "limit",
    COUNT.format("n"): "limit",
    COUNT.format("group_concat(n)"): "limit",
    f"SELECT count(*) FROM {', '.join(f't AS t{n}' for n in range(20))}": "limit",
    f"SELECT 'aaaaaaaaaaaaaaaaaaaa' LIKE '{'%a' * 2000}b'": "limit",
    "SELECT replace(replace(hex(printf('%.900000c', 'x')), '7', '77777'), '7', '7777777')": "limit",
    "SELECT randomblob(1000000000)": "denied",
    "SELECT zeroblob(1000000000)": "denied",
    "SELECT load_extension('/tmp/x.so')": "denied",
    "ATTACH DATABASE '/tmp/evil.sqlite' AS evil": "denied",
    "PRAGMA writable_schema = 1": "denied",
    "SELECT * FROM pragma_database_list": "denied",
    "VACUUM INTO '/tmp/evil.sqlite'": "denied",
    "DROP TABLE t": "denied",
    "INSERT INTO t VALUES (3, 'w')": "denied",
    "CREATE TEMP TABLE u(a)": "denied",
    "BEGIN EXCLUSIVE": "denied",
    "SELECT readfile('/etc/passwd')": "name",
    "SELECT 1; DROP TABLE t": "syntax",
    f"SELECT {'(' * 500}1{')' * 500}": "syntax",
    "SELECT '\x00'": "syntax",
    "\ud800": "syntax",
    "": "syntax",
    "-- nothing": "syntax",
}


@pytest.mark.parametrize(("query", "kind"), HOSTILE.items(), ids=[query[:30].encode("ascii", "replace").decode() for query in HOSTILE])
def test_hostile_statements_are_stopped(runner: SqlRunner, database: Path, query: str, kind: str) -> None:
    before = database.read_bytes()
    found = runner.rows(query)
    assert (found.rows, found.kind) == (None, kind)
    assert runner.rows("SELECT count(*) AS n, 'again' FROM t WHERE a > 0").rows == [[3, "again"]], "the next statement is answered"
    assert database.read_bytes() == before
    assert not Path("/tmp/evil.sqlite").exists()


def test_a_worker_that_dies_is_replaced(database: Path) -> None:
    with open_runner(database) as made:
        assert made.rows("SELECT 1").rows == [[1]]
        process = made._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        assert made.rows("SELECT 2").kind == "killed"
        assert made.rows("SELECT 3").rows == [[3]]
        assert made._process is not None
        assert made._process.pid != process.pid
        last, folder = made._process, made._folder
    assert last.poll() is not None, "none is left behind"
    assert not folder.exists()


def test_the_worker_sees_no_environment_and_has_its_limits(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-secret")
    with open_runner(database) as made:
        made.rows("SELECT 1")
        assert made._process is not None
        place = Path("/proc") / str(made._process.pid)
        if not place.exists():
            pytest.skip("no /proc here")
        assert b"sk-secret" not in (place / "environ").read_bytes()
        limits = (place / "limits").read_text()
        assert str(sql_worker.MEMORY_BYTES) in next(line for line in limits.splitlines() if line.startswith("Max address space"))
        assert next(line for line in limits.splitlines() if line.startswith("Max file size")).split()[3] == "0"


def test_the_worker_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(sql_worker.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_schema_in_a_prompt_makes_empty_tables_and_nothing_else() -> None:
    with open_runner(time_limit_seconds=0.3) as made:
        assert made.parse("SELECT a FROM t", ["CREATE TABLE t (a, b)"]).error is None
        assert made.parse("SELECT a FROM t").kind == "name", "the tables of the row before are gone"
        for statement in (
            "CREATE VIRTUAL TABLE v USING fts5(a)",
            "ATTACH '/tmp/evil.sqlite' AS e",
            "CREATE TRIGGER x AFTER INSERT ON t BEGIN SELECT 1; END",
        ):
            assert made.parse("SELECT 1", ["CREATE TABLE t (a)", statement]).kind == "denied"
        assert made.parse("SELECT 1", [f"CREATE TABLE t AS {COUNT.format('n')}"]).error is not None


@pytest.mark.parametrize("content", [b"", b"SQLite format 2", b"#!/bin/sh\n"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.sqlite"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not an SQLite database"), open_runner(path):
        pass
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)
    with pytest.raises(DataError, match="cannot be copied"), open_runner(path):
        pass


def test_what_the_write_ahead_log_holds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wal.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE t(a)")
    connection.execute("INSERT INTO t VALUES (7)")
    with open_runner(path) as made:
        assert made.rows("SELECT a FROM t").rows == [[7]]
    connection.close()
