"""Which statements mean the same: hand cases."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from burnish.tasks.sql import SqlRunner, is_ordered, open_runner, same_rows, schema_of, score_parse, score_rows_found, statement_of


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlRunner]:
    path = tmp_path_factory.mktemp("shop") / "shop.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE item(name TEXT, price REAL, stock INTEGER);"
            "INSERT INTO item VALUES ('pen', 1.0, 5), ('cup', 2.5, 0), ('hat', 2.5, 7), ('ink', NULL, 1);"
        )
    connection.close()
    with open_runner(path) as made:
        yield made


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("SELECT name FROM item WHERE stock > 0", "SELECT name FROM item WHERE NOT stock = 0", 1.0),
        ("select NAME from ITEM where stock>0;", "SELECT name FROM item WHERE stock >= 1", 1.0),
        ("```sql\nSELECT name FROM item\n```", "SELECT name FROM item", 1.0),
        ("SELECT name FROM item ORDER BY name", "SELECT name FROM item", 1.0),  # the reference leaves the order free
        ("SELECT name FROM item ORDER BY name DESC", "SELECT name FROM item ORDER BY name", 0.0),
        ("SELECT DISTINCT price FROM item", "SELECT price FROM item", 0.0),  # a multiset: 2.5 comes twice
        ("SELECT price, name FROM item", "SELECT name, price FROM item", 0.0),
        ("SELECT COUNT(*) FROM item", "SELECT 4.0", 1.0),  # 4 is 4.0
        ("SELECT sum(price) FROM item", "SELECT 6", 1.0),
        ("SELECT name FROM item WHERE price = NULL", "SELECT name FROM item WHERE price IS NULL", 0.0),
        ("SELECT nam FROM item", "SELECT name FROM item", 0.0),
        ("the names of all items", "SELECT name FROM item", 0.0),
        ("SELECT name FROM item AS x ORDER BY (SELECT 1)", "SELECT name FROM item ORDER BY rowid", 1.0),
    ],
)
def test_execution(shop: SqlRunner, answer: str, reference: str, value: float) -> None:
    assert score_rows_found(shop, answer, reference).value == value


def test_what_cannot_be_judged_says_why(shop: SqlRunner) -> None:
    assert score_rows_found(shop, "SELECT 1", "SELECT x FROM y").reason == "reference does not run on the database (name)"
    assert (
        score_rows_found(shop, "SELECT 1", "SELECT name FROM item WHERE stock > 99").reason
        == "reference finds no rows, as most wrong statements do"
    )
    assert score_rows_found(shop, "DROP TABLE item", "SELECT 1").reason == "prediction was stopped (denied)"


PROMPT = "CREATE TABLE t (player, rank, \"50/50\", 'x)')\n\nWho is first?"


@pytest.mark.parametrize(
    ("answer", "prompt", "value"),
    [
        ("SELECT player FROM t", PROMPT, 1.0),
        ("SELECT players FROM t", PROMPT, 0.0),
        ("SELECT player FROM t", "Who is first?", 1.0),
        ("SELECT players FROM t", "Who is first?", 1.0),  # without a schema only the grammar is judged
        ("SELECT player FROM", "Who is first?", 0.0),
        ("SELECT player FROM t WHERE (", PROMPT, 0.0),
    ],
)
def test_parsing(answer: str, prompt: str, value: float) -> None:
    with open_runner() as made:
        assert score_parse(made, answer, "SELECT player FROM t", prompt).value == value
        assert score_parse(made, answer, "nonsense", prompt).reason == "reference does not parse (syntax)"


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT 'order by' FROM t -- order by a", False),
        ('SELECT "order by" FROM t /* order by */', False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
    ],
)
def test_order_by_of_the_outermost_select(query: str, ordered: bool) -> None:
    assert is_ordered(query) is ordered


def test_rows_as_multisets() -> None:
    assert same_rows([[1, "a"], [2, "b"]], [[2.0, "b"], [1, "a"]], ordered=False)
    assert not same_rows([[1], [1], [2]], [[1], [2], [2]], ordered=False)
    assert same_rows([[0.1 + 0.2]], [[0.3]], ordered=True)
    assert not same_rows([["1"]], [[1]], ordered=True)
    assert not same_rows([[None]], [[0]], ordered=True)


def test_schemas_and_statements() -> None:
    assert schema_of("CREATE TABLE a (x, y(3)) and create table if not exists b(z); CREATE TABLE c") == [
        "CREATE TABLE a (x, y(3))",
        "create table if not exists b(z)",
    ]
    assert statement_of("```sql\nSELECT 1;\n```") == "SELECT 1"
