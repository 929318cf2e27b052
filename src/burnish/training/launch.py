"""Start a command once for each process of a training, and watch them: one that dies or hangs ends all, and the last checkpoint stays."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from burnish.errors import TrainingError
from burnish.training.distributed import BEAT_VARIABLE
from burnish.training.interrupt import asked_to_stop

LEAST_SECONDS = 60.0  # without a sign of life before a process counts as hanging
_TIMES_MEDIAN = 10  # or so many median steps, where that is longer
_START_SECONDS = 1800.0  # until the first sign of life: a large model is being loaded, or downloaded
_GRACE_SECONDS = 30.0  # to save after being told to stop, besides the step that is under way
_LOOK_SECONDS = 0.2


@dataclass(slots=True)
class _Process:
    rank: int
    child: subprocess.Popen[bytes]
    pipe: int
    last: float  # monotonic time of the last sign of life
    begun: bool = False
    step_at: float | None = None
    steps: list[float] = field(default_factory=list)  # seconds between the last steps


def launch(command: Sequence[str], processes: int, *, least_seconds: float = LEAST_SECONDS) -> int:
    """Run `command` with RANK 0 … processes − 1. Returns the exit code of the first that failed, else 0.

    Raises TrainingError where a process gives no sign of life for max(least_seconds, 10 × the median step): all are killed then.
    """
    with asked_to_stop() as stop:
        started = [_start(command, rank, processes, port) for port in [_free_port()] for rank in range(processes)]
        try:
            return _watch(started, least_seconds, stop)
        finally:
            for process in started:
                _kill(process, signal.SIGKILL)
                process.child.wait()
                os.close(process.pipe)


def _start(command: Sequence[str], rank: int, processes: int, port: int) -> _Process:
    reader, writer = os.pipe()
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {
        "OMP_NUM_THREADS": str(threads), **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), BEAT_VARIABLE: str(writer),
    }  # fmt: skip
    # A session of its own: Ctrl-C reaches the launcher alone, which tells all; and killing takes what the process itself started.
    child = subprocess.Popen(list(command), env=environment, pass_fds=(writer,), start_new_session=True)
    os.close(writer)
    os.set_blocking(reader, False)
    return _Process(rank, child, reader, time.monotonic())


def _watch(processes: list[_Process], least_seconds: float, stop: Callable[[], int | None]) -> int:
    first, told, deadline = None, False, float("inf")
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.pipe, selectors.EVENT_READ, process)
        while running := [process for process in processes if process.child.poll() is None]:
            for key, _ in selector.select(_LOOK_SECONDS):
                if not _read(key.data):
                    selector.unregister(key.fd)
            failed = next((p for p in processes if p.child.poll() not in (None, 0)), None)
            if stop() is not None and not told:
                told, deadline = True, time.monotonic() + _GRACE_SECONDS + 2 * _usual_step(processes)
                _tell(running, signal.SIGTERM)
            elif failed is not None and not told:
                # The others wait for it in vain, and end by our signal: theirs is not the code that says what happened.
                first = failed
                told, deadline = True, time.monotonic() + _GRACE_SECONDS / 10
                _tell(running, signal.SIGTERM)
            if time.monotonic() > deadline:
                _tell(running, signal.SIGKILL)
            if not told:
                _refuse_hanging(running, least_seconds)
    code = next((p.child.returncode for p in ([first] if first is not None else processes) if p.child.returncode), 0)
    return code if code >= 0 else 128 - code


def _read(process: _Process) -> bool:
    """Note the signs of life; False at the end of the pipe."""
    with contextlib.suppress(BlockingIOError):
        content = os.read(process.pipe, 65536)
        if not content:
            return False
        now = time.monotonic()
        process.last, process.begun = now, True
        if b"s" in content:
            if process.step_at is not None:
                process.steps = [*process.steps[-49:], (now - process.step_at) / content.count(b"s")]
            process.step_at = now
    return True


def _refuse_hanging(running: Sequence[_Process], least_seconds: float) -> None:
    now = time.monotonic()
    for process in running:
        usual = _usual_step(running)
        limit = max(least_seconds, _TIMES_MEDIAN * usual) if process.begun else _START_SECONDS
        if now - process.last > limit:
            halted = [f"{other.rank} (halted by a signal)" for other in running if _is_halted(other.child.pid)]
            which = ", ".join(halted or [str(other.rank) for other in running if now - other.last > limit])
            raise TrainingError(
                f"hanging: process {which} of {len(running)}: no sign of life for {now - process.last:.0f} s (a step takes {usual:.1f} s). All were "
                "killed; the last checkpoint is kept, and the same command goes on from there",
                code="hanging",
            )


def _usual_step(processes: Sequence[_Process]) -> float:
    """The median step of all processes in seconds; 0 before the second."""
    steps = [seconds for process in processes for seconds in process.steps]
    return statistics.median(steps) if steps else 0.0


def _is_halted(pid: int) -> bool:
    """Linux tells; elsewhere nobody knows."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def _tell(processes: Sequence[_Process], number: int) -> None:
    for process in processes:
        _kill(process, number)


def _kill(process: _Process, number: int) -> None:
    if process.child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.child.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
