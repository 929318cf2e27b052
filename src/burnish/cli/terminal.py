"""What a person sees in the terminal: progress bars, tables, texts made safe. No logic of the package."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from burnish.types import Tell

# A pipe has no width; 80 columns would break the table of candidates into pieces.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)
_LINE_EVERY_SECONDS = 15.0


def safe(text: object) -> str:
    """Text from data or models for a terminal: control and direction characters are written out, so that none is obeyed."""
    return "".join(
        c if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cf", "Cs") or c in "\u2028\u2029") else f"\\u{ord(c):04x}"
        for c in str(text)
    )


def say(text: object = "", style: str | None = None) -> None:
    out.print(Text(safe(text), style=style or ""))


def complain(text: object) -> None:
    err.print(Text(safe(text), style="red"))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    made = Table(title=Text(safe(title)), title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(safe(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(safe(cell)) for cell in row))
    out.print(made)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Tell]:
    """A Tell that draws bars on a terminal, writes a line now and then to a pipe, or (quiet) nothing. All of it on stderr."""
    if quiet:
        yield lambda what, done, total, detail: None
    elif err.is_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}", markup=False), TimeElapsedColumn(), console=err,
        ) as bars:  # fmt: skip
            yield _Bars(bars)
    else:
        yield _Lines()


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars, self.tasks = bars, dict[str, TaskID]()

    def __call__(self, what: str, done: int, total: int, detail: str) -> None:
        if total == 0:
            self.bars.console.print(Text(f"{safe(what)}: {safe(detail)}" if detail else safe(what), style="dim"))
            return
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, detail="")
        self.bars.update(self.tasks[what], completed=done, total=total, detail=safe(detail))


class _Lines:
    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int, detail: str) -> None:
        now = time.monotonic()
        if 0 < done < total and now - self.last.get(what, 0.0) < _LINE_EVERY_SECONDS:
            return
        self.last[what] = now
        count = f" {done}/{total}" if total else ""
        print(f"{safe(what)}{count}{': ' if detail else ''}{safe(detail)}", file=sys.stderr, flush=True)


def coloured_mask(segments: Sequence[tuple[str, bool]]) -> Text:
    """A training row: what is trained in green, what is only read in grey; without colours, trained text stands in ⟦ ⟧."""
    text = Text()
    for part, trained in segments:
        shown = safe(part)
        text.append(f"⟦{shown}⟧" if trained and out.color_system is None else shown, style="bold green" if trained else "bright_black")
    return text


def percent(value: Any) -> str:
    return "–" if value is None else f"{100 * float(value):.1f} %"


def score(value: Any, unit: str | None = None) -> str:
    """A score in per cent, or in the metric's own unit."""
    return percent(value) if value is None or unit is None else f"{float(value):.4f}"


def difference(item: Any, unit: str | None = None) -> str:
    """A difference with its interval: in points, or in the metric's own unit."""
    if unit is None:
        return f"{100 * item['difference']:+.1f} points [{100 * item['low']:+.1f}, {100 * item['high']:+.1f}]"
    return f"{item['difference']:+.4f} {unit} [{item['low']:+.4f}, {item['high']:+.4f}]"


def seconds(value: Any) -> str:
    if value is None:
        return "–"
    number = float(value)
    return f"{number:.2f} s" if number < 120 else f"{number / 60:.1f} min"
