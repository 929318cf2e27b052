"""The pages of a learning curve and of the value of rows, from fabricated files: pictures first, hostile text shown as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report_run import fabricate

from burnish.advice import answer_curve, row_draws
from burnish.advice.curve import to_json
from burnish.pipeline.curve import sentence
from burnish.report import curve_report, report, value_report
from burnish.report.gather import gather
from burnish.run import Run

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\u202e{{ 7*7 }}$x^2$"


def curve(title: str = "Accuracy, validation rows", *, loss: bool = False) -> dict[str, Any]:
    """What `burnish curve` writes, of eight simulated trainings."""
    random, rows, table = np.random.default_rng(0), [50, 100, 200, 400] * 2, []
    for size in rows:
        level = 0.3 + 3 * size**-0.5 if loss else 0.9 - 3 * size**-0.5
        table.append(level + 0.02 * random.standard_normal(40))
    made = np.array(table)
    answer = answer_curve(
        rows, made.mean(1).tolist(), row_draws([str(n) for n in range(40)], draws=100, seed=0) @ made.T / 40, lower_is_better=loss
    )
    points = [
        {
            "fraction": size / 400,
            "rows": size,
            "seed": index // 4,
            "value": float(made[index].mean()),
            "steps": 9,
            "seconds": 1.5,
            "state": "complete",
        }
        for index, size in enumerate(rows)
    ]
    missing = [{"fraction": 1.0, "rows": 400, "seed": 2, "reason": HOSTILE}]
    content: dict[str, Any] = {
        **to_json(answer), "metric_title": title, "lower_is_better": loss, "equal": "epochs", "rows": {"train": 400, "validation": 40}, "confidence": 0.95,
        "points": points, "missing": missing, "seconds": 12.0,
    }  # fmt: skip
    return {**content, "sentence": sentence(content)}


def value(proof: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    ranked = [
        {
            "rank": n + 1, "id": str(n), "source": "f.jsonl:1", "badness": 1 - n / 80, "kept": n >= 20, "signals": {"held_out_loss": 1.5, "disagreement": None},
            "reason": HOSTILE, "question": HOSTILE, "answer": HOSTILE,
        }
        for n in range(80)
    ]  # fmt: skip
    trainings = [{"arm": arm, "value": 0.8, "validation_loss": 1.0} for arm in ("kept", "random")] * 2
    content: dict[str, Any] = {
        "sentence": f"BETTER: {HOSTILE}", "signals": {"held_out_loss": True, "disagreement": True, "gradient": False}, "rows": {"train": 80, "kept": 60, "guides": 5, "judges": 5},
        "metric_title": HOSTILE, "lower_is_better": False, "worst": ranked[:20],
        "proof": {"verdict": "BETTER", "kept": 0.8, "random": 0.7, "difference": 0.1, "low": 0.05, "high": 0.15, "trainings": trainings} if proof else None,
    }  # fmt: skip
    return content, ranked


def harmless(page: str) -> bool:
    return "<script" not in page and "<img" not in page and "\u202e" not in page and "49" not in re.findall(r"\u007b\u007b (\d+)", page)


@pytest.mark.parametrize("loss", [False, True])
def test_a_curve_has_its_picture_and_its_numbers(tmp_path: Path, loss: bool) -> None:
    run = fabricate(tmp_path)
    content = curve(HOSTILE, loss=loss)
    run.write_json(run.curve_file, content)
    page = curve_report(run).read_text()
    assert harmless(page)
    assert page.count("<svg") == 2
    for part in ("band", "fitted", "ahead", "doubled", "trainings"):
        assert f'id="curve-960-{part}"' in page
    drawn = page.split('id="curve-960-trainings"')[1].split("</g>")[0] + page.split('id="curve-960-trainings"')[1].split("</g>")[1]
    assert drawn.count("<use") == 8
    assert page.index("<h1>") < page.index("<svg") < page.index("<summary>8 trainings")
    assert "1 missing" in page


def test_a_curve_without_an_answer(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    content = curve()
    content |= {
        "gain": None,
        "low": None,
        "high": None,
        "trustworthy": False,
        "fit": None,
        "held_out": None,
        "line": [],
        "points": content["points"][:2],
    }
    run.write_json(run.curve_file, {**content, "sentence": "Can't tell."})
    page = curve_report(run).read_text()
    assert "CAN&#39;T TELL" in page
    assert "curve-960-doubled" not in page


def test_the_run_s_report_shows_its_curve(tmp_path: Path) -> None:
    run = fabricate(tmp_path)
    assert gather(run)["curve"] is None
    assert 'id="curve"' not in report(run).read_text()
    run.write_json(run.curve_file, {"key": "of a curve whose trainings are under way"})
    assert gather(run)["curve"] is None
    run.write_json(run.curve_file, curve(HOSTILE))
    page = report(run).read_text()
    assert harmless(page)
    assert 'id="curve"' in page
    assert 'id="curve-960-doubled"' in page
    assert run.read_json(run.report_json_file)["curve"]["gain"] == pytest.approx(curve()["gain"])


@pytest.mark.parametrize("proof", [True, False])
def test_the_page_of_rows(tmp_path: Path, proof: bool) -> None:
    run: Run = fabricate(tmp_path)
    content, ranked = value(proof)
    run.write_json(run.value_file, content)
    run.write_jsonl(run.value_rows_file, ranked)
    page = value_report(run).read_text()
    assert harmless(page)
    assert page.count("<svg") == (4 if proof else 2)
    assert page.count('<th scope="row">') == 60  # thirty at either end
    assert page.index("<svg") < page.index("The worst rows") < page.index("The best rows")
