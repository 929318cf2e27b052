"""Texts from data and models are shown in the terminal as text: no escape sequence is obeyed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from burnish.cli import main
from burnish.cli.terminal import coloured_mask, safe

HOSTILE = [
    "\x1b[2J",
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "a\rb",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066x",
    "\x00",
    "\x7f",
    "\u2028",
    "\ud83d",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_safe_writes_control_characters_out(text: str) -> None:
    shown = safe(f"before {text} after")
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert not set(shown) & set("\x1b\r\x9b\x00\x07\x7f\u202e\u2066\u2028\ud83d")
    assert "\\u" in shown


def test_ordinary_text_stays() -> None:
    assert safe("Grüße, 世界 🙂\n\tok") == "Grüße, 世界 🙂\n\tok"


def test_mask_is_safe() -> None:
    assert "\x1b" not in coloured_mask([("\x1b[31m", True), ("[bold]x[/bold]", False)]).plain
    assert "[bold]" in coloured_mask([("[bold]x[/bold]", False)]).plain, "rich markup in data is text"


def test_errors_and_check_show_hostile_rows_as_text(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{index} \x1b[2J [red]", "completion": "cat\u202e"} for index in range(30)]
    name = "rows \x1b[31m.jsonl"
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "\x1b[0m"}]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": str(tiny_folder), "data": name}))
    monkeypatch.setattr(sys, "argv", ["burnish", "check", str(recipe), "--show", "3"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
    assert "[red]" in shown.out
