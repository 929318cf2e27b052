"""Forecast and fact: what `burnish estimate` foretold, beside what the run's files say happened."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import ACCENT, INK, LINE, MUTED, NEUTRAL, blank, svg
from burnish.report.texts import is_number, seconds
from burnish.run import Run

STEPS = {"prepare": "prepare", "baselines": "baselines", "train": "training", "evaluate": "tuned answers", "compare": "compare"}
_ROW_HEIGHT, _NAMES = 40, 92  # pixels


def forecast_facts(run: Run) -> dict[str, Any] | None:
    """Lines of name, title, unit, forecast, actual and ratio (forecast ÷ actual). None: there was no forecast, or it was of other rows or another recipe."""
    content = run.read_json(run.estimate_file) if run.estimate_file.exists() else {}
    content = content if isinstance(content, dict) else {}
    here = content.get("here")
    if not isinstance(here, dict) or not run.manifest_file.exists() or content.get("key") != run.asked_key():
        return None
    steps = run.status().get("steps") or {}
    took = {name: (steps.get(name) or {}).get("seconds") for name in STEPS}
    summary = run.read_json(run.training_file) if run.training_file.exists() else {}
    done, count = summary.get("step_seconds"), summary.get("steps")
    foretold = here.get("seconds") or {}
    known = [name for name in STEPS if is_number(took[name]) and is_number(foretold.get(name)) and foretold[name] > 0]
    lines = [
        _line("step", "one training step", "seconds", here.get("step_seconds"), done / count if is_number(done) and count else None),
        _line("memory", "peak memory", "bytes", (here.get("memory") or {}).get("total"), summary.get("peak_memory_bytes")),
        *(_line(name, STEPS[name], "seconds", foretold[name], took[name]) for name in known),
        _line("total", "all steps", "seconds", sum(foretold[name] for name in known), sum(took[name] for name in known)),
    ]
    return {
        "machine": here.get("machine"),
        "low_seconds": here.get("low_seconds"),
        "high_seconds": here.get("high_seconds"),
        "probe_seconds": content.get("probe_seconds"),
        "after_training": bool(content.get("after_training")),
        "resumed": bool(summary.get("resumed_at_steps")),
        "assumptions": [str(text) for text in here.get("assumptions") or []],
        "lines": [line for line in lines if line["ratio"] is not None],
    }


def _line(name: str, title: str, unit: str, forecast: Any, actual: Any) -> dict[str, Any]:
    ratio = round(forecast / actual, 4) if is_number(forecast) and is_number(actual) and actual > 0 else None
    return {"name": name, "title": title, "unit": unit, "forecast": forecast, "actual": actual, "ratio": ratio}


def forecast_figure(facts: dict[str, Any], *, width: int) -> Markup | None:
    """Two bars for each step: what was foretold (grey) and what it took."""
    lines = [line for line in facts["lines"] if line["unit"] == "seconds" and line["name"] != "step"]
    if not lines:
        return None
    height = len(lines) * _ROW_HEIGHT + 8
    figure = blank(width, height)
    axes = figure.add_axes([0, 0, 1, 1])
    axes.patch.set_visible(False)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    room, longest = width - _NAMES - 92, max(max(line["forecast"], line["actual"]) for line in lines)
    for index, line in enumerate(lines):
        top = 4 + index * _ROW_HEIGHT
        axes.text(0, top + 15, line["title"], color=INK, fontsize=12, va="center", parse_math=False)
        axes.plot([_NAMES, _NAMES], [top, top + 30], color=LINE, linewidth=1)
        for place, (key, colour) in enumerate((("forecast", NEUTRAL), ("actual", ACCENT))):
            end = _NAMES + room * line[key] / longest
            at = top + 8 + 14 * place
            axes.plot([_NAMES, max(end, _NAMES + 1)], [at, at], color=colour, linewidth=8, solid_capstyle="butt")
            axes.text(end + 6, at, seconds(line[key]), color=MUTED, fontsize=11, va="center", parse_math=False)
    label = "; ".join(f"{line['title']}: forecast {seconds(line['forecast'])}, took {seconds(line['actual'])}" for line in lines)
    return svg(figure, f"forecast-{width}", f"Forecast and fact. {label}")
