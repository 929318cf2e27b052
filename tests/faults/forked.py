"""A warm Python that forks: each training of these tests is a process of its own, which can be killed, and does not wait four seconds for torch.

`python forked.py` is the server: a job comes as a JSON line, the ids of the processes go out, then their exit codes. The rest is for the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "name": "faults",
    "data": {"validation_fraction": 0.15, "test_fraction": 0.2, "overlap_ngram": 0},
    "task": {"metric": "exact_match"},
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},  # dropout: random numbers must be the same ones after a resume
    "training": {"epochs": 2, "learning_rate": 0.01, "micro_batch_size": 4, "checkpoint_steps": 3, "validations_per_epoch": 2},
}


# ------------------------------------------------------------------------------------------------------------------ the tests' side


class Forked:
    """The server, and one job at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
        )
        atexit.register(self.server.kill)
        assert self._read() == "ready"

    def start(self, kind: str, run: Path, **job: Any) -> list[int]:
        """Begin a job; the ids of its processes."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps({"kind": kind, "run": str(run), "log": str(run) + ".log", **job}) + "\n")
        return list(self._read())

    def wait(self) -> list[int]:
        """Exit codes, negative for a signal."""
        return list(self._read())

    def run(self, kind: str, run: Path, **job: Any) -> int:
        self.start(kind, run, **job)
        return self.wait()[0]

    def _read(self) -> Any:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server of forked processes died"
        return json.loads(line)


@cache
def forked() -> Forked:
    return Forked()


@dataclass(frozen=True)
class Reference:
    """A training that nobody disturbed."""

    recipe: dict[str, Any]
    prepared: Path  # a run with its data prepared
    rows: list[dict[str, Any]]
    adapter: str
    seconds: float
    stages: dict[str, Any] = field(default_factory=dict)  # of a chain: the outcome of each

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.prepared, folder))


def reference(
    model: Path, folder: Path, *, data: list[dict[str, Any]] | None = None, sections: Mapping[str, Any] | None = None, **training: Any
) -> Reference:  # fmt: skip
    """Train RECIPE, changed by `sections` and `training`, on `data` (none: colour rows) with nobody disturbing it."""
    from conftest import colour_rows

    rows_file = folder / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in data or colour_rows(64)))
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"] = {"name": str(model), "dtype": "float32"}
    recipe["data"]["train"] = str(rows_file)
    for name, values in {**(sections or {}), "training": {**(sections or {}).get("training", {}), **training}}.items():
        recipe[name] = {**recipe.get(name, {}), **values} if isinstance(values, Mapping) else values
    prepared, whole = folder / "prepared", folder / "whole"
    assert forked().run("prepare", prepared, recipe=recipe) == 0, log_of(prepared)
    shutil.copytree(prepared, whole)
    started = time.monotonic()
    assert forked().run("train", whole, recipe=recipe) == 0, log_of(whole)
    seconds = time.monotonic() - started
    rows, adapter = outcome(whole)
    assert not list(whole.rglob("checkpoints"))
    return Reference(recipe, prepared, rows, adapter, seconds, stages_of(whole))


def outcome(run: Path) -> tuple[list[dict[str, Any]], str]:
    """(metrics rows without times, SHA-256 of the adapter as it lies on the disk)."""
    from burnish.run import hash_file, read_lines

    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in read_lines(run / "training" / "metrics.jsonl")]
    (weights,) = (run / "adapter").glob("*model.safetensors")  # of method full: model.safetensors
    return rows, hash_file(weights)


def stages_of(run: Path) -> dict[str, Any]:
    return {path.name: outcome(path) for path in sorted((run / "stages").glob("*"))}


def finish(run: Path, expected: Reference, **job: Any) -> None:
    """Go on with a training that was disturbed, to the end: every loss and the adapter are those of the undisturbed one."""
    code = forked().run("train", run, recipe=expected.recipe, **job)
    assert code == 0, log_of(run)
    rows, adapter = outcome(run)
    assert rows == expected.rows
    assert adapter == expected.adapter
    assert stages_of(run) == expected.stages
    status = json.loads((run / "run.json").read_text())["steps"]["train"]
    assert status["state"] == "done"
    assert not [path for path in run.rglob("*") if path.name.endswith((".tmp", ".old"))]
    assert not list(run.rglob("checkpoints"))


def kill_after(seconds: float, run: Path, expected: Reference, number: int = signal.SIGKILL) -> int:
    """Go on with a training and send it a signal after a while. Returns its exit code; 0: it was done before."""
    (pid,) = forked().start("train", run, recipe=expected.recipe)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    timer = threading.Timer(seconds, kill)
    timer.start()
    code = forked().wait()[0]
    timer.cancel()
    assert code in (0, -number, 128 + number), log_of(run)
    return code


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    from burnish.run import read_lines

    return [row for row in read_lines(run / "events.jsonl") if row["event"] == kind]


def log_of(run: Path) -> str:
    return Path(str(run) + ".log").read_text()[-3000:]


# ------------------------------------------------------------------------------------------------------------------ the server's side


def serve() -> None:
    import torch

    import burnish.cli
    import burnish.pipeline  # noqa: F401

    torch.set_num_threads(1)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        processes = job.get("processes", 1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(processes):
            if (pid := os.fork()) == 0:
                _child(job, rank, processes, port)
            children.append(pid)
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


def _child(job: dict[str, Any], rank: int, processes: int, port: int) -> None:
    from burnish.errors import BurnishError, Stopped

    code = 99
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if job.get("traced"):
            _wait_for_tracer()
        if job.get("fsync"):
            _at_fsync(*job["fsync"])
        if job.get("at_step"):
            _at_step(*job["at_step"])
        if job.get("memory"):
            _limit_memory(*job["memory"])
        _do(job, rank)
        code = 0
    except Stopped as stopped:
        print(stopped)
        code = stopped.exit_code
    except BurnishError as problem:
        print(problem)
        code = problem.exit_code
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _do(job: dict[str, Any], rank: int) -> None:
    from burnish import pipeline
    from burnish.cli import main
    from burnish.recipe import build_recipe
    from burnish.run import Run
    from burnish.types import silent

    if job["kind"] == "cli":
        sys.argv = ["burnish", *job["arguments"]]
        main()
    elif rank > 0:
        pipeline.assist(job["run"])
    else:
        allow = job.get("allow", ())
        with Run.working(job["run"], build_recipe(job["recipe"]), allow_change=allow) as run:
            pipeline.prepare(run)
            if job["kind"] == "train":
                pipeline.train(run, allow_change=allow, tell=_print if job.get("tell") else silent)


def _print(what: str, done: int, total: int, detail: str) -> None:
    print(what, done, total, detail)


def _wait_for_tracer() -> None:
    """Let strace take hold before anything is done."""
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, any: where Yama asks for it
    deadline = time.monotonic() + 60
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        if time.monotonic() > deadline:
            raise TimeoutError("strace did not take hold of this process: may it trace here?")
        time.sleep(0.002)


def _limit_memory(number: int, share: float) -> None:
    """Once the row of a step is written: `ulimit -v`, with room for a share of what the largest step so far took."""
    import burnish.training.metrics as metrics
    import burnish.training.ready as ready

    real = metrics.append_line
    ready.keep_freed_memory = lambda: None  # what is kept would never be asked for again: no step could fail
    ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once, so that steps are alike

    def append(path: Path, row: dict[str, Any]) -> None:
        real(path, row)
        if row["step"] == number and "loss" in row:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            now, peak = (1024 * int(lines[name].split()[0]) for name in ("VmSize", "VmPeak"))
            resource.setrlimit(resource.RLIMIT_AS, (now + int(share * (peak - now)), resource.RLIM_INFINITY))

    metrics.append_line = append


def _at_fsync(number: int, action: str) -> None:
    """At the n-th fsync: `TERM` or `INT` (a signal comes), `TERM-TERM` (two come), `slow-TERM` (it comes, and each fsync from there on takes a tenth
    of a second), `full` (no space once), `full+` (no space from there on)."""
    real, count = os.fsync, {"n": 0}

    def fsync(handle: int) -> None:
        count["n"] += 1
        if (count["n"] == number and action == "full") or (count["n"] >= number and action == "full+"):
            raise OSError(errno.ENOSPC, "No space left on device")
        if count["n"] == number and not action.startswith("full"):
            for name in action.removeprefix("slow-").split("-"):
                os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        if count["n"] >= number and action.startswith("slow"):
            time.sleep(0.1)
        real(handle)

    os.fsync = fsync


def _at_step(number: int, action: str, place: str = "") -> None:
    """Once the row of a step is written (of the run whose path holds `place`): a signal comes (`TERM`, `INT`, `KILL`, `STOP`)."""
    import burnish.training.metrics as metrics

    real = metrics.append_line

    def append(path: Path, row: dict[str, Any]) -> None:
        real(path, row)
        if row["step"] == number and "loss" in row and place in str(path):
            os.kill(os.getpid(), getattr(signal, f"SIG{action}"))

    metrics.append_line = append


if __name__ == "__main__":
    serve()
