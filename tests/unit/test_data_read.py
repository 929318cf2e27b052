"""Reading: what people's files really hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.formats import to_examples
from burnish.data.read import parse_json, read_rows
from burnish.errors import DataError
from burnish.recipe import DataSection

GOOD = {"prompt": "q", "completion": "a"}


def write(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def test_bom_crlf_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    rows = read_rows(write(tmp_path, b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n"))
    assert not rows.problems
    assert [row.source.rsplit(":", 1)[1] for row in rows.rows] == ["1", "3"], "blank lines count"


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    row = {"prompt": f"a{separator}b", "completion": "c"}
    raw = json.dumps(row, ensure_ascii=False) if separator > "\x1f" else json.dumps(row)
    rows = read_rows(write(tmp_path, raw.encode() + b"\n"))
    assert not rows.problems
    assert rows.rows[0].content == row


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"\xff\xfea\x00", "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', r"rows.jsonl:2: not UTF-8 \(byte 0xe9\)"),
    ],
)
def test_files_that_give_no_rows(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_rows(write(tmp_path, content))


def test_missing_file_folder_and_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="a folder"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match=r"unknown kind of file `\.docx`"):
        read_rows(write(tmp_path, b"x", "a.docx"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": }', "bad JSON"),
        ("[1, 2]", "not a JSON object"),
        ('"text"', "not a JSON object"),
        ('{"prompt": NaN}', "NaN is not JSON"),
        ('{"prompt": "a", "prompt": "b"}', "given twice"),
        ('{"prompt": "a\\u0000b"}', "NUL"),
        ('{"prompt": "\\ud83d"}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", "digits"),
    ],
)
def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path, line: str, expected: str) -> None:
    good = json.dumps(GOOD)
    rows = read_rows(write(tmp_path, f"{good}\n{line}\n{good}\n".encode()))
    assert len(rows.rows) == 2
    (problem,) = rows.problems
    assert problem.where.endswith("rows.jsonl:2")
    assert expected in problem.found


def test_a_cut_last_line_is_never_dropped_silently(tmp_path: Path) -> None:
    """Cut at every byte of the last line (F10): either it is reported, or it is still whole."""
    good = json.dumps(GOOD).encode()
    for cut in range(1, len(good)):
        rows = read_rows(write(tmp_path, good + b"\n" + good[:cut]))
        assert len(rows.rows) == 1
        assert "truncated last line" in rows.problems[0].found
    assert len(read_rows(write(tmp_path, good + b"\n" + good)).rows) == 2


def test_csv(tmp_path: Path) -> None:
    content = '\ufeffquestion;answer\r\n"a; b\nc";d\r\n\r\nx;"say ""hi"""\r\n'.encode()
    rows = read_rows(write(tmp_path, content, "rows.csv"))
    assert not rows.problems
    assert [row.content for row in rows.rows] == [{"question": "a; b\nc", "answer": "d"}, {"question": "x", "answer": 'say "hi"'}]
    assert [row.source.rsplit(":", 1)[1] for row in rows.rows] == ["2", "5"], "the line where the row begins"


def test_csv_mistakes(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path, b"a,b\n1,2\n1,2,3\n4,5\n", "rows.csv"))
    assert len(rows.rows) == 2
    assert "3 cells" in str(rows.problems[0])
    with pytest.raises(DataError, match="repeated name"):
        read_rows(write(tmp_path, b"a,a\n1,2\n", "rows.csv"))
    with pytest.raises(DataError, match="no rows"):
        read_rows(write(tmp_path, b"a,b\n", "rows.csv"))


def test_parquet_names_its_extra_or_reads(tmp_path: Path) -> None:
    path = write(tmp_path, b"PAR1", "rows.parquet")
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        with pytest.raises(DataError, match=r"burnish\[parquet\]"):
            read_rows(path)
        return
    parquet.write_table(arrow.table({"prompt": ["q"], "completion": ["a"]}), path)
    assert read_rows(path).rows[0].content == GOOD


def test_json_array(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path, json.dumps([GOOD, GOOD]).encode(), "rows.json")).rows) == 2


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_parse_json_raises_value_error_only(text: str) -> None:
    try:
        parse_json(text)
    except ValueError:
        return


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "weight", "messages", "prompt", "completion", "from", "value"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_no_row_breaks_the_converter(content: object) -> None:
    from burnish.data.formats import FORMATS
    from burnish.data.read import Row

    row = Row(
        "x:1",
        content if isinstance(content, dict) else {"messages": content, "prompt": content, "completion": content, "conversations": content},
    )
    for name in FORMATS:
        columns = {"prompt_column": "prompt", "completion_column": "completion"} if name == "columns" else {}
        examples, problems = to_examples([row], name, DataSection(train="x", **columns))
        assert bool(examples) != bool(problems)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "q"}], "no assistant message"),
        ([{"role": "assistant", "content": "a"}], "no user message"),
        (
            [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}],
            "ends with a user message",
        ),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}], "trains no token"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 2}], "0 or 1"),
        ([{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}], "on assistant messages only"),
        ([{"role": "wizard", "content": "q"}, {"role": "assistant", "content": "a"}], "unknown role"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], r"messages\[0\].content — missing"),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}], "empty"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], r"messages\[1\].content — empty"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{}]}], "tool call"),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}], "not the first"),
    ],
)
def test_conversations_that_cannot_train(messages: list, expected: str) -> None:
    import re

    from burnish.data.read import Row

    _, problems = to_examples([Row("f:3", {"messages": messages})], "chat", DataSection(train="x"))
    assert any(re.search(expected, str(problem)) for problem in problems), problems


def test_context_column_and_system(write_rows: Callable[..., Path]) -> None:
    from burnish.data.read import Row

    section = DataSection(train="x", prompt_column="input", completion_column="output", context_column="schema", system="be brief")
    (example,), problems = to_examples([Row("f:1", {"input": "q", "output": {"a": 1}, "schema": "TABLE"})], "columns", section)
    assert not problems
    assert example.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "TABLE\n\nq"},
        {"role": "assistant", "content": '{"a": 1}'},
    )
