"""S10: no text of data, model, file name or recipe runs, hides or leaves the machine when the report is opened."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markupsafe import Markup

from burnish.recipe import build_recipe, dump_recipe
from burnish.report import page as page_module
from burnish.report import report
from burnish.report.consistency import consistency_figure
from burnish.report.figures import NARROW, WIDE, differences_figure, scores_figure
from burnish.report.texts import encodable, visible
from burnish.run import Run

RUN = "document.title='PWNED'"
PAYLOADS = [
    f"<script>{RUN}</script>",
    f"</script><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</textarea></pre></details><script>{RUN}</script>",
    f"--><script>{RUN}</script><!--",
    f"]]><script>{RUN}</script>",
    f"<ScRiPt >{RUN}</sCrIpT>",
    f"<img src=x onerror={RUN}>",
    f"<img src=\"x\" onerror=\"{RUN}\">",
    "<img src=http://127.0.0.1:PORT/leak>",
    "<link rel=stylesheet href=http://127.0.0.1:PORT/leak>",
    "<iframe src=http://127.0.0.1:PORT/leak></iframe>",
    f"<iframe srcdoc=\"<script>parent.{RUN}</script>\"></iframe>",
    f"<svg onload={RUN}>",
    f"<svg><script>{RUN}</script></svg>",
    f"</text></svg><script>{RUN}</script>",
    f"<svg><animate onbegin={RUN} attributeName=x dur=1s>",
    f"<math><mtext><script>{RUN}</script></mtext></math>",
    f"<body onload={RUN}>",
    f"<details open ontoggle={RUN}>",
    f"<input autofocus onfocus={RUN}>",
    f"<video><source onerror={RUN}></video>",
    f"<a href=javascript:{RUN}>click</a>",
    f"[click](javascript:{RUN})",
    f"\" onmouseover=\"{RUN}\" x=\"",
    f"' autofocus onfocus='{RUN}' x='",
    f"`onload={RUN}",
    "<meta http-equiv=refresh content=\"0;url=http://127.0.0.1:PORT/leak\">",
    f"<base href=\"javascript:{RUN}//\">",
    "<style>@import url(http://127.0.0.1:PORT/leak)</style>",
    "\" style=\"background:url(http://127.0.0.1:PORT/leak)",
    f"<object data=\"data:text/html,<script>{RUN}</script>\"></object>",
    "{{ 7*7 }}{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}{#",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"\\u003cscript\\u003e{RUN}\\x3c/script\\x3e",
    f"\x1b]8;;http://127.0.0.1:PORT/leak\x07link\x1b]8;;\x07<b onclick={RUN}>",
    "abc\u202egpj.exe\u2066\u200b\ufeff\u2028<u>",
    f"<\x00script>{RUN}</\x00script>\ud800",
    "$\\frac{1}{0}$ #040404 style=\"fill: #040404\" <plaintext>",
]  # fmt: skip

ALLOWED_TAGS = {
    *("html", "head", "meta", "title", "link", "style", "body", "header", "span", "nav", "a", "main", "section", "p"),
    *("h1", "h2", "h3", "b", "div", "small", "figure", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd"),
    *("article", "details", "summary", "mark", "del", "pre", "svg", "g", "defs", "path", "use", "text", "clippath"),
    "rect",
}
# Keys whose own keys are names from outside, not words of the contract, and carry payloads too. (`fields`: two floors.)
MAPS = {
    *("unscored_reasons", "metrics", "answers", "scores", "reasons", "splits", "removed_counts", "token_lengths"),
    *("chosen", "example_prompts", "versions", "machine", "steps", "candidates", "comparisons"),
}


def _run_module() -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / "test_report_run.py"
    spec = importlib.util.spec_from_file_location("report_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Poison:
    """Puts a payload before every text of a JSON value, the same before the same text; `turn` shifts which."""

    def __init__(self, turn: int, port: int = 9) -> None:
        self.turn, self.port, self.seen = turn, port, {}  # type: ignore[var-annotated]

    def text(self, value: str) -> str:
        payload = PAYLOADS[(self.seen.setdefault(value, len(self.seen)) + self.turn) % len(PAYLOADS)]
        return payload.replace("PORT", str(self.port)) + value

    def value(self, value: Any, *, in_map: bool = False) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, dict):
            return {self.text(key) if in_map else key: self.value(item, in_map=key in MAPS) for key, item in value.items()}
        return value


def _poisoned(path: Path, turn: int, port: int = 9) -> Run:
    """A run whose files carry payloads wherever a text can stand."""
    made, poison = _run_module(), _Poison(turn, port)
    run: Run = made.fabricate(path)
    comparison = made.comparison(30)
    fields = comparison.pop("fields")
    content = poison.value(comparison)
    content["fields"] = {
        poison.text(name): {poison.text(field): values for field, values in by_field.items()} for name, by_field in fields.items()
    }
    files = {
        run.comparison_file: content,
        run.manifest_file: poison.value(made.manifest()),
        run.selection_file: poison.value(made.selection()),
        run.training_file: poison.value(made.training_summary()),
        run.judge_file: poison.value(made.judged()),
        run.status_file: poison.value(run.status()),
    }
    for file, content in files.items():
        file.write_text(json.dumps(content), encoding="ascii")  # \ud800 as an escape: JSON can say it, UTF-8 cannot
    asked = {
        "model": poison.text("model").replace("\ud800", ""),
        "data": {"train": "x.jsonl", "system": poison.text("system").replace("\ud800", "")},
        "task": {"instruction": poison.text("instruction").replace("\ud800", "")},
    }
    run.recipe_file.write_text(dump_recipe(build_recipe(asked)), encoding="utf-8")
    return run


class _Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text, self.title, self.inside = "", "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside != "style" else ""
        self.title += data if self.inside == "title" else ""


def _assert_harmless(page: str) -> _Seen:
    seen = _Seen(page)
    assert seen.tags <= ALLOWED_TAGS, seen.tags - ALLOWED_TAGS
    for tag, name, value in seen.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcdoc", "srcset", "action", "formaction", "data", "ping", "background"), (
            tag,
            name,
        )
        if name.endswith("href"):
            assert value == "data:," or re.fullmatch(r"#[\w-]+", value), value
        if name in ("style", "clip-path"):
            assert not re.search(r"url\((?!#[\w-]+\))|expression|@", value), value
    assert [tag for tag, name, _ in seen.attributes if name == "http-equiv"] in ([], ["meta"])
    assert visible(page) == page, "a control or direction character came through"
    return seen


def test_there_are_forty_payloads() -> None:
    assert len(set(PAYLOADS)) == 40


def test_every_payload_in_every_place_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place gets each payload once. Charts are drawn in the tests below: here they would take a minute."""
    monkeypatch.setattr(page_module, "_charts", lambda facts: {})
    monkeypatch.setattr(page_module, "consistency_charts", lambda facts, subject: None)
    for turn in range(len(PAYLOADS)):
        run = _poisoned(tmp_path / str(turn), turn)
        seen = _assert_harmless(report(run).read_text(encoding="utf-8"))
        for payload in PAYLOADS:
            shown = visible(encodable(payload.replace("PORT", "9")))
            assert shown in seen.text, (turn, payload)
        assert "{{ 7*7 }}" in seen.text, "a payload was taken for a template"


