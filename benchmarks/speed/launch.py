"""Runs one contestant in a process of its own and measures it from outside: the clock from the command on, memory, the loss of each step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed.contestants import BURNISH, CONTESTANTS

SCRIPTS = Path(__file__).resolve().parent
POLL_SECONDS = 0.05
LEAST_FREE_BYTES = 400_000_000  # below this the machine has no memory left: the contestant is ended before the kernel ends something else
CAP_FACTOR = 2.0  # a contestant stops by itself at its cap, after the step under way; at this multiple it is ended


@dataclass
class Outcome:
    """One run of one contestant. Times are seconds from the command."""

    contestant: str
    case: str
    round: int
    steps: list[dict[str, Any]] = field(default_factory=list)  # loss, seconds, tokens, examples
    first_step_begins: float | None = None
    first_step_done: float | None = None
    seconds: float = 0.0  # the whole command
    peak_bytes: int = 0
    cpu_seconds: float = 0.0
    others_share: float | None = None  # of the machine's time, taken by other processes meanwhile (and by other machines on the same host)
    adapter: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    problem: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Order:
    """What to run."""

    contestant: str
    case: str
    round: int
    steps: int
    cap_seconds: float
    python: Path
    folder: Path  # of this run
    overrides: tuple[str, ...] = ()  # KEY=VALUE of the recipe, for Burnish


def run(order: Order, case: dict[str, Any], case_file: Path) -> Outcome:
    """Start the contestant, wait for it, and read what it wrote."""
    shutil.rmtree(order.folder, ignore_errors=True)
    order.folder.mkdir(parents=True)
    warm_up_files(case)
    burnish = order.contestant == BURNISH
    command = burnish_command(order, case) if burnish else script_command(order, case_file)
    read_events = burnish_events if burnish else script_events
    events = order.folder / "run" / "training" / "metrics.jsonl" if burnish else order.folder / "events.jsonl"
    outcome = Outcome(order.contestant, order.case, order.round, command=" ".join(command))
    seen: dict[int, float] = {}
    begun, busy = time.time(), busy_seconds()
    with (order.folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment(order.contestant), cwd=order.folder)
    outcome.problem = watch(process, order.cap_seconds * CAP_FACTOR, outcome, lambda: note_arrivals(events, seen) if burnish else None)
    outcome.seconds = round(time.time() - begun, 2)
    others = busy_seconds() - busy - outcome.cpu_seconds
    outcome.others_share = round(max(0.0, others) / outcome.seconds / (os.cpu_count() or 1), 4)
    if process.returncode and outcome.problem is None:
        last = (order.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
        outcome.problem = f"exit {process.returncode}: {' | '.join(last)[-500:]}"
    read_events(events, outcome, begun, case, seen)
    if burnish and outcome.problem is None:
        outcome.adapter = str(order.folder / "run" / "adapter")
    (order.folder / "outcome.json").write_text(json.dumps(outcome.__dict__, indent=1), encoding="utf-8")
    return outcome


def burnish_command(order: Order, case: dict[str, Any]) -> list[str]:
    """What a user types. It includes reading, checking and splitting the rows, which the others are spared.

    Burnish measures the validation loss before the first step and at the end, the others do not: 8 rows here. held_out.py measures everyone on 64.
    """
    sets = [f"training.max_steps={order.steps}", "data.validation_rows=8", *order.overrides]
    flags = [part for value in sets for part in ("--set", value)]
    return [str(order.python), "-m", "burnish", "train", case["recipe"], "--run", str(order.folder / "run"), *flags]


def script_command(order: Order, case_file: Path) -> list[str]:
    contestant = CONTESTANTS[order.contestant]
    job = {
        "case": str(case_file),
        "steps": order.steps,
        "cap_seconds": order.cap_seconds,
        "options": contestant.options,
        "events": str(order.folder / "events.jsonl"),
        "adapter": str(order.folder / "adapter"),
        "scratch": str(order.folder / "scratch"),
    }
    job_file = order.folder / "job.json"
    job_file.write_text(json.dumps(job, indent=1), encoding="utf-8")
    return [str(order.python), str(SCRIPTS / contestant.script), str(job_file)]


def environment(contestant: str) -> dict[str, str]:
    """The same for everyone: no network, no reporting, torch's own choice of threads, which wait without spinning. PYTHONPATH is Burnish's alone."""
    kept = {key: value for key, value in os.environ.items() if contestant == BURNISH or key != "PYTHONPATH"}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    return kept | quiet | {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"} | CONTESTANTS[contestant].variables


def watch(process: subprocess.Popen[bytes], limit_seconds: float, outcome: Outcome, look: Callable[[], None]) -> str | None:
    """Wait for the end, looking every 50 ms. Returns what went wrong, if the process had to be ended. Fills in the peak of memory."""
    with contextlib.suppress(OSError):  # if memory runs out between two looks, the kernel should end the contestant, not us
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000", encoding="utf-8")
    started, turn, problem = time.monotonic(), 0, None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        look()
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            outcome.peak_bytes = max(outcome.peak_bytes, usage.ru_maxrss * 1024)
            outcome.cpu_seconds = round(usage.ru_utime + usage.ru_stime, 2)
            return problem
        turn += 1
        if turn % 10 == 0 and problem is None:
            outcome.peak_bytes = max(outcome.peak_bytes, high_water(process.pid))
            if free_bytes() < LEAST_FREE_BYTES:
                problem = f"out of memory: ended at {outcome.peak_bytes / 1e9:.1f} GB"
            elif time.monotonic() - started > limit_seconds:
                problem = f"out of time: ended after {limit_seconds:.0f} s"
            if problem:
                process.kill()
        time.sleep(POLL_SECONDS)


def note_arrivals(metrics: Path, seen: dict[int, float]) -> None:
    """When each step's row came into Burnish's metrics file: the wall clock, with whatever happens between steps in it."""
    for row in read_lines(metrics):
        if "loss" in row:
            seen.setdefault(row["step"], time.time())


def burnish_events(metrics: Path, outcome: Outcome, begun: float, case: dict[str, Any], seen: dict[int, float]) -> None:
    """Steps from metrics.jsonl. Its token counts must be those of the batches that everyone is given; else this is not the same work."""
    rows = [row for row in read_lines(metrics) if "loss" in row]
    before = {"tokens": 0, "target_tokens": 0, "seconds": 0.0}
    for row in rows:
        batch = case["batches"][row["step"] - 1]
        expected = sum(len(case["train"][index]["input_ids"]) for index in batch)
        if outcome.problem is None and row["tokens"] - before["tokens"] != expected:
            outcome.problem = (
                f"step {row['step']}: Burnish trained on {row['tokens'] - before['tokens']} tokens, the case's batch has {expected}"
            )
        if row["loss"] is None:
            outcome.problem = f"step {row['step']}: the loss was not finite"
            return
        at = seen.get(row["step"], begun)
        last = seen.get(row["step"] - 1)
        own = row["seconds"] - before["seconds"]
        outcome.steps.append({"loss": row["loss"], "seconds": round(own if last is None else at - last, 3), "own_seconds": round(own, 3),
                              "tokens": expected, "examples": len(batch)})  # fmt: skip
        before = row
    if rows:
        outcome.first_step_done = round(seen[1] - begun, 2)
        outcome.first_step_begins = round(outcome.first_step_done - rows[0]["seconds"], 2)
    status = metrics.parent.parent / "run.json"
    if status.exists():
        outcome.versions = json.loads(status.read_text(encoding="utf-8")).get("versions", {})


def script_events(events: Path, outcome: Outcome, begun: float, case: dict[str, Any], seen: dict[int, float]) -> None:
    """Steps from what recorder.py wrote."""
    last = 0.0
    for event in read_lines(events):
        if "training" in event:
            last = event["training"]
            outcome.first_step_begins = round(last - begun, 2)
        elif "step" in event:
            batch = case["batches"][event["step"] - 1] if "tokens" not in event else []
            tokens = event.get("tokens", sum(len(case["train"][index]["input_ids"]) for index in batch))
            outcome.steps.append({"loss": event["loss"], "seconds": round(event["at"] - last, 3), "tokens": tokens,
                                  "examples": event.get("examples", len(batch))})  # fmt: skip
            if event["step"] == 1:
                outcome.first_step_done = round(event["at"] - begun, 2)
            last = event["at"]
        else:
            outcome.adapter, outcome.versions, outcome.threads = event["adapter"], event["versions"], event["threads"]


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file that may still be written, or may not be there yet."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.rpartition("\n")[0].splitlines():
        if line.strip():
            yield json.loads(line)


def warm_up_files(case: dict[str, Any]) -> None:
    """Read the weights once, so that nobody is the one who waits for the disk."""
    for file in Path(case["model"]).glob("*.safetensors"):
        with file.open("rb") as weights:
            while weights.read(1 << 24):
                pass


def busy_seconds() -> float:
    """Seconds that all cores together were not idle, since the machine started; time that its host took away counts as busy."""
    fields = [int(number) for number in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]  # idle, iowait
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


def high_water(pid: int) -> int:
    """VmHWM of a process, bytes; 0 once it is gone."""
    return _kilobytes(f"/proc/{pid}/status", "VmHWM:") * 1024


def free_bytes() -> int:
    return _kilobytes("/proc/meminfo", "MemAvailable:") * 1024


def _kilobytes(file: str, name: str) -> int:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
