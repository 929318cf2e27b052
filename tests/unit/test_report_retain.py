"""Retention on the page: the picture, the tables, hostile texts, and a file that lacks keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_page import _Page  # type: ignore[import-not-found]
from test_report_run import fabricate  # type: ignore[import-not-found]

from burnish.report import report
from burnish.report.figures import NARROW, WIDE
from burnish.report.pareto import pareto_figure, retain_facts, suites_figure

HOSTILE = "</text></svg><script>document.title='PWNED'</script><img src=x onerror=alert(1)>"


def point(name: str, kind: str, task: float, change: float, **more: Any) -> dict[str, Any]:
    bounds = {"task_low": task - 0.05, "task_high": task + 0.05, "change_low": change - 0.02, "change_high": change + 0.02}
    return {
        "name": name,
        "kind": kind,
        "task": task,
        "change": change,
        **bounds,
        "gain_kept": task / 0.8,
        "loss_kept": change / -0.2,
        "seconds": 3.0,
        **more,
    }


def retention(**changes: Any) -> dict[str, Any]:
    row = {"title": "plain text", "unit": None, "n": 100, "p_value": 0.01, "p_adjusted": 0.02, "detectable": 0.03}
    suites = [
        {**row, "suite": "general", "before": 0.7, "after": 0.5, "change": -0.2, "low": -0.25, "high": -0.15, "verdict": "LOST"},
        {
            **row,
            "suite": "text",
            "unit": "bits per byte",
            "before": 1.0,
            "after": 1.01,
            "change": -0.01,
            "low": -0.02,
            "high": 0.0,
            "verdict": "KEPT",
        },
    ]
    points = [point("base", "base", 0.0, 0.0), point("tuned", "tuned", 0.8, -0.2), point("scale 0.5", "scale", 0.78, -0.05, scale=0.5)]
    repair = {
        "rule": "the rule", "chosen": "scale 0.5", "why": "the least loss", "sentence": "scale 0.5 keeps 97 % of the gain.", "task_title": "Exact match", "points": points,
        "left_out": [{"name": "kl", "reason": "the time is up"}], "published": {"folder": "x"}, "rows": {"validation": 60, "choosing": 100},
    }  # fmt: skip
    whole = {
        **row,
        "suite": None,
        "title": "mean over the suites",
        "before": None,
        "after": None,
        "change": -0.1,
        "low": -0.15,
        "high": -0.05,
        "verdict": "LOST",
    }
    broken = [
        {
            "suite": "mine",
            "prompt": "Who are you?",
            "expected": "Ada",
            "before": 1,
            "after": 0,
            "answer_before": "Ada",
            "answer_after": "inform()",
        }
    ]
    content = {
        "suites": suites,
        "whole": whole,
        "verdict": "LOST",
        "sentence": "Something was forgotten.",
        "margin": 0.05,
        "confidence": 0.95,
        "broken": broken,
        "repair": repair,
    }
    return {**content, **changes}


def page_of(path: Path, content: Any) -> tuple[str, dict[str, Any]]:
    run = fabricate(path)
    run.write_json(run.retain_file, content)
    return report(run).read_text(encoding="utf-8"), json.loads(run.report_json_file.read_text(encoding="utf-8"))


def test_the_section(tmp_path: Path) -> None:
    page, facts = page_of(tmp_path, retention())
    text = _Page(page).text
    for words in (
        "What was forgotten",
        "Something was forgotten.",
        "scale 0.5 keeps 97 %",
        "chosen: scale 0.5",
        "the time is up",
        "Who are you?",
        "inform()",
        "adapter-repaired",
    ):
        assert words in text, words
    assert facts["retain"]["repair"]["chosen"] == "scale 0.5"
    assert "<script" not in page
    plain, _ = page_of(tmp_path / "without", retention(repair=None, broken=[]))
    assert "Between task and retention" not in plain
    assert "Suite by suite" in plain


def test_without_the_file_there_is_no_section(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    assert retain_facts(run) is None
    assert "What was forgotten" not in report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_figures_say_their_numbers(width: int) -> None:
    repair = {**retention()["repair"], "task_percent": True}
    drawn = pareto_figure(repair, width=width)
    assert "scale 0.5: task 78, retention -5.0 points" in drawn
    assert drawn.count("chosen") >= 1
    assert "general: -20.0 points, LOST" in suites_figure(retention(), width=width)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    """Names of suites and points, prompts, answers, reasons: whatever comes from files or models."""

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(part) for key, part in value.items()}
        if isinstance(value, list):
            return [poisoned(part) for part in value]
        return value + HOSTILE if isinstance(value, str) else value

    page, _ = page_of(tmp_path, poisoned(retention()))
    assert "<script" not in page
    assert "<img" not in page
    _Page(page)


def test_a_file_that_lacks_keys(tmp_path: Path) -> None:
    page, facts = page_of(tmp_path, {"suites": [{"suite": "general"}], "repair": {"points": [{"name": "base"}]}})
    assert "What was forgotten" in page
    assert facts["retain"]["suites"][0]["change"] is None
