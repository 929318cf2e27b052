"""`burnish decide` on tiny random models: what is measured, kept, asked and answered. The real data sets are in benchmarks/verdicts.py."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from burnish import pipeline
from burnish.cli import main
from burnish.errors import EndpointError, RecipeError
from burnish.pipeline import Wish
from burnish.recipe import Recipe, build_recipe
from burnish.run import Run
from conftest import colour_rows


@pytest.fixture(scope="module", autouse=True)
def _by_words_only() -> Iterator[None]:
    """Embedding is tested where it is written (numerics/test_embed.py, unit/test_lookup.py); here it would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("burnish.evaluation.can_embed", lambda: False)
        yield


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("colours") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    return path


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Names whose codes no training can know: only the documents do. Rows of one code never part at a split."""
    folder = tmp_path_factory.mktemp("codes")
    names = [
        f"{first}{last}"
        for first in ("kol", "mar", "tes", "vin", "dar", "bel", "sur", "nop", "gil", "fen")
        for last in ("ax", "id", "om", "ul", "ek", "yr")
    ]
    rows = [
        {"prompt": f"code of the {name} please", "completion": f"Q{7 * index % 100:02d}{index:02d}"} for index, name in enumerate(names)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"code": row["completion"], "name": name} for name, row in zip(names, rows, strict=True)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return folder / "train.jsonl", folder / "corpus.jsonl"


def recipe_of(folder: Path, rows: Path, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"train": str(rows), "validation_fraction": 0.15, "test_fraction": 0.4, "overlap_ngram": 0},
        "task": {"metric": "exact_match"},
        "training": {"epochs": 3, "learning_rate": 0.02},
        "evaluation": {"shots": [2], "selection_rows": 4, "resamples": 400, "price_per_hour": 3.6},
    }
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value}
    return build_recipe(content)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["burnish", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def decided(tiny_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    with Run.working(tmp_path_factory.mktemp("decided") / "run", recipe_of(tiny_folder, colours)) as job:
        return job, pipeline.decide(job, wish=Wish(600.0))


def test_everything_is_weighed_on_the_same_rows(decided: tuple[Run, dict[str, Any]]) -> None:
    job, found = decided
    assert found == json.loads(job.decision_file.read_text())
    names = [row["name"] for row in found["candidates"]]
    assert names == ["base", "few_shot", "few_shot_retrieved", "neighbours", "tuned"]
    test = pipeline.dataset_of(job).test
    for row in found["candidates"]:
        place = Run(job.probe_folder) if row["name"] == "tuned" else job
        answers = {p["example"]: p["text"] for p in place.read_jsonl(place.predictions_file(row["name"])) if "example" in p}
        right = sum(answers[e.id].strip() == e.reference.strip() for e in test)
        assert row["score"] == pytest.approx(right / len(test), abs=1e-6)
        assert row["n"] == len(test) == found["test_rows"]
    assert found["probe"]["whole"]
    assert found["probe"]["steps"] == found["probe"]["planned_steps"]
    assert sum(rule["decided"] for rule in found["rules"]) == 1
    assert found["sentence"] in job.decision_report_file.read_text().replace("&#39;", "'")


def test_costs_are_those_of_a_hand_count(decided: tuple[Run, dict[str, Any]]) -> None:
    """3.6 an hour is a thousandth a second."""
    _, found = decided
    for row in found["candidates"]:
        assert row["cost_per_1000"] == pytest.approx(1 / row["rows_per_second"], rel=1e-2)
    costs, scores = found["costs"], {row["name"]: row for row in found["candidates"]}
    assert costs["training_cost"] == pytest.approx(found["probe"]["planned_seconds"] / 1000, rel=1e-6)
    saved = scores[costs["break_even_against"]]["cost_per_1000"] - scores["tuned"]["cost_per_1000"]
    assert costs["break_even_requests"] == (None if saved <= 0 else int(1000 * costs["training_cost"] / saved) + 1)


def test_nothing_is_measured_twice(decided: tuple[Run, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    job, found = decided
    monkeypatch.setattr(sys.modules["burnish.evaluation.predict"], "generate", lambda *_, **__: pytest.fail("an answer was made again"))
    monkeypatch.setattr("burnish.training.run_loop", lambda *_, **__: pytest.fail("trained again"))
    with job.lock():
        assert pipeline.decide(job, wish=Wish(600.0)) == found


def test_the_report_of_the_run_begins_with_the_decision(decided: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    job, found = decided
    with job.lock():
        pipeline.train(job)
        pipeline.evaluate(job)
        pipeline.compare(job)
        pipeline.write_report(job)
        assert "Should you fine-tune?" in job.report_file.read_text()
        again = pipeline.decide(job, wish=Wish(600.0))
    assert again["probe"]["folder"] is None, "a run that is trained is the best evidence itself"
    assert again["verdict"] == found["verdict"]


def test_what_only_documents_know_is_to_be_looked_up(
    tiny_folder: Path, codes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tiny_folder, codes[0], data={"documents": str(codes[1])}, training={"max_steps": 4})
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.to_dict()))
    assert run_cli(monkeypatch, "decide", str(tmp_path / "r.yaml"), "--run", str(tmp_path / "run"), "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "retrieve"
    scores = {row["name"]: row["score"] for row in found["candidates"]}
    assert scores["neighbours"] == 1.0, "every name stands in the documents, with its code"
    assert scores["tuned"] < 0.2
    assert set(scores) >= {"rag", "rag_few_shot", "tuned_rag"}
    chosen = json.loads((tmp_path / "run" / "candidates" / "selection.json").read_text())["chosen"]["neighbours"]
    assert chosen["pool"] == "labelled"


def test_without_time_for_a_training_nobody_can_tell(tiny_folder: Path, colours: Path, tmp_path: Path) -> None:
    with Run.working(tmp_path / "run", recipe_of(tiny_folder, colours, training={"epochs": 100})) as job:
        found = pipeline.decide(job, wish=Wish(0.001))
    assert (found["verdict"], found["probe"]) == ("cant-tell", None)
    assert "tuned" not in {row["name"] for row in found["candidates"]}
    assert any("--budget" in line for line in found["would_change"])


def test_a_target_that_a_prompt_reaches_ends_the_question(tiny_folder: Path, codes: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tiny_folder, codes[0], data={"documents": str(codes[1])})
    with Run.working(tmp_path / "run", recipe) as job:
        found = pipeline.decide(job, wish=Wish(0.001, target=0.8))
    assert found["verdict"] == "retrieve"
    assert "target" in found["reason"]


def test_two_bases_on_the_same_rows(
    tiny_folder: Path, wide_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of(tiny_folder, colours, training={"epochs": 1}).to_dict()))
    bases = f"{tiny_folder},{wide_folder}"
    run_cli(monkeypatch, "decide", str(tmp_path / "r.yaml"), "--run", str(tmp_path / "run"), "--bases", bases, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [row["base"] for row in found["bases"]] == [str(tiny_folder), str(wide_folder)]
    for row in found["bases"]:
        assert row["licence"] == "not stated"
        assert row["tokens_per_word"] > 1
        assert row["bits_per_byte"] > 0
        assert row["after"] is not None
    assert found["base"] in {str(tiny_folder), str(wide_folder)}
    assert any("untrained" in pair["baseline"] for pair in found["pairs"]), "small tuned against large untuned"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--budget", "soon"], "expected a time"), (["--bases", "one"], "at least two"), (["--bases", "a,b"], "no such folder"), (["--target", "7"], "target")],
)  # fmt: skip
def test_bad_wishes(
    arguments: list[str], expected: str, tiny_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe_of(tiny_folder, colours).to_dict()))
    assert run_cli(monkeypatch, "decide", str(tmp_path / "r.yaml"), "--run", str(tmp_path / "run"), *arguments) == 2
    assert expected in capsys.readouterr().err.replace("\n", " ")


def test_plain_text_is_not_decided_on(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 400)
    recipe = build_recipe({"model": str(tiny_folder), "data": str(tmp_path / "a.txt"), "training": {"objective": "text"}})
    with Run.working(tmp_path / "run", recipe) as job, pytest.raises(RecipeError, match="bits per byte"):
        pipeline.decide(job)


class _Oracle(BaseHTTPRequestHandler):
    """A larger model that knows every answer: `a COLOUR THING` → `THING COLOUR`, and counts its tokens."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"key": self.headers["Authorization"], **content})
        answer = ANSWERS[content["messages"][-1]["content"]] + "\nand something more"
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        body = json.dumps(
            {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


ANSWERS: dict[str, str] = {row["prompt"]: row["completion"] for row in colour_rows(160)}


@pytest.fixture
def oracle() -> Iterator[str]:
    _Oracle.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Oracle)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_larger_model_is_asked_within_its_cap_and_never_twice(
    tiny_folder: Path, colours: Path, tmp_path: Path, oracle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-very-secret")
    endpoint = {"base_url": oracle, "model": "large", "key_variable": "THE_KEY", "price_in": 1.0, "price_out": 10.0, "max_spend": 5.0}
    recipe = recipe_of(tiny_folder, colours, evaluation={"endpoint": endpoint}, training={"max_steps": 2})
    with Run.working(tmp_path / "run", recipe) as job:
        found = pipeline.decide(job, wish=Wish(600.0))
        asked = len(_Oracle.seen)
        again = pipeline.decide(job, wish=Wish(600.0))
    row = next(row for row in found["candidates"] if row["name"] == "endpoint")
    assert row["score"] == 1.0, "the answer ends where training answers end"
    assert row["cost_per_1000"] == pytest.approx(1000 * (100 * 1.0 + 10 * 10.0) / 1e6)
    assert len(_Oracle.seen) == asked, "what was paid for is not asked again"
    assert again["verdict"] == found["verdict"]
    assert {one["key"] for one in _Oracle.seen} == {"Bearer sk-very-secret"}
    assert not any(b"sk-very-secret" in path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())


def test_an_endpoint_that_would_cost_too_much_is_not_asked(tiny_folder: Path, colours: Path, tmp_path: Path, oracle: str) -> None:
    endpoint = {"base_url": oracle, "model": "large", "key_variable": None, "price_in": 1e6, "price_out": 1e6, "max_spend": 1.0}
    recipe = recipe_of(tiny_folder, colours, evaluation={"endpoint": endpoint})
    with Run.working(tmp_path / "run", recipe) as job, pytest.raises(EndpointError, match="max_spend"):
        pipeline.decide(job, wish=Wish(600.0))
    assert not _Oracle.seen


def test_an_address_that_a_key_must_not_go_to_is_refused_before_anything_is_measured(
    tiny_folder: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_folder, colours, evaluation={"endpoint": {"base_url": "http://example.com/v1", "model": "m"}})
    with Run.working(tmp_path / "run", recipe) as job, pytest.raises(RecipeError, match="unencrypted"):
        pipeline.prepare(job)


@pytest.mark.parametrize("name", ["rag", "tuned_rag", "endpoint"])
def test_a_candidate_without_what_it_needs_is_refused(name: str, tiny_folder: Path, colours: Path) -> None:
    with pytest.raises(RecipeError, match=r"documents|evaluation\.endpoint"):
        recipe_of(tiny_folder, colours, evaluation={"candidates": ["base", name]})
