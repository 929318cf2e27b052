"""The pages of `burnish curve` and `burnish value`: a folder's files → one HTML page each. Reads files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from burnish.report.curve import curve_facts, curve_figure
from burnish.report.figures import ACCENT, BAD, MUTED, NARROW, NEUTRAL, WIDE, blank, dress, svg
from burnish.report.page import environment
from burnish.report.texts import encodable, is_number, visible
from burnish.run import Run

SHOWN_ROWS = 30  # at either end of the ranking
_BINS = 40


def curve_report(run: Run) -> Path:
    """Write curve.html from curve.json; return its path."""
    facts = curve_facts(run)
    charts = Markup("")
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        if facts is not None:
            charts += Markup('<div class="{}">{}</div>').format(kind, curve_figure(facts, width=width))
    page = environment().get_template("curve.html.jinja").render(curve=facts, name=run.recipe_as_asked().name, chart=charts)
    run.write_text(run.curve_report_file, page)
    return run.curve_report_file


def value_report(run: Run) -> Path:
    """Write value.html from value.json and value.jsonl; return its path."""
    facts = encodable(run.read_json(run.value_file))
    ranked = encodable(run.read_jsonl(run.value_rows_file))
    charts = Markup("")
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = [proof_figure(facts, width=width)] if facts["proof"] else []
        charts += Markup('<div class="{}">{}</div>').format(kind, Markup("").join([*drawn, badness_figure(ranked, width=width)]))
    shown = {
        **facts,
        "worst": ranked[:SHOWN_ROWS],
        "best": ranked[: -SHOWN_ROWS - 1 : -1],
        "name": run.recipe_as_asked().name,
        "charts": charts,
    }
    run.write_text(run.value_report_file, environment().get_template("value.html.jinja").render(**shown))
    return run.value_report_file


def proof_figure(facts: dict[str, Any], *, width: int) -> Markup:
    """Each training of the two arms (a dot), their means (a line)."""
    height = 150
    figure = blank(width, height)
    axes = figure.add_axes([84 / width, 34 / height, (width - 104) / width, (height - 62) / height])
    scale = 1.0 if facts["lower_is_better"] else 100.0
    dress(axes, visible(facts["metric_title"]) + ("" if facts["lower_is_better"] else ", %"))
    for line, (arm, colour) in enumerate((("random", NEUTRAL), ("kept", ACCENT))):
        values = [scale * one["value"] for one in facts["proof"]["trainings"] if one["arm"] == arm and is_number(one["value"])]
        axes.plot(values, [line] * len(values), "o", color=colour, markersize=8, alpha=0.7, gid=arm)
        axes.plot([scale * facts["proof"][arm]] * 2, [line - 0.3, line + 0.3], color=colour, linewidth=2)
    axes.set_ylim(-0.6, 1.6)
    axes.set_yticks([0, 1], ["random rows", "kept rows"])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=MUTED, alpha=0.2)
    return svg(figure, f"proof-{width}", "What each training on kept and on random rows scored")


def badness_figure(ranked: list[dict[str, Any]], *, width: int) -> Markup:
    """How many rows have which badness; what is left out is marked."""
    height = 200
    figure = blank(width, height)
    axes = figure.add_axes([52 / width, 40 / height, (width - 72) / width, (height - 70) / height])
    dress(axes, "rows")
    edges = [number / _BINS for number in range(_BINS + 1)]
    parts = [[row["badness"] for row in ranked if row["kept"] is kept] for kept in (True, False)]
    axes.hist(parts, bins=edges, stacked=True, color=[NEUTRAL, BAD])
    axes.set_xlabel("badness", color=MUTED, fontsize=11, loc="right", labelpad=1)
    return svg(figure, f"badness-{width}", "How many rows have which badness")
