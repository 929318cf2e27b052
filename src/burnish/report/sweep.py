"""A sweep's folder → one HTML page: how the best value fell from trial to trial, and which values of each key did well. Reads files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, BAD, MUTED, NARROW, NEUTRAL, WIDE, blank, dress, svg
from burnish.report.page import environment
from burnish.report.texts import encodable, is_number, visible
from burnish.run import Run

COLOURS = {"complete": NEUTRAL, "pruned": MUTED, "diverged": BAD, "failed": MUTED, "running": MUTED}


def sweep_report(run: Run) -> Path:
    """Write sweep.html from sweep.json and trials.jsonl; return its path."""
    facts = encodable(run.read_json(run.sweep_file))
    rows = {row["trial"]: row for row in encodable(run.read_jsonl(run.trials_file))}
    trials = [rows[number] for number in sorted(rows)]
    charts = Markup("")
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = [history_figure(trials, facts, width=width), *(value_figure(trials, facts, key, width=width) for key in facts["space"])]
        charts += Markup('<div class="{}">{}</div>').format(kind, Markup("").join(drawn))
    name = run.recipe_as_asked().name
    page = environment().get_template("sweep.html.jinja").render(**facts, name=name, trials=trials, charts=charts)
    run.write_text(run.sweep_report_file, page)
    return run.sweep_report_file


def history_figure(trials: list[dict[str, Any]], facts: dict[str, Any], *, width: int) -> Markup:
    """Each whole trial's value (a dot), the best so far (a line), and below them the trials that were given up (crosses)."""
    figure, axes = _axes(width, facts["metric_title"])
    whole = [trial for trial in trials if is_number(trial.get("value"))]
    better = min if facts["objective"] == "validation_loss" else max
    best = [better(trial["value"] for trial in whole[: index + 1]) for index in range(len(whole))]
    axes.plot([trial["trial"] for trial in whole], best, color=ACCENT, linewidth=1.6, drawstyle="steps-post", gid="best")
    axes.plot([trial["trial"] for trial in whole], [trial["value"] for trial in whole], "o", color=NEUTRAL, markersize=6, gid="complete")
    for trial in trials:
        if not is_number(trial.get("value")):
            axes.plot(
                [trial["trial"]], [0.03], "x", color=COLOURS.get(trial["state"], MUTED), markersize=7, transform=axes.get_xaxis_transform()
            )
    axes.set_xlabel("trial", color=MUTED, fontsize=11, loc="right", labelpad=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return svg(figure, f"history-{width}", "Value of each trial and the best so far")


def value_figure(trials: list[dict[str, Any]], facts: dict[str, Any], key: str, *, width: int) -> Markup:
    """What each value of one key brought; a trial that was given up stands at the lower edge."""
    figure, axes = _axes(width, f"{visible(key)}: {facts['metric_title']}")
    values = [trial["values"][key] for trial in trials]
    numbers = all(is_number(value) for value in values)
    names = [] if numbers else list(dict.fromkeys(map(str, values)))
    if facts["space"][key].endswith("(log)"):
        axes.set_xscale("log")
    for trial, value in zip(trials, values, strict=True):
        at = value if numbers else names.index(str(value))
        if is_number(trial.get("value")):
            is_best = trial["trial"] == facts["best"]["trial"]
            axes.plot([at], [trial["value"]], "o", color=ACCENT if is_best else NEUTRAL, markersize=9 if is_best else 6)
        else:
            axes.plot([at], [0.03], "x", color=COLOURS.get(trial["state"], MUTED), markersize=7, transform=axes.get_xaxis_transform())
    if names:
        axes.set_xticks(range(len(names)), [visible(name)[:30] for name in names])
    return svg(figure, f"{key.replace('.', '-')}-{width}", f"Value of each trial by {key}")


def _axes(width: int, title: str) -> tuple[Any, Any]:
    height = 240
    figure = blank(width, height)
    axes = figure.add_axes([52 / width, 40 / height, (width - 62) / width, (height - 70) / height])
    dress(axes, title)
    return figure, axes
