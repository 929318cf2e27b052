"""A learning curve → its picture and its facts, for its own page and for the run's report. Reads files only."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, MUTED, NARROW, NEUTRAL, blank, dress, svg
from burnish.report.texts import encodable, is_number, visible
from burnish.run import Run

_FACTS: dict[str, Any] = {
    "gain": None, "low": None, "high": None, "trustworthy": False, "reasons": [], "fit": None, "held_out": None, "line": [], "points": [], "missing": [],
    "metric_title": "score", "lower_is_better": False, "equal": "epochs", "rows": {}, "confidence": None, "seconds": None,
}  # fmt: skip


def curve_facts(run: Run) -> dict[str, Any] | None:
    """What a page shows of curve.json; None where there is none yet, or its trainings are still under way."""
    content = run.read_json(run.curve_file) if run.curve_file.exists() else None
    return {**_FACTS, **encodable(content)} if isinstance(content, dict) and content.get("sentence") else None


def curve_figure(facts: dict[str, Any], *, width: int) -> Markup:
    """Each training (a dot), the fitted curve with its band, and the point of doubled data (a ring)."""
    height = 340 if width > NARROW else 280
    figure = blank(width, height)
    axes = figure.add_axes([56 / width, 46 / height, (width - 76) / width, (height - 76) / height])
    percent = not facts["lower_is_better"]
    scale = 100.0 if percent else 1.0
    dress(axes, visible(facts["metric_title"]) + (", %" if percent else ""))
    line = [point for point in facts["line"] if all(is_number(point.get(key)) for key in ("rows", "value", "low", "high"))]
    points = [point for point in facts["points"] if is_number(point.get("value")) and is_number(point.get("rows"))]
    largest = max((point["rows"] for point in points), default=1)
    if line:
        at = [point["rows"] for point in line]
        lows, highs = ([scale * point[key] for point in line] for key in ("low", "high"))
        axes.fill_between(at, lows, highs, color=NEUTRAL, alpha=0.16, linewidth=0, gid="band")
        measured = [point for point in line if point["rows"] <= largest * 1.001]
        axes.plot([p["rows"] for p in measured], [scale * p["value"] for p in measured], color=NEUTRAL, linewidth=1.8, gid="fitted")
        ahead = [point for point in line if point["rows"] >= largest * 0.97]
        axes.plot(
            [p["rows"] for p in ahead], [scale * p["value"] for p in ahead], color=ACCENT, linewidth=1.8, linestyle=(0, (4, 3)), gid="ahead"
        )
        end = line[-1]
        axes.plot(
            [end["rows"]],
            [scale * end["value"]],
            "o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=ACCENT,
            markeredgewidth=2,
            gid="doubled",
        )
    axes.plot(
        [p["rows"] for p in points], [scale * p["value"] for p in points], "o", color=NEUTRAL, markersize=5.5, alpha=0.75, gid="trainings"
    )
    axes.set_xscale("log")
    ticks = sorted({point["rows"] for point in points if point.get("seed") == 0} or {point["rows"] for point in points})
    ticks += [2 * largest] if line else []
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training rows", color=MUTED, fontsize=11, loc="right", labelpad=1)
    return svg(figure, f"curve-{width}", "Score of each training by its number of rows, the fitted curve and the point of doubled data")
