"""What was forgotten, and the points between task and retention: the facts and the picture."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, BAD, GOOD, INK, LINE, MUTED, NARROW, NEUTRAL, SURFACE, blank, dress, svg
from burnish.report.texts import is_number, visible
from burnish.run import Run

_RETAIN: dict[str, Any] = {
    "suites": [], "whole": None, "verdict": None, "sentence": None, "margin": None, "confidence": None, "broken": [], "max_drop": None, "gate": None, "repair": None,
}  # fmt: skip
_SUITE = dict.fromkeys(
    ("suite", "title", "unit", "n", "before", "after", "change", "low", "high", "p_value", "p_adjusted", "verdict", "detectable")
)
_POINT = dict.fromkeys(
    (
        "name",
        "kind",
        "task",
        "task_low",
        "task_high",
        "task_rows",
        "change",
        "change_low",
        "change_high",
        "gain_kept",
        "loss_kept",
        "training_seconds",
        "seconds",
    )
)
_REPAIR: dict[str, Any] = {
    "rule": None, "chosen": None, "why": None, "sentence": None, "task_title": "task", "task_percent": True, "points": [], "left_out": [], "reported": {}, "gain_kept": {}, "loss_kept": {},
    "published": None, "rows": {}, "gate": None,
}  # fmt: skip
_BROKEN = dict.fromkeys(("suite", "source", "prompt", "expected", "before", "after", "answer_before", "answer_after"))


def retain_facts(run: Run) -> dict[str, Any] | None:
    """retain.json with every key that the page looks for; None where nothing was measured."""
    content = run.read_json(run.retain_file) if run.retain_file.exists() else None
    if not isinstance(content, dict) or not content.get("suites"):
        return None
    found = {key: content.get(key, default) for key, default in _RETAIN.items()}
    found["suites"] = [{**_SUITE, **row} for row in found["suites"]]
    found["whole"] = {**_SUITE, **(found["whole"] or {})}
    found["broken"] = [{**_BROKEN, **row} for row in found["broken"] or []]
    if found["repair"] is not None:
        found["repair"] = {**_REPAIR, **found["repair"]}
        found["repair"]["points"] = [{**_POINT, **point} for point in found["repair"]["points"]]
    return found


def suites_figure(found: dict[str, Any], *, width: int) -> Markup:
    """One row for each suite and the whole: the change with its interval; left of the line something was lost."""
    rows = [*found["suites"], found["whole"]]
    height = 40 + 34 * len(rows)
    figure = blank(width, height)
    names = 110 if width <= NARROW else 210
    axes = figure.add_axes([names / width, 30 / height, (width - names - 14) / width, (height - 44) / height])
    dress(axes, "")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, linewidth=1)
    axes.axvline(0, color=MUTED, linewidth=1)
    for index, row in enumerate(rows):
        colour = {"LOST": BAD, "KEPT": GOOD}.get(str(row["verdict"]), NEUTRAL)
        if is_number(row["low"]) and is_number(row["high"]):
            axes.plot([100 * row["low"], 100 * row["high"]], [index, index], color=colour, linewidth=7, alpha=0.28, solid_capstyle="round")
        if is_number(row["change"]):
            axes.plot([100 * row["change"]], [index], "o", color=colour, markersize=9, markeredgecolor=SURFACE, markeredgewidth=2)
    room = names // 8
    axes.set_yticks(range(len(rows)), [visible(str(row["suite"] or row["title"]))[:room] for row in rows])
    axes.tick_params(axis="y", labelsize=12, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    label = "Change of each suite. " + "; ".join(
        f"{row['suite'] or row['title']}: {_points(row['change'])} points, {row['verdict']}" for row in rows
    )
    return svg(figure, f"suites-{width}", label)


def pareto_figure(repair: dict[str, Any], *, width: int) -> Markup:
    """Every point: the task's score upwards, retention to the right, both with intervals; on the rows for choosing. Base and tuned named, the chosen one ringed."""
    points = [point for point in repair["points"] if is_number(point["task"]) and is_number(point["change"])]
    height = 380 if width > NARROW else 320
    figure = blank(width, height)
    axes = figure.add_axes([54 / width, 44 / height, (width - 74) / width, (height - 78) / height])
    unit = 100 if repair["task_percent"] else 1
    dress(axes, f"{visible(str(repair['task_title']))[: width // 9]}, validation rows")
    scales = sorted(
        (point for point in points if point["kind"] in ("base", "scale", "tuned")),
        key=lambda point: point.get("scale", point["kind"] == "tuned") or 0,
    )
    axes.plot(
        [100 * point["change"] for point in scales],
        [unit * point["task"] for point in scales],
        color=MUTED,
        linewidth=1,
        linestyle=(0, (3, 3)),
        gid="scales",
    )
    ends = [100 * pick(point["change"] for point in points) for pick in (min, max)] if points else [0.0, 0.0]
    for index, point in enumerate(sorted(points, key=lambda point: point["change"])):
        chosen = point["name"] == repair["chosen"]
        colour = ACCENT if chosen else {"base": MUTED, "tuned": INK}.get(str(point["kind"]), NEUTRAL)
        across, up = 100 * point["change"], unit * point["task"]
        sides = {
            key: [factor * max(0.0, point[key] - point[f"{key}_low"]), factor * max(0.0, point[f"{key}_high"] - point[key])]
            for key, factor in (("change", 100), ("task", unit))
            if is_number(point[f"{key}_low"]) and is_number(point[f"{key}_high"])
        }
        bars = {axis: [[side] for side in sides[key]] for axis, key in (("xerr", "change"), ("yerr", "task")) if key in sides}
        if bars:
            axes.errorbar([across], [up], **bars, color=colour, linewidth=1.6, alpha=0.5, fmt="none")
        axes.plot(
            [across],
            [up],
            "o" if point["kind"] in ("base", "scale", "tuned") else "s",
            color=colour,
            markersize=9,
            markeredgecolor=SURFACE,
            markeredgewidth=1.5,
        )
        if chosen:
            axes.plot([across], [up], "o", markersize=17, markerfacecolor="none", markeredgecolor=ACCENT, markeredgewidth=2, gid="chosen")
        if width > NARROW or chosen or point["kind"] in ("base", "tuned"):
            late = across > sum(ends) / 2 and width <= NARROW
            place = {"xytext": (-9 if late else 9, 8 if index % 2 == 0 else -13), "ha": "right" if late else "left"}
            axes.annotate(
                visible(str(point["name"]))[:24],
                (across, up),
                **place,
                textcoords="offset points",
                color=colour,
                fontsize=12,
                parse_math=False,
            )
    axes.axvline(0, color=LINE, linewidth=1)
    axes.margins(0.12)
    axes.set_xlabel("retention against the base, points", color=MUTED, fontsize=11, loc="right", labelpad=2)
    label = "Task against retention. " + "; ".join(
        f"{point['name']}: task {unit * point['task']:.3g}, retention {_points(point['change'])} points" for point in points
    )
    return svg(figure, f"pareto-{width}", label)


def retain_figures(found: dict[str, Any] | None, *, width: int) -> dict[str, Markup | None]:
    """What the page draws of it, by name."""
    if found is None:
        return {}
    repair = found["repair"]
    return {
        "retention": suites_figure(found, width=width),
        "pareto": pareto_figure(repair, width=width) if repair and repair["points"] else None,
    }


def _points(value: Any) -> str:
    return f"{100 * value:+.1f}" if is_number(value) else "–"
