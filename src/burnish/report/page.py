"""The facts → one HTML page. Every value is escaped by Jinja, and every hiding or reordering character is shown."""

from __future__ import annotations

from importlib import resources
from itertools import groupby
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from burnish.report import texts
from burnish.report.chain import rate_figure, stages_figure
from burnish.report.consistency import consistency_charts
from burnish.report.curve import curve_figure
from burnish.report.decision import decision_view
from burnish.report.figures import NARROW, WIDE, differences_figure, scores_figure, training_figure
from burnish.report.forecast import forecast_figure
from burnish.report.pareto import retain_figures

LONG_TEXT, LONGEST_TEXT = 400, 20_000  # characters: folded from here, cut from there
FIRST_FIELDS, FIRST_CARDS = 15, 4  # shown unfolded: rows of the per-field table, rows of answers of one kind
PROMPT_FORMS = {"as_is": "as it is", "instructed": "with an instruction"}

_FILTERS = (
    texts.score,
    texts.whole_percent,
    texts.interval,
    texts.signed,
    texts.probability,
    texts.seconds,
    texts.number,
    texts.loss,
    texts.size,
    texts.fraction,
)


def render(facts: dict[str, Any]) -> str:
    """The whole page, with style and charts inside."""
    further = decision_view(facts["decision"]) if facts["decision"] else {}
    return environment().get_template("report.html.jinja").render(**facts, **further, view=_view(facts))


def environment() -> Environment:
    """Jinja with everything escaped, and our filters."""
    made = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update({function.__name__: function for function in _FILTERS})
    made.globals.update(
        marked=texts.marked,
        LONG=LONG_TEXT,
        LONGEST=LONGEST_TEXT,
        FIRST_FIELDS=FIRST_FIELDS,
        FIRST_CARDS=FIRST_CARDS,
        PROMPT_FORMS=PROMPT_FORMS,
    )
    return made


def _template(name: str) -> str:
    return resources.files("burnish.report").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: Any) -> Any:
    """What every {{ … }} of the template goes through, before escaping."""
    if value is None:
        return texts.MISSING
    if isinstance(value, list | dict):
        return texts.visible(str(value))
    return texts.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _view(facts: dict[str, Any]) -> dict[str, Any]:
    """What the template shows besides the facts themselves: charts, and facts turned into tables."""
    titles = {row["name"]: row["title"] for row in facts["candidates"]}
    others = [name for name in (facts["subject"], facts["best_baseline"]) if name]
    return {
        "titles": titles,
        "verdict_class": {"BETTER": "good", "WORSE": "bad"}.get(str(facts["verdict"]["verdict"]), "open"),
        "lead": next((pair for pair in facts["comparisons"] if pair["baseline"] == facts["best_baseline"]), None),
        "by_name": {row["name"]: row for row in facts["candidates"]},
        "first": others,
        "rest": [name for name in titles if name not in others],
        "metrics": _metrics(facts["candidates"], facts["verdict"]["metric"]),
        "fields": _fields(facts["fields"] or {}),
        "tried": _tried(facts["baselines"] or {}),
        "charts": _charts(facts),
        "consistency_chart": consistency_charts(facts, facts["subject"]),
    }


def _charts(facts: dict[str, Any]) -> dict[str, Markup]:
    verdict = facts["verdict"]
    charts: dict[str, Markup] = {}
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = {
            "scores": scores_figure(facts["candidates"], facts["subject"], percent=verdict["percent"], width=width)
            if facts["candidates"]
            else None,
            "differences": differences_figure(
                facts["comparisons"],
                percent=verdict["percent"],
                detectable=verdict["detectable_difference"],
                width=width,
            )
            if facts["comparisons"]
            else None,
            "training": training_figure(facts["training"], width=width)
            if facts["training"] and (facts["training"]["steps"] or facts["training"]["validations"])
            else None,
            "rate": rate_figure(facts["training"]["range_test"], width=width)
            if facts["training"] and facts["training"]["range_test"] and facts["training"]["range_test"]["points"]
            else None,
            "curve": curve_figure(facts["curve"], width=width) if facts["curve"] else None,
            "stages": stages_figure(facts["stages"], width=width) if facts["stages"] and facts["stages"]["states"] else None,
            "forecast": forecast_figure(facts["forecast"], width=width) if facts["forecast"] else None,
            **retain_figures(facts["retain"], width=width),
        }
        for name, chart in drawn.items():
            if chart is not None:
                charts[name] = charts.get(name, Markup("")) + Markup('<div class="{}">{}</div>').format(kind, chart)
    return charts


def _metrics(candidates: list[dict[str, Any]], main: str) -> list[dict[str, Any]]:
    """The other metrics as rows: title, unit, and the value of each candidate."""
    names = dict.fromkeys(name for row in candidates for name in row["metrics"] if name != main)
    rows = []
    for name in names:
        values = {row["name"]: _metric(row["metrics"].get(name)) for row in candidates}
        numbers = [value["value"] for value in values.values() if texts.is_number(value["value"])]
        title = next((row["metrics"][name]["title"] for row in candidates if row["metrics"].get(name, {}).get("title")), name)
        rows.append({"name": title, "values": values, "percent": all(0 <= value <= 1 for value in numbers)})
    return rows


def _metric(value: Any) -> dict[str, Any]:
    empty = {"value": None, "low": None, "high": None}
    return {**empty, **value} if isinstance(value, dict) else {**empty, "value": value}


def _fields(fields: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per-field scores turned around: one row per field, the most frequent first."""
    names = dict.fromkeys(name for by_field in fields.values() for name in by_field)
    empty = dict.fromkeys(("precision", "recall", "f1", "support"))
    rows = []
    for name in names:
        values = {candidate: {**empty, **by_field.get(name, {})} for candidate, by_field in fields.items()}
        support = max((v["support"] for v in values.values() if texts.is_number(v["support"])), default=0)
        rows.append({"name": name, "support": support, "values": values})
    return sorted(rows, key=lambda row: -row["support"])


def _tried(selection: dict[str, Any]) -> list[dict[str, Any]]:
    """What was tried for each baseline, its entries together, the chosen one marked."""
    chosen, groups = selection.get("chosen") or {}, []
    tried = [{**dict.fromkeys(("candidate", "prompt_form", "shots", "score", "n")), **row} for row in selection.get("tried") or []]
    order = list(dict.fromkeys(row["candidate"] for row in tried))
    tried.sort(key=lambda row: order.index(row["candidate"]))
    for candidate, rows in groupby(tried, key=lambda row: row["candidate"]):
        kept = chosen.get(candidate) or {}
        entries = [{**row, "chosen": bool(kept) and all(row[key] == kept.get(key) for key in ("prompt_form", "shots"))} for row in rows]
        groups.append({"candidate": candidate, "entries": entries})
    return groups
