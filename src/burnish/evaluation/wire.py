"""One HTTP exchange with a chat endpoint: bytes out, one Reply in, whatever the other side does. What a reply means is read here, too."""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

LARGEST_BODY_BYTES = 16 * 2**20
_LARGEST_REFUSAL_BYTES = 100_000
_NO_USE_IN_RETRYING = (b"insufficient_quota", b"billing_hard_limit_reached")  # 429s that say: pay first


@dataclass(frozen=True, slots=True)
class Reply:
    status: int  # 0: no whole reply came; `body` says why
    headers: Mapping[str, str]  # names in lower case
    body: bytes
    seconds: float  # from sending to the last byte
    lasting: bool = False  # of status 0: trying again cannot help (a certificate that is not trusted)

    @property
    def is_passing(self) -> bool:
        """Whether trying again can help."""
        if self.status == 429:
            return not any(word in self.body for word in _NO_USE_IN_RETRYING)
        return not self.lasting and (self.status in (0, 200, 408, 409, 425) or self.status >= 500)

    @property
    def may_be_billed(self) -> bool:
        """A whole reply that says no is not billed. One that never came whole, or says yes and cannot be read, may have been."""
        return self.status in (0, 200)

    @property
    def code(self) -> str:
        known = {0: "unreachable", 200: "unreadable", 401: "key_refused", 403: "key_refused", 429: "rate_limit"}
        return known.get(self.status, "refused")


def make_opener(base_url: str) -> urllib.request.OpenerDirector:
    """Proxies as the environment says, except for this machine itself; redirects are not followed."""
    proxies = urllib.request.ProxyHandler({} if is_loopback(urlsplit(base_url).hostname or "") else None)
    return urllib.request.build_opener(proxies, _NoRedirect())


def post(opener: urllib.request.OpenerDirector, url: str, content: Mapping[str, Any], *, key: str, timeout_seconds: float) -> Reply:
    """Send JSON, wait for the whole reply. Raises nothing that the other side can cause."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "burnish"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    sent = urllib.request.Request(url, data=json.dumps(content).encode(), headers=headers, method="POST")
    started = time.perf_counter()

    def failed(problem: BaseException) -> Reply:
        reason = getattr(problem, "reason", None) or problem
        lasting = isinstance(reason, ssl.SSLCertVerificationError)
        return Reply(0, {}, f"{type(reason).__name__}: {reason}".encode(errors="replace"), time.perf_counter() - started, lasting)

    try:
        with opener.open(sent, timeout=timeout_seconds) as response:
            body = _bounded_body(response, started + timeout_seconds)
            return Reply(response.status, _lower(response.headers), body, time.perf_counter() - started)
    except urllib.error.HTTPError as refusal:
        with refusal:
            try:
                body = refusal.read(_LARGEST_REFUSAL_BYTES)
            except (OSError, http.client.HTTPException):
                body = b""
            return Reply(refusal.code, _lower(refusal.headers), body, time.perf_counter() - started)
    except (OSError, http.client.HTTPException, UnicodeError, _TooMuch) as problem:  # URLError and timeouts are OSErrors
        return failed(problem)


def read_reply(reply: Reply) -> tuple[dict[str, Any] | None, str]:
    """(text, finish_reason, prompt_tokens and completion_tokens of a chat completion, "") or (None, what is wrong)."""
    if reply.status == 0:
        return None, reply.body.decode(errors="replace")
    try:
        content = json.loads(reply.body)
    except (ValueError, RecursionError):
        content = None
    if reply.status != 200:
        return None, _refusal(reply, content)
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content")
        text = "".join(str(part.get("text", "")) for part in text) if isinstance(text, list) else text
        text = text if text is not None else message.get("refusal") or ""
        usage = content.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        finish_reason = str(choice.get("finish_reason") or "unknown")
    except (TypeError, KeyError, IndexError, AttributeError):
        return None, f"HTTP 200, but not the JSON of a chat completion: {_one_line(reply.body.decode(errors='replace'))}"
    if not isinstance(text, str):
        return None, "HTTP 200, but choices[0].message.content is no text"
    return {
        "text": text.encode("utf-8", "replace").decode(),  # a lone surrogate cannot be written
        "finish_reason": finish_reason.encode("utf-8", "replace").decode(),
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "completion_tokens": _count(usage.get("completion_tokens")),
    }, ""


def retry_after_seconds(value: str | None) -> float | None:
    """RFC 9110 10.2.3: a number of seconds, or a date. None where there is none that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _refusal(reply: Reply, content: Any) -> str:
    if 300 <= reply.status < 400:
        return f"HTTP {reply.status}, a redirect, which is not followed because it would carry the key elsewhere: give the final address"
    error = content.get("error") if isinstance(content, dict) else None
    said = error.get("message") if isinstance(error, dict) else error if isinstance(error, str) else reply.body.decode(errors="replace")
    return f"HTTP {reply.status}: {_one_line(said)}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to an address nobody gave: it is an answer like any other refusal."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _TooMuch(Exception):
    """A body that is too long, or too slow."""


def _bounded_body(response: Any, deadline: float) -> bytes:
    parts, size = [], 0
    while part := response.read1(65_536):
        size += len(part)
        if size > LARGEST_BODY_BYTES:
            raise _TooMuch(f"the reply is longer than {LARGEST_BODY_BYTES:,} bytes")
        if time.perf_counter() > deadline:
            raise _TooMuch("the reply took longer than timeout_seconds")
        parts.append(part)
    expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdecimal() and size < int(expected):
        raise _TooMuch(f"the connection ended after {size:,} of {int(expected):,} bytes")
    return b"".join(parts)


def _lower(headers: Any) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:300] or "(nothing)"
