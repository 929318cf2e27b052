"""Somebody asks to stop: the step is finished, everything is saved, and the training goes on exactly (F13, F14, F16, F17)."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Reference, events, finish, forked, kill_after, log_of, outcome, reference

from burnish.run import Run
from burnish.training.checkpoint import read_checkpoint
from burnish.training.interrupt import asked_to_stop


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tiny_folder, tmp_path_factory.mktemp("signals"))


def test_sigterm_saves_and_leaves_with_143(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[8, "TERM"]) == 143
    status = json.loads((run / "run.json").read_text())["steps"]["train"]
    assert status["state"] == "stopped"
    assert "stopped after step 8 of" in status["error"]
    assert events(run, "step_stopped")
    finish(run, whole)
    assert [event["at_step"] for event in events(run, "resumed")] == [8]
    summary = json.loads((run / "training" / "summary.json").read_text())
    assert summary["resumed_at_steps"] == [8]


def test_five_pauses_change_nothing(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    for step in (1, 4, 5, 11, 17):
        assert forked().run("train", run, recipe=whole.recipe, at_step=[step, "TERM"]) == 143, log_of(run)
    finish(run, whole)
    assert json.loads((run / "run.json").read_text())["steps"]["train"]["resumes"] == [1, 4, 5, 11, 17]


def race(times: int, whole: Reference, tmp_path: Path) -> None:
    """SIGTERM at fsyncs of saves, at whichever: the save is finished or discarded whole; what is left is a usable model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chosen = random.Random(times)
    base = AutoModelForCausalLM.from_pretrained(whole.recipe["model"]["name"])
    for number in range(times):
        run = whole.copy(tmp_path / f"run-{number}")
        at = 1 + round((number + chosen.random()) / times * 140)
        code = forked().run("train", run, recipe=whole.recipe, fsync=[at, "TERM"])
        if code == 143 and (run / "adapter").exists():
            model = PeftModel.from_pretrained(base, str(run / "adapter"))
            assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
            base = model.unload()
        if code != 0:
            finish(run, whole)
        assert outcome(run) == (whole.rows, whole.adapter)


@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.long)])
def test_stopped_at_random_moments(times: int, whole: Reference, tmp_path: Path) -> None:
    """Spot instances give no choice of the moment. Before the first step there is nothing to save: the process just ends."""
    moments, saved = random.Random(times), 0
    for number in range(4 * times):  # more than `times` only where the machine has become much slower or quicker than it was for `whole`
        if number >= times and saved >= times // 4:
            break
        run = whole.copy(tmp_path / f"run-{number}")
        code = kill_after(whole.seconds * (number % times + moments.random()) / times, run, whole, signal.SIGTERM)
        saved += code == 143
        if code == 143:
            assert events(run, "step_stopped")
        finish(run, whole)
    assert saved >= times // 4


def test_a_slow_save_is_finished(whole: Reference, tmp_path: Path) -> None:
    """SIGTERM at the first file of a checkpoint, on a disk that takes a tenth of a second for each fsync."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, fsync=[60, "slow-TERM"]) == 143, log_of(run)
    (event,) = events(run, "step_stopped")
    assert "saved in" in event["error"]
    (step,) = [int(found) for found in re.findall(r"stopped after step (\d+) of", event["error"])]
    read_checkpoint(run / "checkpoints" / f"step-{step:08d}")
    finish(run, whole)
    assert [event["at_step"] for event in events(run, "resumed")] == [step], "no step is done twice"


def test_stopped_in_the_middle_of_a_save(whole: Reference, tmp_path: Path) -> None:
    race(8, whole, tmp_path)


@pytest.mark.long
def test_stopped_in_the_middle_of_two_hundred_saves(whole: Reference, tmp_path: Path) -> None:
    race(200, whole, tmp_path)


def test_a_second_sigterm_ends_it_now(whole: Reference, tmp_path: Path) -> None:
    """In the middle of a checkpoint: nothing is waited for, and what was there before serves."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, fsync=[60, "TERM-TERM"]) == 143
    assert not events(run, "step_stopped"), "there was no time to write anything"
    finish(run, whole)


def test_the_command_saves_on_ctrl_c_and_prints_how_to_go_on(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    arguments = ["train", str(run), "--run", str(run)]
    assert forked().run("cli", run, arguments=arguments, at_step=[9, "INT"]) == 130
    text = log_of(run)
    assert "stopped after step 9 of" in text
    assert "saved in" in text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "go on with:" in line]
    command = shlex.split(line.partition("go on with:")[2])
    assert command == ["burnish", *arguments]
    assert forked().run("cli", run, arguments=command[1:]) == 0, log_of(run)
    assert outcome(run) == (whole.rows, whole.adapter)
    assert [event["at_step"] for event in events(run, "resumed")] == [9]


@pytest.mark.long
def test_ctrl_c_in_a_terminal(whole: Reference, tmp_path: Path) -> None:
    """The key itself, in a terminal of its own, with the progress bars that are shown there."""
    run = whole.copy(tmp_path / "run")
    arguments = [sys.executable, "-m", "burnish", "train", str(run), "--run", str(run)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, arguments, {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"})
    text = ""
    while not (run / "checkpoints" / "step-00000003").exists():
        part = _read(terminal)
        text += part
        assert part, text
    os.write(terminal, b"\x03")
    while part := _read(terminal):
        text += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, text
    (line,) = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).splitlines() if "go on with:" in line]
    assert shlex.split(line.partition("go on with:")[2])[1:] == arguments[3:]
    assert "Traceback" not in text
    finish(run, whole)


def _read(terminal: int) -> str:
    """What the terminal shows; nothing at its end."""
    try:
        return os.read(terminal, 65536).decode(errors="replace") if select.select([terminal], [], [], 0.05)[0] else " "
    except OSError:  # Linux: the other side was closed
        return ""


def test_the_command_to_go_on_does_not_delete_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.cli import _again

    monkeypatch.setattr(sys, "argv", ["burnish", "train", "my recipe.yaml", "--fresh"])
    assert _again() == "burnish train 'my recipe.yaml'"


def test_stopping_leaves_the_best_adapter_so_far(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[13, "TERM"]) == 143
    losses = {row["step"]: row["validation_loss"] for row in Run(run).read_jsonl(Run(run).metrics_file) if "validation_loss" in row}
    manifest = json.loads((run / "adapter" / "burnish.json").read_text())
    assert manifest["step"] == min((step for step in losses if step), key=lambda step: losses[step])
    assert not (run / "training" / "summary.json").exists()


def test_handlers_are_put_back_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with asked_to_stop() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before
        assert stop() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    code = (
        "import signal, threading\nfrom burnish.training.interrupt import asked_to_stop\n"
        "def work():\n    with asked_to_stop() as stop: assert stop() is None\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\nassert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
