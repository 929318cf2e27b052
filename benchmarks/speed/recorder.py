"""What a contestant's script writes while it trains: one JSON line for each step, and one at the end. Standard library only.

{"training": 1764.2}                                 when the first step began (Unix seconds)
{"step": 1, "loss": 1.93, "at": 1771.8}              when the step was done; `tokens` and `examples` where the contestant forms its own batches
{"adapter": "…", "versions": {…}, "threads": 2}      after the last step
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any


class Recorder:
    """Writes the events of one job. A job is the dict that launch.py wrote: case, steps, cap_seconds, options, events, adapter."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._file = Path(job["events"])
        self._deadline = time.time() + job["cap_seconds"]

    def write(self, **event: Any) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def begin(self) -> None:
        self.write(training=time.time())

    def step(self, number: int, loss: float, *, at: float | None = None, **more: Any) -> None:
        self.write(step=number, loss=loss, at=time.time() if at is None else at, **more)

    @property
    def out_of_time(self) -> bool:
        """Whether the job's time is used up: the step under way is the last."""
        return time.time() > self._deadline

    def finish(self, adapter: str, threads: int) -> None:
        names = ("torch", "transformers", "peft", "trl", "unsloth")
        versions = {name: version for name in names if (version := _version(name))}
        self.write(adapter=adapter, threads=threads, versions={"python": platform.python_version(), **versions})


def read_job() -> tuple[dict[str, Any], dict[str, Any]]:
    """(job, case): the file named on the command line, and the case it names."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job, json.loads(Path(job["case"]).read_text(encoding="utf-8"))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
