"""A disk that fills up while a training runs: it goes on from memory, and what it computes is the same (F6)."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Reference, events, finish, forked, log_of, outcome, reference


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tiny_folder, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("at", [25, 60, 100])
def test_one_write_that_fails_is_told_and_tried_again(at: int, whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, fsync=[at, "full"], tell=True) == 0, log_of(run)
    assert outcome(run) == (whole.rows, whole.adapter)


@pytest.mark.parametrize("at", [45, 60, 100])
def test_a_disk_that_stays_full_keeps_what_is_there(at: int, whole: Reference, tmp_path: Path) -> None:
    """Trained to the end from memory; then the adapter cannot be written. With room again, the same command ends it, exactly."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, fsync=[at, "full+"], tell=True) == 1
    text = log_of(run)
    assert "No space left on device" in text
    assert "Training goes on" in text
    last = [row["step"] for row in whole.rows if "loss" in row][-1]
    assert f"training {last} {last}" in text, "it trained to the end"
    assert events(run, "checkpoint_not_written")
    assert list((run / "checkpoints").glob("step-*")), "what was whole is kept"
    finish(run, whole)


def test_the_first_checkpoint_must_be_written(whole: Reference, tmp_path: Path) -> None:
    """A disk that is full from the start is told before anything is computed."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, fsync=[7, "full+"], tell=True) == 1
    assert "training 1 " not in log_of(run)
    finish(run, whole)


def test_the_code_says_which_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.errors import TrainingError
    from burnish.run import write_whole

    for number, code in ((errno.ENOSPC, "insufficient_storage"), (errno.EDQUOT, "insufficient_storage"), (errno.EROFS, "unwritable")):

        def fsync(handle: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(TrainingError) as caught:
            write_whole(tmp_path / "a", b"x")
        assert caught.value.code == code


def test_rows_wait_in_memory_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from burnish.errors import TrainingError
    from burnish.training import metrics as module

    metrics = module.Metrics(tmp_path / "metrics.jsonl")
    metrics.log({"step": 1, "loss": 1.0})
    real = module.append_line

    def full(path: Path, row: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(row)[:9])  # a part of the line was written before the disk was full
        raise TrainingError("No space left on device", code="insufficient_storage")

    monkeypatch.setattr(module, "append_line", full)
    metrics.log({"step": 2, "loss": 2.0})
    metrics.log({"step": 2, "validation_loss": 9.0})
    with pytest.raises(TrainingError):
        metrics.flush()
    monkeypatch.setattr(module, "append_line", real)
    metrics.log({"step": 3, "loss": 3.0})
    metrics.flush()
    found = [row.get("loss", row.get("validation_loss")) for row in module.read_lines(metrics.path)]
    assert found == [1.0, 2.0, 9.0, 3.0]
    assert metrics.rewind(2, 1) == 0
    assert len(list(module.read_lines(metrics.path))) == 3
    assert metrics.rewind(2, 0) == 0
    assert metrics.rewind(5, 1) == 4, "rows that are missing are counted"


def test_an_older_checkpoint_makes_room_for_the_next(whole: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk holds two checkpoints and no third: the older one goes, the newest whole one stays until the next is there."""
    from burnish.run import Run
    from burnish.training import checkpoint

    run = Run(whole.copy(tmp_path / "run"))
    kept: list[list[str]] = []

    def usage(folder: Path) -> Any:
        steps = sorted(path.name for path in Path(folder).glob("step-*"))
        kept.append(steps)
        return real(folder)._replace(free=10**9 if len(steps) < 2 else 0)

    real = checkpoint.shutil.disk_usage
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    from burnish import pipeline

    pipeline.train(run)
    rows, _ = outcome(run.path)
    assert [row["step"] for row in rows if "loss" in row] == [row["step"] for row in whole.rows if "loss" in row]
    assert not events(run.path, "checkpoint_not_written")
    full = [index for index, steps in enumerate(kept) if len(steps) == 2]
    assert full
    assert all(kept[index + 1] == kept[index][1:] for index in full), "tried again at once, with the newest still there"


def may_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not may_mount(), reason="no small file system can be mounted here (unshare -rm, tmpfs)")
def test_a_small_disk_that_is_really_full(whole: Reference, tmp_path: Path) -> None:
    """A tmpfs that another file fills while the training runs: it ends with a plain sentence; with room again, the same command ends it, exactly."""
    disk = tmp_path / "disk"
    disk.mkdir()
    run = disk / "run"
    train = f"{shlex.quote(sys.executable)} -m burnish train {shlex.quote(str(run))} --run {shlex.quote(str(run))}"
    (tmp_path / "watch.sh").write_text(
        f"""mount -t tmpfs -o size=6m none {disk} && cp -r {whole.prepared} {run} || exit 90
        (while [ ! -e {run}/checkpoints/step-00000006 ]; do sleep 0.01; done; dd if=/dev/zero of={disk}/ballast bs=4k 2>/dev/null) &
        {train}; code=$?
        wait
        ls {run}/checkpoints > {tmp_path}/listed
        [ $code = 1 ] || exit 91
        rm {disk}/ballast
        {train} || exit 92
        cp -r {run} {tmp_path}/run
        """
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", str(tmp_path / "watch.sh")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step-" in (tmp_path / "listed").read_text(), "what was whole is kept"
    assert outcome(tmp_path / "run") == (whole.rows, whole.adapter)
    assert events(tmp_path / "run", "resumed")
