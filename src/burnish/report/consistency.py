"""Consistency on the page: a picture of every check, then the table, and what a judge said of the answers."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, BAD, GOOD, INK, LINE, MUTED, NARROW, NEUTRAL, WIDE, blank, svg
from burnish.report.texts import interval, is_number, score, visible
from burnish.run import Run

_MEASURE: dict[str, Any] = {
    "key": "", "title": "", "reads": "", "binary": True, "lower_is_better": False, "note": None, "candidates": {}, "comparisons": {},
}  # fmt: skip
_CONTENT: dict[str, Any] = {"chosen": None, "against": None, "measures": [], "refused": []}
_JUDGE = dict.fromkeys(
    ("subject", "against", "model", "base_url", "judges_itself", "rubric", "confidence", "rows", "of_rows", "n", "won", "lost", "tied", "win_rate",
     "low", "high", "p_value", "verdict", "reasons", "position_bias", "unreadable", "labels", "spent")
)  # fmt: skip
_ROW_HEIGHT, _TOP = 62, 4  # pixels
_OFFSETS = {"subject": 0.12, "against": 0.30}  # of a track below the middle of its row, in heights of a row


def consistency_facts(comparison: dict[str, Any]) -> dict[str, Any] | None:
    """What report.json holds under `consistency`; None where nothing was measured."""
    content = comparison.get("consistency")
    if not isinstance(content, dict) or not content.get("measures"):
        return None
    return {**_CONTENT, **content, "measures": [{**_MEASURE, **measure} for measure in content["measures"]]}


def judge_facts(run: Run) -> dict[str, Any] | None:
    """What a judge found, without its single judgements."""
    if not run.judge_file.exists():
        return None
    content = run.read_json(run.judge_file)
    return {key: content.get(key) for key in _JUDGE} if isinstance(content, dict) else None


def consistency_charts(facts: dict[str, Any], subject: str | None) -> Markup | None:
    if not facts["consistency"]:
        return None
    charts = Markup("")
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = consistency_figure(facts["consistency"], subject, width=width)
        charts += Markup('<div class="{}">{}</div>').format(kind, drawn)
    return charts


def consistency_figure(content: dict[str, Any], subject: str | None, *, width: int) -> Markup:
    """One row per check: the tuned model and the best baseline as dots with intervals, every other candidate as a small ring."""
    measures = [measure for measure in content["measures"] if any(is_number(row["value"]) for row in measure["candidates"].values())]
    against = content["against"]
    height = len(measures) * _ROW_HEIGHT + 30
    figure = blank(width, height)
    axes = figure.add_axes([0.01, 26 / height, 0.98, 1 - (26 + _TOP) / height])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(measures) - 0.5, -0.5)
    axes.patch.set_visible(False)
    axes.set_yticks([])
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_xticks(ticks, ["0 %", "25 %", "50 %", "75 %", "100 %"], color=MUTED, fontsize=11)
    axes.tick_params(axis="x", length=0, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for label, tick in zip(axes.get_xticklabels(), ticks, strict=True):
        label.set_horizontalalignment("left" if tick == 0 else "right" if tick == 1 else "center")
    lines = []
    for index, measure in enumerate(measures):
        axes.vlines(ticks, index + 0.02, index + 0.42, color=LINE, linewidth=1, zorder=0.5, clip_on=False)
        lines.append(_draw(axes, index, measure, subject=subject, against=against, width=width))
    label = "Checks with intervals. " + "; ".join(lines)
    return svg(figure, f"consistency-{width}", label)


def _draw(axes: Any, index: int, measure: dict[str, Any], *, subject: str | None, against: str | None, width: int) -> str:
    """One row; returns it in words."""
    rows = measure["candidates"]
    main = rows.get(subject) or rows.get(against) or next(iter(rows.values()))
    pair = measure["comparisons"].get(subject) or {}
    colour = {"BETTER": GOOD, "WORSE": BAD}.get(str(pair.get("verdict")), INK)
    place = {"transform": axes.get_yaxis_transform(), "parse_math": False, "va": "center"}
    room = (width - 110) // 8 if width <= NARROW else 70
    title = visible(" ".join(str(measure["title"]).split())) + (" (fewer is better)" if measure["lower_is_better"] else "")
    axes.text(0, index - 0.24, title if len(title) <= room else f"{title[: room - 1]}…", color=INK, fontsize=13, ha="left", **place)
    text = score(main["value"]) + (f"  ({interval(main['low'], main['high'])})" if width > NARROW else "")
    axes.text(1, index - 0.24, text, color=colour, fontsize=13, ha="right", **place)
    for name, row in rows.items():
        if name not in (subject, against) and is_number(row["value"]):
            axes.plot([row["value"]], [index + 0.21], "o", markersize=6, markerfacecolor="none", markeredgecolor=MUTED, clip_on=False)
    for name, shade, offset in ((against, NEUTRAL, _OFFSETS["against"]), (subject, ACCENT, _OFFSETS["subject"])):
        row = rows.get(name)
        if row is None or not is_number(row["value"]):
            continue
        axes.plot(
            [row["low"], row["high"]], [index + offset] * 2, color=shade, linewidth=6, alpha=0.28, solid_capstyle="round", clip_on=False
        )
        axes.plot([row["value"]], [index + offset], "o", color=shade, markersize=9, clip_on=False)
    values = ", ".join(f"{name} {score(row['value'])}" for name, row in rows.items() if is_number(row["value"]))
    return f"{title}: {values}"
