"""Texts of the report: what is shown for characters that hide, for numbers, and for an answer beside its reference."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.report import texts


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain text, naïve, 日本語, שלום", "plain text, naïve, 日本語, שלום"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x00b\x07c\x7f", "a␀b␇c␡"),
        ("line\r\n", "line␍\n"),
        ("abc\u202edef\u2066", "abc[U+202E]def[U+2066]"),
        ("zero\u200bwidth\ufeff", "zero[U+200B]width[U+FEFF]"),
        ("\u2028\u2029\x85", "[U+2028][U+2029][U+0085]"),
        ("tag\U000e0041", "tag[U+E0041]"),
        ("half\ud800", "half[U+D800]"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),  # joiners belong to writing
    ],
)
def test_visible(raw: str, shown: str) -> None:
    assert texts.visible(raw) == shown


def test_every_control_and_bidi_character_is_shown() -> None:
    bidi = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character in "\n\t":
            continue
        if unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in bidi or character in "\u200e\u200f\u061c":
            assert character not in texts.visible(character), f"U+{code:04X}"


def test_marked_shows_words_too_many_and_words_missing() -> None:
    assert texts.marked('{"area": "attic"}', '{"area": "kitchen"}') == ("{&#34;area&#34;: &#34;<del>kitchen</del><mark>attic</mark>&#34;}")
    assert texts.marked("turn on the light now", "turn on the light") == "turn on the light <mark>now</mark>"


def test_marked_ignores_spaces_and_leaves_foreign_texts_alone() -> None:
    assert texts.marked('{"a":1}', '{ "a": 1 }') == "{&#34;a&#34;:1}"
    assert texts.marked("something else entirely", "no word in common here at all") == "something else entirely"
    long = "word " * (texts.MARKED_WORDS + 1)
    assert texts.marked(long, long + "x") == long


@given(st.text(), st.text())
def test_marked_never_lets_markup_through_and_keeps_the_answer(answer: str, reference: str) -> None:
    marked = texts.marked(answer, reference)
    bare = str(marked).replace("<mark>", "").replace("</mark>", "").replace("<del>", "").replace("</del>", "")
    assert "<" not in bare
    assert ">" not in bare
    without_missing = "".join(part.split("</del>")[-1] for part in str(marked).split("<del>"))
    shown = type(marked)(without_missing.replace("<mark>", "").replace("</mark>", "")).unescape()
    assert "".join(shown.split()) == "".join(texts.visible(answer).split())


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        (texts.score, 0.7264, "72.6 %"),
        (texts.score, None, "–"),
        (texts.score, "<b>", "–"),
        (texts.score, float("nan"), "–"),
        (texts.whole_percent, 0.95, "95 %"),
        (texts.whole_percent, 0.995, "99.5 %"),
        (texts.signed, -0.114, "−11.4"),
        (texts.probability, 1e-9, "< 0.001"),
        (texts.probability, 0.0312, "0.031"),
        (texts.seconds, 0.0421, "42 ms"),
        (texts.seconds, 0.31, "0.31 s"),
        (texts.seconds, 301.4, "5 min 1 s"),
        (texts.seconds, 59.99, "60.0 s"),
        (texts.seconds, 7384, "2 h 3 min"),
        (texts.number, 271895168, "271,895,168"),
        (texts.number, True, "–"),
        (texts.size, 3 * 2**30, "3.00 GiB"),
        (texts.size, 900, "900 B"),
        (texts.fraction, 7, "1.000"),
        (texts.fraction, "1);x:url(", "0.000"),
    ],
)
def test_numbers(function: object, value: object, shown: str) -> None:
    assert callable(function)
    assert function(value) == shown


def test_metrics_that_are_no_fractions_keep_their_unit() -> None:
    assert texts.score(3.25, percent=False) == "3.25"
    assert texts.interval(3.0, 3.5, percent=False) == "3 – 3.5"
    assert texts.signed(-0.5, percent=False) == "−0.5"


def test_encodable_removes_what_utf8_and_json_cannot_hold() -> None:
    assert texts.encodable({"a\ud800": ["\udfff", float("inf"), 1.5, None]}) == {"a\\ud800": ["\\udfff", None, 1.5, None]}
