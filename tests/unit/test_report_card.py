"""The model card: a head that parses as YAML, the report's numbers, and nothing from outside that becomes markup."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from test_report_run import fabricate

from burnish.recipe import build_recipe, dump_recipe
from burnish.report import model_card, report
from burnish.report.card import base_name, escaped, fenced, source_name
from burnish.report.texts import visible
from burnish.run import Run

HOSTILE = [
    "a\n---\nlicense: mit\n---\n# owned",
    "'; base_model: evil/model\nx: '",
    '"}\n- !!python/object/apply:os.system ["touch /tmp/owned"]',
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![x](http://evil.example/leak) http://evil.example www.evil.example",
    "| a | b |\n| --- | --- |\n```python\nimport os\n```",
    "`code` **bold** __bold__ ~~gone~~ $x$ &lt;b&gt; @someone # head",
    "1. one\n- two\n+ three\n> four\n: five\n===",
    "abc\u202egpj.exe\u2028\x1b]8;;\x07\ud800",
]


def parts(card: str) -> tuple[dict[str, Any], str]:
    found = re.match(r"\A---\n(.*?)\n---\n\n", card, re.DOTALL)
    assert found
    head = yaml.safe_load(found[1])
    assert isinstance(head, dict)
    return head, card[found.end() :]


def carded(run: Run) -> tuple[dict[str, Any], str, dict[str, Any]]:
    report(run)
    facts = run.read_json(run.report_json_file)
    head, body = parts(run.card_file.read_text(encoding="utf-8"))
    return head, body, facts


def test_the_numbers_are_those_of_report_json(tmp_path: Path) -> None:
    head, body, facts = carded(fabricate(tmp_path / "run"))
    tuned = next(row for row in facts["candidates"] if row["name"] == facts["subject"])
    (entry,) = head["model-index"]
    metrics = {metric["type"]: metric for metric in entry["results"][0]["metrics"]}
    first = metrics[facts["verdict"]["metric"]]
    assert first["value"] == tuned["score"]
    assert first["args"] == {"low": tuned["low"], "high": tuned["high"], "confidence": facts["verdict"]["confidence"], "rows": tuned["n"]}
    for name, value in tuned["metrics"].items():
        assert metrics[name]["value"] == value["value"]
    for row in facts["candidates"]:
        line = next(line for line in body.splitlines() if escaped(row["title"]) in line and line.startswith("|"))
        assert f"{100 * row['score']:.1f} %" in line
        assert f"{100 * row['low']:.1f} – {100 * row['high']:.1f} %" in line
    for pair in facts["comparisons"]:
        assert f"{100 * pair['difference']:+.1f}".replace("-", "−") in body
    assert escaped(facts["verdict"]["sentence"], 2000) in body


def test_the_head_says_what_hugging_face_reads(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    head, body, facts = carded(run)
    assert head["library_name"] == "peft"
    assert head["license"] == "unknown", "nobody noted one"
    assert head["metrics"] == [metric["type"] for metric in head["model-index"][0]["results"][0]["metrics"]]
    assert head["datasets"] == list(dict.fromkeys(source_name(source["path"]) for source in facts["data"]["sources"]))
    assert "PeftModel" in body
    run.note(base_license="gemma")
    assert carded(run)[0]["license"] == "gemma"
    run.note(base_license="my own: terms")
    head = carded(run)[0]
    assert (head["license"], head["license_name"]) == ("other", "my own: terms")
    merged, told = parts(model_card(run, facts, merged=True) or "")
    assert merged["library_name"] == "transformers"
    assert "PeftModel" not in told


def test_no_path_of_this_machine_is_told(tmp_path: Path) -> None:
    """Of the recipe's files, the model's folder, the template and the user's own metric, names only."""
    run = fabricate(tmp_path / "run")
    place = tmp_path / "of-mine"
    content = {
        "model": {"name": str(place / "base"), "chat_template": str(place / "own.jinja")},
        "data": {"train": str(place / "rows.jsonl"), "test": str(place / "held.jsonl")},
        "training": {"replay_data": str(place / "general.jsonl")},
        "task": {"metric": str(place / "mine.py:rubric")},
    }
    run.write_text(run.recipe_file, dump_recipe(build_recipe(content)))
    report(run)
    card = run.card_file.read_text()
    assert "of-mine" not in card
    assert str(tmp_path) not in card
    for name in ("base", "own.jinja", "rows.jsonl", "held.jsonl", "general.jsonl", "mine.py:rubric"):
        assert name in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, text: str) -> None:
    run = fabricate(tmp_path / "run")
    manifest = run.read_json(run.manifest_file)
    safe = text.encode("utf-8", "backslashreplace").decode()
    manifest["sources"][0] |= {"path": f"hub:{safe}", "format": safe, "sha256": safe}
    manifest["attribution"] = safe
    manifest["removed_counts"] = {safe: 3}
    manifest["splits"][safe] = {"rows": 1}
    run.write_json(run.manifest_file, manifest)
    content = run.read_json(run.comparison_file)
    content["sentence"] = content["metric_title"] = safe
    for row in content["candidates"]:
        row["title"] = f"{safe} {row['name']}"
    for row in content["rows_detail"]:
        row |= {"question": safe, "reference": safe}
    run.write_json(run.comparison_file, content)
    run.write_json(
        run.path / "retain.json", {"sentence": safe, "suites": [{"title": safe, "before": 0.5, "after": 0.4, "change": -0.1, "n": 10}]}
    )
    run.note(base_license=safe)
    head, body, _ = carded(run)
    assert head["base_model"] == base_name(run.recipe().model.name), "no key was added or replaced"
    assert set(head) == {
        "base_model",
        "library_name",
        "pipeline_tag",
        "license",
        "license_name",
        "tags",
        "datasets",
        "metrics",
        "model-index",
    }
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", body)  # what is not in a fenced block of ours
    bare = re.sub(r"\\.", "", outside)  # escaped characters are text
    assert "<" not in bare
    assert "[" not in bare
    assert "`" not in bare
    assert not re.search(r"(?i)https?:|www\.", bare)
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## Measured", "## What was forgotten", "## Data", "## Training", "## Limits", "## How to load it"]
    for table in re.findall(r"(?m)(?:^\|.*\n)+", bare):
        assert len({line.count("|") for line in table.splitlines()}) == 1, "a row has as many cells as its head"
    html = (
        MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    )  # a second reader, with HTML let through
    tags = set(re.findall(r"<([a-z0-9]+)", html))
    assert tags <= {"h1", "h2", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "pre", "code"}
    assert html.count("<h1>") == 1
    assert html.count("<code") == 2, "the recipe and the way to load it"
    shown = unescape(re.sub(r"<[^>]+>", "", html))
    assert " ".join(visible(safe).split())[:40] in " ".join(shown.split()), "and it is shown as it is"
    assert not re.search(r"[\x00-\x08\x1b\u202e\u2028]", body)


