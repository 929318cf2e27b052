"""The endpoint client against a server in a thread that misbehaves on purpose. Nothing waits: clock and sleep are given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EndpointError, RecipeError
from burnish.evaluation.endpoint import RETRIES, Client, Endpoint, Request, most_prompt_tokens
from burnish.evaluation.wire import Reply, read_reply, retry_after_seconds

KEY = "sk-very-secret-0123456789"
ASKED = [{"role": "user", "content": "How warm is it?"}]


def completion(text: Any = "17 degrees", *, usage: Any = (10, 4), finish: Any = "stop") -> bytes:
    content: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    if usage is not None:
        content["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(content).encode()


class Server:
    """Answers from a list: (status, headers, body), or "cut" to close the connection in the middle. The last one is repeated."""

    def __init__(self) -> None:
        self.script: list[Any] = [(200, {}, completion())]
        self.seen: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
                action = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if action == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.close_connection = True
                    return
                status, headers, content = action
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                """Where a followed redirect would arrive."""
                outer.seen.append({"path": self.path, "headers": dict(self.headers), "body": {}})
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def client(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Client]:
    monkeypatch.setenv("TEST_KEY", KEY)

    def make(**changes: Any) -> Client:
        settings = {"name": "big", "base_url": server.url, "model": "m", "key_variable": "TEST_KEY", **changes}
        slept: list[float] = []
        made = Client(
            Endpoint(**settings), tmp_path / "endpoints" / "big.jsonl", clock=lambda: sum(slept), sleep=slept.append, jitter=lambda: 0.5
        )
        made.slept = slept  # type: ignore[attr-defined]
        return made

    return make


def test_an_answer_and_what_was_sent(server: Server, client: Callable[..., Client]) -> None:
    answer = client(price_in=1.0, price_out=10.0, max_spend=1.0).ask([{**ASKED[0], "weight": 0}], max_tokens=8, seed=7)
    assert (answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens, answer.cached) == (
        "17 degrees",
        "stop",
        10,
        4,
        False,
    )
    assert answer.cost == pytest.approx((10 * 1 + 4 * 10) / 1e6)
    (seen,) = server.seen
    assert seen["path"] == "/v1/chat/completions"
    assert seen["headers"]["Authorization"] == f"Bearer {KEY}"
    assert seen["body"] == {"model": "m", "messages": ASKED, "max_tokens": 8, "temperature": 0.0, "seed": 7}


def test_waits_as_asked_and_backs_off(server: Server, client: Callable[..., Client]) -> None:
    busy = b'{"error": {"message": "slow down"}}'
    server.script = [
        (429, {"retry-after": "7"}, busy),
        (500, {}, b""),
        (503, {}, b"<html>"),
        "cut",
        (200, {}, b"not json"),
        (200, {}, completion()),
    ]
    made = client()
    assert made.ask(ASKED, max_tokens=8).text == "17 degrees"
    # 7 s as asked + min(1, half of 1); then half of 2, 4, 8, 16
    assert made.slept == [7.5, 1.0, 2.0, 4.0, 8.0]  # type: ignore[attr-defined]


def test_gives_up_and_says_why(server: Server, client: Callable[..., Client]) -> None:
    server.script = [(502, {}, b"bad gateway")]
    with pytest.raises(EndpointError, match=r"asked 7 times: HTTP 502: bad gateway") as caught:
        client().ask(ASKED, max_tokens=8)
    assert len(server.seen) == RETRIES + 1
    assert caught.value.code == "refused"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, b'{"error": {"message": "wrong key"}}', "key_refused"),
        (400, b'{"error": {"message": "no such model"}}', "refused"),
        (429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}', "rate_limit"),
        (302, b"", "refused"),
    ],
)
def test_does_not_repeat_what_cannot_help(server: Server, client: Callable[..., Client], status: int, body: bytes, code: str) -> None:
    server.script = [(status, {"Location": server.url + "/elsewhere"}, body)]
    with pytest.raises(EndpointError) as caught:
        client().ask(ASKED, max_tokens=8)
    assert caught.value.code == code
    assert len(server.seen) == 1  # of a redirect, too: the key was not carried on


def test_a_server_that_asks_for_an_hour_is_not_waited_for(server: Server, client: Callable[..., Client]) -> None:
    server.script = [(429, {"Retry-After": "3600"}, b"")]
    made = client()
    with pytest.raises(EndpointError, match="3600 s"):
        made.ask(ASKED, max_tokens=8)
    assert made.slept == []  # type: ignore[attr-defined]


def test_answers_are_paid_for_once(server: Server, client: Callable[..., Client]) -> None:
    first = client(price_in=1.0, max_spend=1.0)
    requests = [Request(tuple(ASKED), 8)] * 6 + [Request(tuple(ASKED), 8, 0.7, seed) for seed in (1, 2)]
    assert [answer.cached for answer in first.ask_all(requests)].count(False) == 3
    again = client(price_in=1.0, max_spend=1.0)
    answers = again.ask_all(requests)
    assert all(answer.cached for answer in answers)
    assert len(server.seen) == 3
    assert again.spent == first.spent == pytest.approx(3 * 10 / 1e6)
    assert client(model="other", price_in=1.0, max_spend=1.0).ask(ASKED, max_tokens=8).cached is False


def test_the_cap_refuses_before_it_is_passed(server: Server, client: Callable[..., Client]) -> None:
    worst = (most_prompt_tokens(ASKED) * 1.0 + 8 * 2.0) / 1e6
    cost = (10 * 1.0 + 4 * 2.0) / 1e6
    made = client(price_in=1.0, price_out=2.0, max_spend=worst + cost * 1.5)
    made.ask(ASKED, max_tokens=8, seed=1)
    made.ask(ASKED, max_tokens=8, seed=2)
    with pytest.raises(EndpointError, match="max_spend") as caught:
        made.ask(ASKED, max_tokens=8, seed=3)
    assert caught.value.code == "spending_cap"
    assert len(server.seen) == 2
    # A new process counts what the old one spent.
    with pytest.raises(EndpointError, match="max_spend"):
        client(price_in=1.0, price_out=2.0, max_spend=worst + cost * 1.5).ask(ASKED, max_tokens=8, seed=3)
    assert made.ask(ASKED, max_tokens=8, seed=1).cached


def test_what_may_have_been_billed_counts(server: Server, client: Callable[..., Client], tmp_path: Path) -> None:
    worst = (most_prompt_tokens(ASKED) + 8) / 1e6
    server.script = ["cut", (429, {}, b""), (200, {}, completion())]
    made = client(price_in=1.0, price_out=1.0, max_spend=1.0)
    made.ask(ASKED, max_tokens=8)
    assert made.spent == pytest.approx(worst + 14 / 1e6)  # the cut one at its most, the refused one not at all
    # A process that died between sending and the answer: its reservation stays.
    kept = tmp_path / "endpoints" / "big.jsonl"
    kept.write_text(json.dumps({"reserved": 0.25, "attempt": "x", "request": "y"}) + "\n")
    assert client(price_in=1.0, price_out=1.0, max_spend=1.0).spent == 0.25


def test_without_usage_the_most_is_counted(server: Server, client: Callable[..., Client]) -> None:
    server.script = [(200, {}, completion(usage=None))]
    answer = client(price_in=1.0, price_out=1.0, max_spend=1.0).ask(ASKED, max_tokens=8)
    assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)
    assert answer.cost == pytest.approx((most_prompt_tokens(ASKED) + 8) / 1e6)


def test_requests_keep_their_distance(server: Server, client: Callable[..., Client]) -> None:
    made = client(requests_per_minute=20)
    for seed in range(4):
        made.ask(ASKED, max_tokens=8, seed=seed)
    assert made.slept == [3.0, 3.0, 3.0]  # type: ignore[attr-defined]


def test_the_other_name_of_the_limit(server: Server, client: Callable[..., Client]) -> None:
    refusal = b'{"error": {"message": "Unsupported parameter: max_tokens. Use max_completion_tokens instead."}}'
    server.script = [(400, {}, refusal), (200, {}, completion())]
    made = client()
    made.ask(ASKED, max_tokens=8, temperature=None)
    made.ask(ASKED, max_tokens=9, temperature=None)
    assert [next(name for name in seen["body"] if name.startswith("max")) for seen in server.seen] == ["max_tokens"] + 2 * [
        "max_completion_tokens"
    ]
    assert "temperature" not in server.seen[0]["body"]


def test_the_key_is_nowhere(server: Server, client: Callable[..., Client], tmp_path: Path) -> None:
    server.script = [(200, {}, completion(f"you sent {KEY}")), (401, {}, f'{{"error": {{"message": "wrong key {KEY}"}}}}'.encode())]
    made = client(price_in=1.0, max_spend=1.0)
    assert made.ask(ASKED, max_tokens=8).text == "you sent [key]"
    with pytest.raises(EndpointError) as caught:
        made.ask(ASKED, max_tokens=9)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written + str(caught.value) + repr(made.endpoint) + repr(vars(made))


def test_a_missing_key_is_told_before_anything_is_sent(
    server: Server, client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client()
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(RecipeError, match="TEST_KEY is not set"):
        made.ask(ASKED, max_tokens=8)
    monkeypatch.setenv("TEST_KEY", "abc\ndef")
    with pytest.raises(RecipeError, match="cannot be a key") as caught:
        made.ask(ASKED, max_tokens=8)
    assert "def" not in str(caught.value)
    assert server.seen == []


def test_the_first_error_stops_the_rest(server: Server, client: Callable[..., Client]) -> None:
    server.script = [(200, {}, completion()), (400, {}, b"no")]
    made = client(concurrency=1)
    with pytest.raises(EndpointError, match="HTTP 400: no"):
        made.ask_all([Request(tuple(ASKED), 8, 0.0, seed) for seed in range(20)])
    assert len(server.seen) == 2
    assert made.ask(ASKED, max_tokens=8, seed=0).cached


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_url": "http://example.org/v1"}, "unencrypted"),
        ({"base_url": "https://user:word@example.org/v1"}, "password"),
        ({"base_url": "https://example.org/v1?key=abc"}, "password or a query"),
        ({"base_url": "file:///etc/passwd"}, "no http"),
        ({"base_url": "https://exa mple.org"}, "no http"),
        ({"name": "../x"}, "file's name"),
        ({"key_variable": "sk-abc"}, "NAME of an environment variable"),
        ({"price_in": -1.0}, "price_in is -1.0"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"price_out": 1.0}, "no max_spend"),
        ({"max_spend": float("nan")}, "max_spend"),
    ],
)
def test_a_wrong_endpoint_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Endpoint(**{"name": "big", "base_url": "https://example.org/v1", "model": "m", **changes})


def test_plain_http_goes_where_it_is_asked_for() -> None:
    Endpoint("big", "http://10.0.0.2:8000/v1", "m", allow_plain_http=True)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        Endpoint("big", f"http://{host}:8000/v1", "m")


@pytest.mark.parametrize(
    ("body", "text", "reason"),
    [
        (completion(None), "", "stop"),
        (completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), "ab", "stop"),
        (completion("\ud800x", finish=None), "?x", "unknown"),
        (completion("x", usage=(True, -1)), "x", "stop"),
    ],
)
def test_replies_that_can_be_read(body: bytes, text: str, reason: str) -> None:
    found, _ = read_reply(Reply(200, {}, body, 0.1))
    assert found is not None
    assert (found["text"], found["finish_reason"]) == (text, reason)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"[" * 100_000,
        b'{"error": "x"}',
    ],
)
def test_replies_that_cannot_be_read(body: bytes) -> None:
    found, problem = read_reply(Reply(200, {}, body, 0.1))
    assert found is None
    assert problem


def test_retry_after() -> None:
    assert retry_after_seconds("2.5") == 2.5
    assert retry_after_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after_seconds("soon") is retry_after_seconds(None) is retry_after_seconds("nan") is None
