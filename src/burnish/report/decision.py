"""Should you fine-tune: the charts of decision.json, for its own page and for the run's report."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from burnish.report.figures import NARROW, WIDE, differences_figure, scores_figure

CLASSES = {"fine-tune": "good", "cant-tell": "open"}  # any other answer is a no


def decision_view(decision: dict[str, Any]) -> dict[str, Any]:
    """What the template shows besides decision.json's own facts."""
    titles = {row["name"]: row["title"] for row in decision["candidates"]} | {"constant": "the same answer to every question"}
    return {
        "decision_class": CLASSES.get(decision["verdict"], "bad"),
        "decision_charts": _charts(decision, titles),
        "titles": titles,
    }


def _charts(decision: dict[str, Any], titles: dict[str, str]) -> dict[str, Markup]:
    subject, detectable = decision["best"].get("tuned"), decision["detectable_difference"]
    pairs = [
        {**pair, "title": f"{titles.get(pair['candidate'], pair['candidate'])} − {titles.get(pair['baseline'], pair['baseline'])}"}
        for pair in decision["pairs"]
    ]
    charts = {"scores": Markup(""), "pairs": Markup("")}
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawn = {"scores": scores_figure(decision["candidates"], subject, percent=True, width=width)}
        if pairs:
            drawn["pairs"] = differences_figure(pairs, percent=True, detectable=detectable, width=width)
        for name, chart in drawn.items():
            charts[name] += Markup('<div class="{}">{}</div>').format(kind, chart)
    return charts