def test_escaping_by_hand() -> None:
    assert escaped("a_b *c* [d](e) <f> `g` | #1") == r"a\_b \*c\* \[d\](e) \<f\> \`g\` \| \#1"
    assert escaped("1. one\n- two") == r"1\. one - two"
    assert escaped("- x") == r"\- x"
    assert escaped("see http://x.y and WWW.x.y") == r"see http\://x.y and WWW\.x.y"
    assert fenced("a ```` b\n") == "`````\na ```` b\n`````"


def test_names_that_a_reader_can_find() -> None:
    assert base_name("gemma-3-270m") == "google/gemma-3-270m"
    assert base_name("hub:owner/name") == base_name("owner/name") == "owner/name"
    assert base_name("/somewhere/of/mine/model-x") == "model-x"
    assert source_name("hub:owner/data:train") == "owner/data"
    assert source_name("/somewhere/of/mine/rows.jsonl") == "rows.jsonl"
    assert source_name("C:\\mine\\rows.jsonl") == "rows.jsonl"
    assert source_name("demo:home-assistant/en") == "demo:home-assistant/en"


def test_what_was_forgotten_comes_from_its_file(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run")
    assert "Not measured." in carded(run)[1]
    suites = [
        {"suite": "arc", "title": "ARC-easy", "before": 0.51, "after": 0.472, "change": -0.038, "low": -0.07, "high": -0.01, "n": 400}
    ]
    run.write_json(run.path / "retain.json", {"sentence": "It lost a little.", "suites": suites})
    body = carded(run)[1]
    assert "It lost a little." in body
    assert "| ARC-easy | 51.0 % | 47.2 % | −3.8 | −7.0 to −1.0 | 400 |" in body


def test_nothing_trained_has_no_card(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "run", tuned=False)
    report(run)
    assert not run.card_file.exists()
    json.dumps(run.read_json(run.report_json_file))
