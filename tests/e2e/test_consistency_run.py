"""Checks in a whole run on a tiny model: drawn answers, the numbers in comparison.json, the section of the report."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import cli, tiny_recipe

from burnish import pipeline
from burnish.errors import DataError, RecipeError
from burnish.recipe import build_recipe
from burnish.run import Run
from conftest import colour_rows

CHECKS = [{"regex": "^[a-z]+ [a-z]+"}, {"repetition": True}, {"self_consistency": {"samples": 3, "rows": 6}}, {"tone": True}]


@pytest.fixture(scope="module")
def checked(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("checked")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(120)))
    recipe = tiny_recipe(tiny_folder, data, evaluation={"candidates": ["base", "tuned"], "checks": CHECKS})
    return pipeline.run_recipe(recipe, folder=folder / "run")


def test_the_numbers_are_those_of_the_answers(checked: Run) -> None:
    content = checked.read_json(checked.comparison_file)["consistency"]
    measures = {measure["key"]: measure for measure in content["measures"]}
    assert list(measures) == ["regex", "repetition", "self_consistency"]
    assert content["refused"][0]["check"] == "tone"
    assert "too short" in content["refused"][0]["reason"]
    for name in ("base", "tuned"):
        drawn: dict[str, list[str]] = {}
        for row in checked.read_jsonl(checked.samples_file(name)):
            if "draw" in row:
                drawn.setdefault(row["example"], []).append(" ".join(row["text"].split()))
        assert len(drawn) == 6
        assert all(len(texts) == 3 for texts in drawn.values())
        agreed = [sum(a == b for a, b in combinations(texts, 2)) / 3 for texts in drawn.values()]
        assert measures["self_consistency"]["candidates"][name]["value"] == pytest.approx(sum(agreed) / 6, abs=1e-6)
    assert set(measures["regex"]["comparisons"]) == {"tuned"}


def test_draws_are_not_made_again(checked: Run) -> None:
    before = {name: checked.samples_file(name).read_bytes() for name in ("base", "tuned")}
    lines = before["tuned"].splitlines(keepends=True)
    checked.samples_file("tuned").write_bytes(b"".join(lines[:-5]))  # a run that was cut off
    status = checked.status()
    del status["steps"]["evaluate"]
    checked.write_json(checked.status_file, status)
    pipeline.evaluate(checked)
    assert checked.samples_file("base").read_bytes() == before["base"]
    assert sorted(checked.samples_file("tuned").read_bytes().splitlines(keepends=True)) == sorted(lines), "the same draws as before"
    pipeline.compare(checked)
    pipeline.write_report(checked)


def test_a_broken_file_is_told_before_the_rows_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(60)))
    recipe = tiny_recipe(tiny_folder, data, evaluation={"checks": [{"glossary": str(tmp_path / "none.csv")}]})
    with pytest.raises(DataError, match=r"none\.csv"):
        pipeline.prepare(Run.create(tmp_path / "run", recipe))


def judge_server() -> tuple[ThreadingHTTPServer, str]:
    """A judge that prefers the shorter answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            system, user = (m["content"] for m in json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"])
            material = json.loads(user)
            winner = "first" if len(material["first"]) < len(material["second"]) else "second"
            code = re.findall(r'"code": "([0-9a-f]{10})"', system)[0]
            content = json.dumps({"choices": [{"message": {"content": json.dumps({"code": code, "winner": winner})}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}/v1"


def test_burnish_judge(checked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rubric = tmp_path / "rubric.md"
    rubric.write_text("Shorter is better. <script>alert(1)</script>")
    test = sorted(pipeline.dataset_of(checked).test, key=lambda example: example.id)
    answers = {
        name: {p["example"]: p["text"] for p in checked.read_jsonl(checked.predictions_file(name)) if "example" in p}
        for name in ("base", "tuned")
    }
    expected = {"won": 0, "lost": 0, "tied": 0}
    labels = ["example,winner"]
    for row in test[:12]:
        ours, theirs = answers["tuned"][row.id], answers["base"][row.id]
        result = "tied" if ours.split() == theirs.split() or len(ours) == len(theirs) else "won" if len(ours) < len(theirs) else "lost"
        expected[result] += 1
        labels.append(f"{row.id},{ {'won': 'tuned', 'lost': 'base', 'tied': 'tie'}[result] }")
    (tmp_path / "labels.csv").write_text("\n".join(labels) + "\n")
    server, url = judge_server()
    arguments = ["judge", str(checked.path), "--rubric", str(rubric), "--endpoint", url, "--model", "tiny", "--rows", "12"]
    code = cli(monkeypatch, *arguments, "--labels", str(tmp_path / "labels.csv"))
    found = checked.read_json(checked.judge_file)
    assert {key: found[key] for key in expected} == expected
    assert code == {"BETTER": 0, "WORSE": 3, "CAN'T TELL": 4}[found["verdict"]]
    assert found["labels"]["share"] == 1.0
    server.shutdown()
    server.server_close()
    capsys.readouterr()
    assert cli(monkeypatch, *arguments, "--json") == code, "every answer is kept: the judge need not be there"
    assert json.loads(capsys.readouterr().out)["won"] == expected["won"]
    page = checked.report_file.read_text()
    assert 'id="consistency"' in page
    assert 'id="judge"' in page
    assert "<script>alert" not in page
    facts = checked.read_json(checked.report_json_file)
    assert facts["judge"]["model"] == "tiny"
    assert [measure["key"] for measure in facts["consistency"]["measures"]] == ["regex", "repetition", "self_consistency"]


def test_what_judge_refuses(checked: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rubric = tmp_path / "rubric.md"
    rubric.write_text("x")
    for arguments, words in (
        ([], "no rubric"),
        (["--rubric", str(rubric)], "no endpoint"),
        (["--rubric", str(rubric), "--endpoint", "http://127.0.0.1:1/v1"], "go together"),
        (["--rubric", str(rubric), "--endpoint", "http://example.org/v1", "--model", "m"], "unencrypted"),
        (["--rubric", str(rubric), "--endpoint", "https://example.org/v1", "--model", "m", "--against", "me"], "expected one of"),
    ):
        assert cli(monkeypatch, "judge", str(checked.path), *arguments) == 2
        assert words in capsys.readouterr().err


def test_checks_may_change_when_everything_is_done(checked: Run) -> None:
    """Nothing is prepared, trained or answered again; the new check is measured."""
    before = checked.status()["steps"]
    answers = {path.name: path.read_bytes() for path in (checked.path / "candidates").iterdir()}
    content = checked.recipe_as_asked().to_dict()
    content["evaluation"]["checks"] = [{"length": True}]
    again = pipeline.run_recipe(build_recipe(content), folder=checked.path)
    after = again.status()["steps"]
    for step in ("prepare", "train"):
        assert after[step]["started"] == before[step]["started"]
    assert {path.name: path.read_bytes() for path in (checked.path / "candidates").iterdir()} == answers
    assert [measure["key"] for measure in again.read_json(again.comparison_file)["consistency"]["measures"]] == ["length"]
    content["training"]["epochs"] = 3
    with pytest.raises(RecipeError, match=r"training\.epochs"):
        pipeline.run_recipe(build_recipe(content), folder=checked.path)
