"""Several processes: the same training up to rounding; a change of their number is told; one that dies or hangs ends all (F18, F33)."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Reference, events, forked, log_of, outcome, reference
from safetensors.torch import load_file

from burnish.cli.steps import _without
from burnish.errors import TrainingError
from burnish.training.launch import launch

# A worker without torch: it beats once a step, as a training does, and does what FAULT says in its third step, if it is the last rank.
WORKER = """
import os, signal, sys, time
open(sys.argv[2], "a").write(f"{os.getpid()}\\n")
beat, rank, size = int(os.environ["BURNISH_BEAT"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
while len(open(sys.argv[2]).readlines()) < size:  # all are there before any has its fault
    os.write(beat, b".")
    time.sleep(0.005)
fault = sys.argv[1]
for step in range(200 if fault == "none" else 10**9):
    os.write(beat, b"s")
    if step == 3 and rank == size - 1:
        if fault == "hang": os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "die": os.kill(os.getpid(), signal.SIGKILL)
        if fault == "fail": sys.exit(2)
    time.sleep(0.6 if fault == "slow" else 0.005)
    if told and fault == "deaf": continue
    if told and fault == "slow": time.sleep(0.6)
    if told: sys.exit(143)
"""


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Without dropout: its random numbers belong to a rank."""
    return reference(tiny_folder, tmp_path_factory.mktemp("processes"), checkpoint_steps=4, sections={"lora": {"dropout": 0.0}})


def losses(rows: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [row[key] for row in rows if key in row]


def test_two_processes_train_what_one_does(whole: Reference, tmp_path: Path) -> None:
    """1 × 4 = 2 processes × 2, up to rounding: losses, gradient norms, validation losses, counts, weights."""
    run = whole.copy(tmp_path / "run")
    forked().start("train", run, recipe=whole.recipe, processes=2)
    assert forked().wait() == [0, 0], log_of(run)
    rows, _ = outcome(run)
    for key in ("loss", "gradient_norm", "validation_loss"):
        assert losses(rows, key) == pytest.approx(losses(whole.rows, key), rel=2e-4, abs=2e-5), key
    for key in ("step", "tokens", "target_tokens", "epoch", "learning_rate"):
        assert losses(rows, key) == losses(whole.rows, key), key
    assert json.loads((run / "training" / "summary.json").read_text())["processes"] == 2
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    theirs = load_file(whole.prepared.parent / "whole" / "adapter" / "adapter_model.safetensors")
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 0.01 * float(tensor.norm()), name


def test_two_processes_go_on_exactly(whole: Reference, tmp_path: Path) -> None:
    """Killed and gone on with, with the same two processes: bit for bit what two processes compute undisturbed."""
    undisturbed, run = whole.copy(tmp_path / "undisturbed"), whole.copy(tmp_path / "run")
    forked().start("train", undisturbed, recipe=whole.recipe, processes=2)
    assert forked().wait() == [0, 0]
    forked().start("train", run, recipe=whole.recipe, processes=2, at_step=[7, "TERM"])
    assert forked().wait() == [143, 143], log_of(run)
    forked().start("train", run, recipe=whole.recipe, processes=2)
    assert forked().wait() == [0, 0], log_of(run)
    assert outcome(run) == outcome(undisturbed)


def test_another_number_of_processes_goes_on_and_says_so(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[7, "TERM"]) == 143
    forked().start("train", run, recipe=whole.recipe, processes=2)
    assert forked().wait() == [0, 0], log_of(run)
    (event,) = events(run, "conditions_changed")
    assert event["changed"] == {"world_size": [1, 2]}
    assert event["bit_exact"] is False
    rows, _ = outcome(run)
    assert losses(rows)[:7] == losses(whole.rows)[:7]
    assert losses(rows) == pytest.approx(losses(whole.rows), rel=2e-4)
    assert losses(rows, "tokens") == losses(whole.rows, "tokens"), "the same examples, each once"


def test_fewer_processes_go_on_and_say_so(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    forked().start("train", run, recipe=whole.recipe, processes=2, at_step=[7, "TERM"])
    assert forked().wait() == [143, 143], log_of(run)
    assert forked().run("train", run, recipe=whole.recipe) == 0, log_of(run)
    (event,) = events(run, "conditions_changed")
    assert (event["changed"], event["bit_exact"]) == ({"world_size": [2, 1]}, False)
    rows, _ = outcome(run)
    assert losses(rows) == pytest.approx(losses(whole.rows), rel=2e-4)
    assert losses(rows, "tokens") == losses(whole.rows, "tokens"), "the same examples, each once"


def test_the_others_leave_where_there_is_nothing_to_do(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe) == 0
    forked().start("train", run, recipe=whole.recipe, processes=2)
    assert forked().wait() == [0, 0], log_of(run)


# ------------------------------------------------------------------------------------------------------------------ the launcher


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return [sys.executable, "-S", str(file)]


def launched(worker: list[str], fault: str, processes: int, **named: Any) -> int:
    """`launch`; afterwards none of its processes is left."""
    pids = Path(worker[-1] + ".pids")
    pids.unlink(missing_ok=True)
    try:
        return launch([*worker, fault, str(pids)], processes, **named)
    finally:
        found = [int(line) for line in pids.read_text().split()]
        assert len(found) == processes
        for pid in found:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_the_launcher_waits_for_all(worker: list[str]) -> None:
    assert launched(worker, "none", 3) == 0


def test_a_process_that_hangs_ends_all(worker: list[str]) -> None:
    with pytest.raises(TrainingError, match=r"hanging: process 2 \(halted by a signal\) of 3.*the same command goes on") as caught:
        launched(worker, "hang", 3, least_seconds=0.5)
    assert caught.value.code == "hanging"


def test_how_long_is_too_long() -> None:
    """Ten median steps, where that is longer than the least; half an hour until the first sign of life."""
    from burnish.training import launch as module

    def silent_for(seconds: float, *, steps: list[float], begun: bool = True) -> list[Any]:
        child: Any = type("Child", (), {"pid": os.getpid()})
        return [module._Process(0, child, -1, time.monotonic() - seconds, begun=begun, steps=steps)]

    module._refuse_hanging(silent_for(59, steps=[1.0]), 60)
    module._refuse_hanging(silent_for(99, steps=[10.0, 10.0, 500.0]), 60)
    module._refuse_hanging(silent_for(1700, steps=[], begun=False), 60)
    for seconds, steps, begun in ((61, [1.0], True), (101, [10.0, 10.0, 500.0], True), (1801, [], False)):
        with pytest.raises(TrainingError, match="hanging: process 0 of 1"):
            module._refuse_hanging(silent_for(seconds, steps=steps, begun=begun), 60)


def test_a_process_that_dies_or_fails_ends_all(worker: list[str]) -> None:
    assert launched(worker, "die", 3) == 128 + signal.SIGKILL
    assert launched(worker, "fail", 3) == 2


def test_a_stop_reaches_all(worker: list[str]) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert launched(worker, "forever", 2) == 143


def test_a_stop_waits_for_the_step_under_way_and_not_for_ever(worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace is for saving; a step that takes longer than that is finished, too. Who does not listen is killed."""
    monkeypatch.setattr("burnish.training.launch._GRACE_SECONDS", 0.2)
    for fault, code in (("slow", 143), ("deaf", 128 + signal.SIGKILL)):
        timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert launched(worker, fault, 2) == code


def test_the_command_of_a_process_does_not_launch_again() -> None:
    assert _without(["train", "r.yaml", "--processes", "2", "--fresh"], "--processes") == ["train", "r.yaml", "--fresh"]
    assert _without(["train", "--processes=2", "r.yaml"], "--processes") == ["train", "r.yaml"]


@pytest.mark.long
def test_a_training_whose_process_hangs_is_ended_and_goes_on(whole: Reference, tmp_path: Path) -> None:
    """The whole way: `burnish train --processes 2`, a rank halted by SIGSTOP, the group killed, the same command again."""
    run = whole.copy(tmp_path / "run")
    command = [sys.executable, "-m", "burnish", "train", str(run)]
    found: list[int] = []

    def halt() -> None:
        """Once a checkpoint is there, stop the process of rank 1."""
        while not list((run / "checkpoints").glob("step-00000004")):
            time.sleep(0.02)
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"train\0{run}" in (path.parent / "cmdline").read_text() and "RANK=1" in path.read_text().split("\0"):
                    found.append(int(path.parent.name))
                    os.kill(found[0], signal.SIGSTOP)
            except (OSError, UnicodeDecodeError):
                continue

    thread = threading.Thread(target=halt)
    thread.start()
    # The least is long enough for a slow machine's checkpoint, short enough not to wait.
    with pytest.raises(TrainingError, match="hanging"):
        launch(command, 2, least_seconds=15)
    thread.join()
    assert found
    assert launch(command, 2) == 0
    rows, _ = outcome(run)
    assert losses(rows) == pytest.approx(losses(whole.rows), rel=2e-4)
    assert events(run, "resumed")


@pytest.mark.long
def test_torchrun_starts_it_too(whole: Reference, tmp_path: Path) -> None:
    import subprocess

    run = whole.copy(tmp_path / "run")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "burnish", "train", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, _ = outcome(run)
    assert losses(rows) == pytest.approx(losses(whole.rows), rel=2e-4)
