"""Report: a run's folder → one self-contained HTML page and the same numbers as JSON.

In: the files of a compared run (comparison.json; everything else is optional). Out: report.html, report.json, model_card.md.
Invariant: reads files only, needs no network and no script, and shows every text of data or model as text.
"""

from __future__ import annotations

from pathlib import Path

from burnish.report.card import model_card, write_card
from burnish.report.data_pages import curve_report, value_report
from burnish.report.decision import decision_view
from burnish.report.gather import gather
from burnish.report.page import environment, render
from burnish.report.sweep import sweep_report
from burnish.report.texts import encodable
from burnish.run import Run

__all__ = [
    "curve_report", "decision_report", "gather", "model_card", "report", "sweep_report", "value_report", "write_card",
]  # fmt: skip


def report(run: Run) -> Path:
    """Write `run.report_json_file`, `run.report_file` and (of something trained) the model card from what the run's folder holds; return the page's path.

    Raises DataError where comparison.json is missing or not a comparison. The same files give the same bytes.
    """
    facts = gather(run)
    page = render(facts)
    run.write_json(run.report_json_file, facts)
    write_card(run, facts)
    run.write_text(run.report_file, page)
    return run.report_file


def decision_report(run: Run) -> Path:
    """Write decision.html from decision.json; return its path."""
    decision = encodable(run.read_json(run.decision_file))
    template = environment().get_template("decision.html.jinja")
    run.write_text(run.decision_report_file, template.render(name=run.recipe_as_asked().name, decision=decision, **decision_view(decision)))
    return run.decision_report_file
