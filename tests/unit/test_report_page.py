"""The page: what stands on it, that it is one file, and that the same run gives the same bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_report_run import comparison, fabricate, training_lines  # type: ignore[import-not-found]

from burnish.report import report
from burnish.report.figures import NARROW, WIDE, differences_figure, scores_figure, training_figure
from burnish.report.gather import gather


class _Page(HTMLParser):
    """Text, tags, ids and links of a page; complains about tags that do not nest."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.ids, self.links, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._note(attributes)

    def _note(self, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(fabricate(tmp_path_factory.mktemp("runs") / "run")).read_text(encoding="utf-8")


def test_the_page_nests_well_and_its_ids_are_unique(page: str) -> None:
    parsed = _Page(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        assert link == "data:," or (link.startswith("#") and link[1:] in parsed.ids), link


def test_the_page_is_one_file_without_network_or_script(page: str) -> None:
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_the_verdict_stands_on_top_and_everything_promised_follows(page: str) -> None:
    text = re.sub(r"\s+", " ", _Page(page).text)
    content = comparison()
    places = [
        "BETTER",
        content["sentence"],
        "150 test rows",
        "11.4 points",
        "Candidates side by side",
        "71.0 – 85.0 %",  # the tuned model's interval
        "Unscored answers",
        "edit_similarity",
        "0.31 s / 0.90 s",
        "311 / 30",
        "p, Holm-adjusted",
        "+36.7",
        "Training",
        "best: 0.1892 at step 125",
        "3.00 GiB",
        "3,796,992 of 271,895,168",
        "Consistency",
        "valid JSON",
        "2 unscored, 3 left out",
        "+10.0 points [+5.0, +16.0]",
        "loops (fewer is better)",
        "tone (training answers are too short to have a tone)",
        "a-judge compared Fine-tuned with",
        "61 won",
        "15.6 %",  # position bias
        "κ 0.61 [0.41, 0.78]",
        "models prefer what they wrote",
        "Where Fine-tuned wins and loses",
        "Every candidate fails",
        "Field by field",
        "slots.area",
        "exact duplicate",
        "ab" * 32,
        "CC BY 4.0",
        "How the baselines got their best shot",
        "chosen",
        "The prompt as the model reads it",
        "max_gradient_norm: 1.0",
        "2.13.0+cpu",
    ]
    position = 0
    for place in places:
        assert place in text[position:], place
        position = text.index(place, position)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    first = report(run).read_bytes(), run.report_json_file.read_bytes()
    assert (report(run).read_bytes(), run.report_json_file.read_bytes()) == first


def test_before_training_there_are_no_wins_and_no_curves(tmp_path: Path) -> None:
    page = report(fabricate(tmp_path / "run", tuned=False)).read_text(encoding="utf-8")
    parsed = _Page(page)
    assert "NO VERDICT" in parsed.text
    assert "training" not in parsed.ids
    assert "Wins" not in parsed.text


@pytest.mark.parametrize(("verdict", "colour"), [("BETTER", "good"), ("WORSE", "bad"), ("CAN'T TELL", "open")])
def test_each_verdict_has_its_colour(tmp_path: Path, verdict: str, colour: str) -> None:
    run = fabricate(tmp_path / "run", optional=False)
    run.write_json(run.comparison_file, comparison(2) | {"verdict": verdict})
    page = report(run).read_text(encoding="utf-8")
    assert f'<section class="verdict {colour}">' in page
    assert verdict in _Page(page).text


def test_long_texts_are_folded_and_cut(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", optional=False)
    content = comparison(2)
    for row in content["rows_detail"]:
        row["question"] = "x" * 100_000
    run.write_json(run.comparison_file, content)
    page = report(run).read_text(encoding="utf-8")
    assert "80,000 more characters" in page
    assert "x" * 20_001 not in page


def test_a_rubric_outside_of_0_and_1_is_no_percentage(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", optional=False)
    content = comparison(2) | {"binary": False}
    for position, row in enumerate(content["candidates"]):
        row |= {"score": 2.5 + position, "low": 2.0 + position, "high": 3.0 + position}
    run.write_json(run.comparison_file, content)
    text = _Page(report(run).read_text(encoding="utf-8")).text
    assert "5.5" in text
    assert "550.0" not in text
    assert "550 %" not in text


def test_charts_hold_the_numbers_and_follow_the_theme() -> None:
    content = comparison()
    for width in (WIDE, NARROW):
        chart = scores_figure(content["candidates"], "tuned", percent=True, width=width)
        assert f'viewBox="0 0 {width} ' in chart
        assert "78.0 %" in chart
        assert "var(--accent)" in chart
        assert not re.search(r"#0[1-9]0[1-9]0[1-9]|<style|<metadata|<!--", chart)


def test_charts_bear_missing_numbers(tmp_path: Path) -> None:
    empty = {"name": "a", "title": "A $x_1$ <b>", "score": None, "low": None, "high": None}
    chart = scores_figure([empty], None, percent=True, width=WIDE)
    assert "A $x_1$ &lt;b&gt;" in chart  # no formula, no markup
    pair = {"baseline": "a", "difference": 0.0, "low": 0.0, "high": 0.0, "verdict": None}
    assert "+0.0" in differences_figure([{"title": "against x", **pair}], percent=True, detectable=None, width=NARROW)
    run = fabricate(tmp_path / "run")
    run.write_jsonl(run.metrics_file, [line for line in training_lines() if "loss" in line])
    training = gather(run)["training"]
    assert "best" not in training_figure(training, width=WIDE)
    training_figure({**training, "steps": []}, width=WIDE)


def test_report_imports_neither_torch_nor_matplotlib_at_once() -> None:
    code = "import sys, burnish.report; assert not {'torch', 'matplotlib', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
