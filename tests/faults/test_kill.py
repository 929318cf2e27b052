"""kill −9 at any moment: the training goes on from its last whole checkpoint and ends as if nothing had happened (F1, F2, F3)."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from forked import Reference, events, finish, forked, kill_after, log_of, reference

from burnish.run import hash_file


def may_trace() -> bool:
    """Some containers have strace and forbid it."""
    command = ["strace", "-q", "-o", os.devnull, "-e", "inject=getpid:error=EPERM:when=1", "true"]
    return shutil.which("strace") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(
    not may_trace(), reason="strace is not installed (apt install strace), or may not trace here: no faults can be injected at system calls"
)
CALLS = ("fsync", "rename", "renameat", "write", "openat")  # a machine need not have each: `?` in strace's rules


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tiny_folder, tmp_path_factory.mktemp("kill"))


@pytest.fixture(scope="module")
def short(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Six steps, a checkpoint every second: strace makes each system call slow."""
    return reference(tiny_folder, tmp_path_factory.mktemp("short"), max_steps=6, checkpoint_steps=2)


@pytest.mark.parametrize("times", [6, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments(times: int, whole: Reference, tmp_path: Path) -> None:
    moments = random.Random(times)
    resumed, killed, seconds = 0, 0, whole.seconds
    for number in range(3 * times):
        run = whole.copy(tmp_path / f"run-{number}")
        began = time.monotonic()
        if kill_after(seconds * (killed % times + moments.random()) / times, run, whole) == -signal.SIGKILL:
            killed += 1
        else:  # it was over sooner than the one before: the machine has less else to do
            seconds = min(seconds, time.monotonic() - began)
        finish(run, whole)
        resumed += bool(events(run, "resumed"))
        if killed == times:
            break
    assert killed == times, "so many moments lie within the training"
    assert resumed, "and some of them after a checkpoint"


def traced(kind: str, run: Path, expected: Reference, rule: str) -> int:
    """Do a job under strace; `rule` is its -e inject, or only which calls are written down. Returns the exit code."""
    trace = Path(str(run) + ".strace")
    (pid,) = forked().start(kind, run, recipe=expected.recipe, traced=True)
    with subprocess.Popen(["strace", "-f", "-q", "-o", str(trace), "-p", str(pid), "-e", rule], stderr=subprocess.DEVNULL) as tracer:
        code = forked().wait()[0]
        tracer.wait()
    return code


def count_calls(kind: str, expected: Reference, source: Path | None, folder: Path) -> dict[str, int]:
    """How often a job makes each call on files (sockets and pipes are not counted: a kill there is like one between two steps)."""
    run = folder / "counted"
    if source is not None:
        shutil.copytree(source, run)
    assert traced(kind, run, expected, f"trace={','.join('?' + call for call in CALLS)}") == 0, log_of(run)
    text = Path(str(run) + ".strace").read_text()
    # Of the thread that makes most of them: strace counts each thread for itself.
    by_thread = {call: Counter(re.findall(rf"^(\d+) +{call}\(", text, re.MULTILINE)) for call in CALLS}
    return {call: max(found.values(), default=0) for call, found in by_thread.items()}


def places(count: int, few: int) -> list[int]:
    """1 … count, or a few of them evenly spread."""
    return sorted({1 + round((index + 0.5) * (count - 1) / few) for index in range(few)}) if few < count else list(range(1, count + 1))


def sweep(error: str, few: dict[str, int], short: Reference, tmp_path: Path) -> None:
    counts = count_calls("train", short, short.prepared, tmp_path)
    assert counts["fsync"] > 20
    assert counts["rename"] + counts["renameat"] > 5
    for call in CALLS:
        for number in places(counts[call], few.get(call, 10**9)):
            run = short.copy(tmp_path / f"{call}-{number}")
            code = traced("train", run, short, f"inject=?{call}:{error}:when={number}")
            if error.startswith("signal"):
                assert code == -signal.SIGKILL, log_of(run)
            else:
                told = log_of(run)
                # 2: the bar that transformers draws while it reads weights could not be written, into a log on the full disk.
                assert code in (0, 1) or (code == 2 and "the weights cannot be read" in told), told
                assert code == 0 or "No space left on device" in told or call == "openat", told
            if code != 0:
                _no_torn_checkpoint(run, short)
                finish(run, short)
            shutil.rmtree(run)


def _no_torn_checkpoint(run: Path, short: Reference) -> None:
    """Every name that is there holds a whole checkpoint."""
    from burnish.training.checkpoint import read_checkpoint

    for path in (run / "checkpoints").glob("step-*"):
        read_checkpoint(path)


@needs_strace
def test_killed_at_a_write_of_a_checkpoint(short: Reference, tmp_path: Path) -> None:
    sweep("signal=KILL", {"fsync": 4, "rename": 3, "renameat": 1, "write": 1, "openat": 0}, short, tmp_path)


@needs_strace
@pytest.mark.long
def test_killed_at_every_write_fsync_and_rename(short: Reference, tmp_path: Path) -> None:
    sweep("signal=KILL", {"openat": 40}, short, tmp_path)


@needs_strace
def test_a_full_disk_at_a_write_of_a_checkpoint(short: Reference, tmp_path: Path) -> None:
    sweep("error=ENOSPC", {"fsync": 3, "rename": 2, "renameat": 1, "write": 1, "openat": 0}, short, tmp_path)


@needs_strace
@pytest.mark.long
def test_a_full_disk_at_every_write_fsync_and_rename(short: Reference, tmp_path: Path) -> None:
    sweep("error=ENOSPC", {"openat": 0}, short, tmp_path)


def prepare_sweep(few: dict[str, int], short: Reference, tmp_path: Path) -> None:
    """F3: after any kill the data are there whole or not at all, and preparing again gives the same files."""
    wanted = {path.name: hash_file(path) for path in (short.prepared / "data").glob("*")}
    counts = count_calls("prepare", short, None, tmp_path)
    for call in CALLS[:-1]:
        for number in places(counts[call], few.get(call, 10**9)):
            run = tmp_path / f"{call}-{number}"
            assert traced("prepare", run, short, f"inject=?{call}:signal=KILL:when={number}") == -signal.SIGKILL
            for path in (run / "data").glob("*.jsonl"):
                assert hash_file(path) == wanted[path.name]
            assert forked().run("prepare", run, recipe=short.recipe) == 0, log_of(run)
            assert {path.name: hash_file(path) for path in (run / "data").glob("[!.]*")} == wanted
            assert json.loads((run / "run.json").read_text())["steps"]["prepare"]["state"] == "done"
            shutil.rmtree(run)


def test_what_was_being_written_is_swept_and_nothing_else(short: Reference, tmp_path: Path) -> None:
    """A run that was killed before it had a recipe, and one that died in the middle of files: begun, or gone on with. Others' files stay."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".recipe.yaml.abcd1234.tmp").write_text("torn")
    (run / "lock").touch()
    assert forked().run("prepare", run, recipe=short.recipe) == 0, log_of(run)
    assert not (run / ".recipe.yaml.abcd1234.tmp").exists()
    left = [run / ".run.json.00000000.tmp", run / "data" / ".train.jsonl.k3j_9zzz.tmp", run / ".adapter.x8x8x8x8.tmp" / "weights"]
    left[2].parent.mkdir()
    kept = [run / "mine.tmp", run / ".mine.tmp"]
    for path in (*left, *kept):
        path.write_text("x")
    assert forked().run("prepare", run, recipe=short.recipe) == 0, log_of(run)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("mine")
    assert forked().run("prepare", other, recipe=short.recipe) == 2
    assert "is not empty and not a run" in log_of(other)
    assert (other / "thesis.doc").exists()


@needs_strace
def test_killed_while_preparing(short: Reference, tmp_path: Path) -> None:
    prepare_sweep({"fsync": 3, "rename": 3, "write": 1}, short, tmp_path)


@needs_strace
@pytest.mark.long
def test_killed_at_every_write_while_preparing(short: Reference, tmp_path: Path) -> None:
    prepare_sweep({}, short, tmp_path)


@needs_strace
def test_a_name_appears_only_after_what_it_holds_is_on_the_disk(short: Reference, tmp_path: Path) -> None:
    """Power loss differs from a kill: every file of a checkpoint is fsynced before its rename, and the folder above after it."""
    run = short.copy(tmp_path / "run")
    assert traced("train", run, short, "trace=openat,fsync,?rename,?renameat,?renameat2") == 0
    opened: dict[str, str] = {}
    created: set[str] = set()
    synced: set[str] = set()
    renamed = 0
    waiting: str | None = None
    for line in Path(str(run) + ".strace").read_text().splitlines():
        if found := re.search(r'openat\([^,]+, "([^"]+)".*\) = (\d+)', line):
            opened[found[2]] = found[1]
            created |= {found[1]} if "O_CREAT" in line else set()
        elif found := re.search(r"fsync\((\d+)\) += 0", line):
            synced.add(opened.get(found[1], "?"))
            if waiting is not None and opened.get(found[1]) == waiting:
                waiting = None
        elif found := re.search(r'rename\w*\((?:AT_FDCWD, )?"([^"]+)", (?:AT_FDCWD, )?"([^"]+)".*\) = 0', line):
            if "/checkpoints/" not in found[2] or found[2].endswith(".old"):
                continue
            if Path(found[2]).parent.name != "checkpoints":  # safetensors names its file so, in the folder that is being filled
                created = {found[2] if path == found[1] else path for path in created}
                continue
            assert waiting is None, f"{waiting} was not fsynced after its last rename"
            assert found[1] in synced, f"{found[1]} was renamed before its own fsync"
            files = {path for path in created if path.startswith(found[1] + "/")}
            assert len(files) >= 3
            files -= {path for path in files if path.endswith("/README.md")}  # PEFT's empty card is removed again
            assert files <= synced, sorted(files - synced)
            waiting = str(Path(found[2]).parent)
            renamed += 1
    assert renamed >= 5
    assert waiting is None
