"""Any OpenAI-compatible chat endpoint, asked politely: retries, a rate limit, a spending cap, and no answer is paid for twice.

in          an Endpoint (address, model, prices, limits) and the file in a run's folder that keeps its answers
out         Answers, in the order of the requests
invariant   what is sent can never cost more than `max_spend` over the life of the file; the key is read from the environment when it is
            needed and is in no file, log, error or repr; it goes to the address given and nowhere else

The standard library's urllib carries it: proxies and certificates come from the environment as everywhere else.
"""

from __future__ import annotations

import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from burnish.errors import EndpointError, RecipeError
from burnish.evaluation.wire import Reply, is_loopback, make_opener, post, read_reply, retry_after_seconds
from burnish.run import append_line, hash_of, read_lines
from burnish.types import Message, Tell, silent

RETRIES = 6
FIRST_WAIT_SECONDS, LONGEST_BACKOFF_SECONDS = 1.0, 60.0
LONGEST_WAIT_SECONDS = 300.0  # a server that asks for more is told of, not waited for
TOKENS_PER_MESSAGE = 16  # more than any chat format puts around a message (OpenAI: 3 to 4)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers, what it costs, and how hard it may be asked. Raises RecipeError for an address the key must not be sent to."""

    name: str  # its file is RUN/endpoints/NAME.jsonl
    base_url: str  # up to and with the version: https://api.openai.com/v1
    model: str
    key_variable: str | None = None  # the NAME of the environment variable that holds the key; None: the endpoint asks for none
    price_in: float = 0.0  # per million prompt tokens, in whatever currency max_spend is in
    price_out: float = 0.0  # per million completion tokens
    max_spend: float | None = None  # over the life of the answers' file; None only where both prices are 0
    requests_per_minute: float | None = None
    timeout_seconds: float = 120.0  # for a whole answer
    concurrency: int = 4  # requests under way at once
    allow_plain_http: bool = False  # to a host that is not this machine; whoever listens reads the key and the rows

    def __post_init__(self) -> None:
        where = f"endpoint {self.name!r}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name):
            raise RecipeError(f"{where}: the name becomes a file's name: letters, digits, `.`, `_` and `-`, at most 64")
        try:
            parts = urlsplit(self.base_url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", self.base_url):
            raise RecipeError(f"{where}: base_url is no http(s) address; expected one like https://api.openai.com/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise RecipeError(
                f"{where}: base_url holds a password or a query, which would be written into the run: give key_variable instead"
            )
        if parts.scheme == "http" and not is_loopback(host) and not self.allow_plain_http:
            raise RecipeError(f"{where}: http://{host} would carry the key and the rows unencrypted; use https, or allow_plain_http: true")
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise RecipeError(f"{where}: key_variable is the NAME of an environment variable (OPENAI_API_KEY), never the key itself")
        for key in ("price_in", "price_out", "max_spend", "requests_per_minute", "timeout_seconds", "concurrency"):
            value = getattr(self, key)
            least = 0 if key.startswith(("price", "max")) else 1e-9
            if value is not None and not (math.isfinite(value) and value >= least):
                raise RecipeError(f"{where}: {key} is {value}; expected a number {'from 0' if least == 0 else 'above 0'}")
        if self.max_spend is None and (self.price_in or self.price_out):
            raise RecipeError(f"{where}: it has a price and no max_spend: say how much may be spent at most (same currency)")

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return is_loopback(urlsplit(self.base_url).hostname or "")


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    finish_reason: str  # stop · length · content_filter · tool_calls · unknown
    prompt_tokens: int | None  # as the endpoint counted them; None: it did not say
    completion_tokens: int | None
    seconds: float  # from sending the request that was answered to its last byte; of a cached answer, what it took then
    cost: float  # from the tokens and the prices; the most it can have cost where the endpoint did not count. Cached: what it cost then
    cached: bool


@dataclass(frozen=True, slots=True)
class Request:
    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float | None = 0.0  # None: left to the endpoint (some models refuse any)
    seed: int | None = None


class Client:
    """Asks one endpoint. Threads may share it. `clock`, `sleep` and `jitter` (0..1) are for tests."""

    def __init__(
        self,
        endpoint: Endpoint,
        keep: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.endpoint, self.keep = endpoint, keep
        self._stopped = threading.Event()  # wakes those that wait when there is nothing to wait for any more
        self._clock, self._sleep, self._jitter = clock, sleep or self._stopped.wait, jitter
        self._lock = threading.Lock()
        self._asking: dict[str, threading.Lock] = {}  # by request: who asks the same waits for the first one's answer
        self._answers: dict[str, dict[str, Any]] = {}
        self._open: dict[str, float] = {}  # reservations of requests under way, or that a process died over: they may have been billed
        self._spent = 0.0
        self._next_start = -math.inf
        self._limit_name = "max_tokens"
        for row in read_lines(keep) if keep.exists() else ():
            self._take_up(row)
        self._opener = make_opener(endpoint.base_url)

    @property
    def spent(self) -> float:
        """What the file's requests cost, with the most that those can have cost whose answer never came."""
        with self._lock:
            return self._spent + sum(self._open.values())

    def ask(self, messages: Sequence[Message], *, max_tokens: int, temperature: float | None = 0.0, seed: int | None = None) -> Answer:
        """The answer to one conversation. EndpointError: the cap would be passed, the endpoint refuses, or it cannot be reached."""
        return self._ask(Request(tuple(messages), max_tokens, temperature, seed))

    def ask_all(self, requests: Sequence[Request], *, title: str = "", tell: Tell = silent) -> list[Answer]:
        """All answers in order, `concurrency` at a time. The first error stops what has not begun; what was answered is kept."""
        title, done = title or self.endpoint.name, 0
        self._stopped.clear()
        errors: list[BaseException] = []

        def answer(request: Request) -> Answer:
            try:
                return self._ask(request)
            except BaseException as problem:
                errors.append(problem)
                self._stopped.set()  # at once: what waits would be sent before the caller hears of it
                raise

        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            waiting = [pool.submit(answer, request) for request in requests]
            answers = []
            for future in waiting:
                answers.append(future.result())
                done += 1
                tell(title, done, len(requests), f"spent {self.spent:.4f}" if self.endpoint.max_spend is not None else "")
            return answers
        except EndpointError:
            raise errors[0] from None  # the others were only told to stop
        except BaseException:
            self._stopped.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._stopped.clear()

    # ------------------------------------------------------------------------------------------------ inside

    def _ask(self, request: Request) -> Answer:
        key = hash_of(self.endpoint.base_url, self.endpoint.model, request.messages, request.max_tokens, request.temperature, request.seed)
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:
            with self._lock:
                known = self._answers.get(key)
            if known is not None:
                return _answer_of(known, cached=True)
            row = self._send_until_answered(key, request)
            return _answer_of(row, cached=False)

    def _send_until_answered(self, key: str, request: Request) -> dict[str, Any]:
        for attempt in range(RETRIES + 1):
            number = self._reserve(key, request)
            self._wait_for_turn()
            if self._stopped.is_set():
                self._release(number, billed=False)
                raise EndpointError(f"{self._where()}: stopped before the request was sent", code="stopped")
            limit = self._limit_name
            reply = self._send(request, limit)
            found, problem = read_reply(reply)
            if found is not None:
                return self._note_answer(key, number, request, found, reply.seconds)
            self._release(number, billed=reply.may_be_billed)
            if reply.status == 400 and limit == "max_tokens" and b"max_completion_tokens" in reply.body:
                self._limit_name = "max_completion_tokens"  # newer OpenAI models take the limit by this name only
                continue
            if not reply.is_passing or attempt == RETRIES:
                tries = f", asked {attempt + 1} times" if attempt else ""
                raise EndpointError(self._safe(f"{self._where()} gave no answer{tries}: {problem}"), code=reply.code)
            self._sleep(self._pause(attempt, reply))
        raise AssertionError("the last attempt returns or raises")

    def _send(self, request: Request, limit_name: str) -> Reply:
        endpoint = self.endpoint
        content: dict[str, Any] = {
            "model": endpoint.model,
            "messages": [_plain(m) for m in request.messages],
            limit_name: request.max_tokens,
        }
        content |= {name: value for name in ("temperature", "seed") if (value := getattr(request, name)) is not None}
        address = endpoint.base_url.rstrip("/") + "/chat/completions"
        return post(self._opener, address, content, key=self._key(), timeout_seconds=endpoint.timeout_seconds)

    def _key(self) -> str:
        name = self.endpoint.key_variable
        if name is None:
            return ""
        key = os.environ.get(name, "").strip()
        if not key:
            raise RecipeError(
                f"endpoint {self.endpoint.name!r}: the environment variable {name} is not set: export it with the endpoint's key"
            )
        if not key.isascii() or not key.isprintable():
            raise RecipeError(f"endpoint {self.endpoint.name!r}: what {name} holds cannot be a key (line breaks or letters beyond ASCII)")
        return key

    def _safe(self, text: str) -> str:
        """Without the key, should an endpoint have sent it back to us."""
        key = os.environ.get(self.endpoint.key_variable or "", "").strip()
        return text.replace(key, "[key]") if key else text

    def _where(self) -> str:
        return f"endpoint {self.endpoint.name!r} ({self.endpoint.base_url}, model {self.endpoint.model})"

    # ---- money

    def _reserve(self, key: str, request: Request) -> str:
        """Set aside what the request can cost at most, on the disk before it is sent; refuse where that could pass the cap."""
        if self.endpoint.key_variable is not None:
            self._key()  # a missing key is found before anything is noted
        worst = self._cost(most_prompt_tokens(request.messages), request.max_tokens)
        with self._lock:
            committed = self._spent + sum(self._open.values())
            cap = self.endpoint.max_spend
            if cap is not None and committed + worst > cap:
                raise EndpointError(
                    f"{self._where()}: not asked, because {committed:.6g} is spent or on its way and this request could cost {worst:.6g}, "
                    f"more than max_spend {cap:.6g} allows. What was answered is kept; raise max_spend to go on",
                    code="spending_cap",
                )
            number = hash_of(key, len(self._answers), len(self._open), self._spent, random.getrandbits(64))
            if worst:
                self._open[number] = worst
                append_line(self.keep, {"reserved": worst, "attempt": number, "request": key}, sync=True)
            return number

    def _release(self, attempt: str, *, billed: bool) -> None:
        with self._lock:
            worst = self._open.pop(attempt, 0.0)
            if worst:
                cost = worst if billed else 0.0
                self._spent += cost
                append_line(self.keep, {"attempt": attempt, "cost": cost})

    def _note_answer(self, key: str, attempt: str, request: Request, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        counted = (found["prompt_tokens"], found["completion_tokens"])
        most = (most_prompt_tokens(request.messages), request.max_tokens)
        cost = self._cost(*(high if tokens is None else tokens for tokens, high in zip(counted, most, strict=True)))
        row = {"request": key, "attempt": attempt, **found, "text": self._safe(found["text"]), "seconds": round(seconds, 4), "cost": cost}
        with self._lock:
            self._open.pop(attempt, None)
            append_line(self.keep, row, sync=True)
            self._answers[key] = row
            self._spent += cost
        return row

    def _take_up(self, row: Mapping[str, Any]) -> None:
        if "reserved" in row:
            self._open[str(row["attempt"])] = float(row["reserved"])
            return
        self._open.pop(str(row.get("attempt")), None)
        self._spent += float(row.get("cost", 0.0))
        if "text" in row:
            self._answers[str(row["request"])] = dict(row)

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.endpoint.price_in + completion_tokens * self.endpoint.price_out) / 1e6

    # ---- time

    def _wait_for_turn(self) -> None:
        """Requests start at least 60 / requests_per_minute seconds apart."""
        if self.endpoint.requests_per_minute is None:
            return
        with self._lock:
            now = self._clock()
            start = max(now, self._next_start)
            self._next_start = start + 60 / self.endpoint.requests_per_minute
        if start > now:
            self._sleep(start - now)

    def _pause(self, attempt: int, reply: Reply) -> float:
        """Full jitter (Brooker 2015): uniform up to 1, 2, 4 … 60 s, on top of what the server asks for."""
        spread = self._jitter() * min(LONGEST_BACKOFF_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
        asked = retry_after_seconds(reply.headers.get("retry-after"))
        if asked is None:
            return spread
        if asked > LONGEST_WAIT_SECONDS:
            raise EndpointError(f"{self._where()} asks to wait {asked:.0f} s: come back then; what was answered is kept", code="rate_limit")
        return asked + min(1.0, spread)


def most_prompt_tokens(messages: Sequence[Message]) -> int:
    """No tokenizer makes more tokens of a text than it has bytes; each message brings a few of its own."""
    return sum(len(str(m.get("content", "")).encode("utf-8", "replace")) + TOKENS_PER_MESSAGE for m in messages) + TOKENS_PER_MESSAGE


def _plain(message: Message) -> Message:
    """Without what only a training reads."""
    return {key: value for key, value in message.items() if key != "weight"}


def _answer_of(row: Mapping[str, Any], *, cached: bool) -> Answer:
    names = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "seconds", "cost")
    return Answer(**{name: row[name] for name in names}, cached=cached)