def test_every_payload_in_charts_is_text() -> None:
    rows = [{"name": p, "title": p, "score": 0.5, "low": 0.4, "high": 0.6} for p in encodable(PAYLOADS)]
    pairs = [{**row, "baseline": row["title"], "difference": 0.1, "low": 0.0, "high": 0.2, "verdict": row["title"]} for row in rows]
    for width in (WIDE, NARROW):
        for chart in (
            scores_figure(rows, PAYLOADS[0], percent=True, width=width),
            differences_figure(pairs, percent=True, detectable=0.1, width=width),
        ):
            assert isinstance(chart, Markup)
            _assert_harmless(str(chart))
            assert "fill: #040404" in _Seen(str(chart)).text or width == NARROW  # colours in texts stay texts


def test_every_payload_in_the_picture_of_checks_is_text() -> None:
    payloads = encodable(PAYLOADS)
    row = {"value": 0.5, "low": 0.4, "high": 0.6}
    measures = [
        {"title": p, "lower_is_better": False, "candidates": {p: row, "base": row}, "comparisons": {p: {"verdict": p}}} for p in payloads
    ]
    for width in (WIDE, NARROW):
        _assert_harmless(str(consistency_figure({"measures": measures, "against": "base"}, payloads[0], width=width)))


def test_the_whole_page_with_charts(tmp_path: Path) -> None:
    run = _poisoned(tmp_path / "run", 0)
    _assert_harmless(report(run).read_text(encoding="utf-8"))
    json.loads(run.report_json_file.read_text(encoding="utf-8"))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000", "--dump-dom"),
)


def _dom_after_opening(file: Path) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", file.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    return done.stdout.decode("utf-8", "replace")


class _Server:
    """Counts who calls, and hangs up: a page that fetches something is noticed."""

    def __init__(self) -> None:
        self.socket, self.calls = socket.create_server(("127.0.0.1", 0)), 0
        self.port = int(self.socket.getsockname()[1])
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed by the fixture
                return
            self.calls += 1
            connection.close()


@pytest.fixture
def server() -> Iterator[_Server]:
    running = _Server()
    yield running
    running.socket.shutdown(socket.SHUT_RDWR)
    running.socket.close()
    running.thread.join(5)


@needs_chromium
def test_in_a_browser_nothing_runs_and_nothing_is_fetched(tmp_path: Path, server: _Server) -> None:
    dom = _dom_after_opening(report(_poisoned(tmp_path / "run", 3, server.port)))
    assert "</html>" in dom
    seen = _Seen(dom)
    assert seen.title.endswith("· Burnish")
    assert seen.tags <= ALLOWED_TAGS
    assert server.calls == 0


@needs_chromium
@pytest.mark.parametrize("guarded", [False, True], ids=["bare", "under-policy"])
def test_payloads_that_are_not_escaped(tmp_path: Path, server: _Server, guarded: bool) -> None:
    """Bare, they run and fetch (so the test above can fail); under the page's policy alone they do neither."""
    template = resources.files("burnish.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', template)
    assert policy is not None
    loud = "".join(PAYLOADS[index] for index in (0, 8, 10)).replace("PORT", str(server.port))
    page = tmp_path / "unsafe.html"
    page.write_text(f"<!doctype html>{policy.group() if guarded else ''}<title>calm</title>{loud}", encoding="utf-8")
    assert _Seen(_dom_after_opening(page)).title == ("calm" if guarded else "PWNED")
    assert (server.calls == 0) == guarded
