"""SIGTERM and Ctrl-C while a training runs: the first asks it to stop at the next safe place, the second ends the process now."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int | None]]:
    """Yields a function that gives the number of the signal that came, or None. Outside the main thread nothing is caught."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not asked:
            asked.append(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handle) for number in _ASKING}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            # None: a handler that was not set from Python; it cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
