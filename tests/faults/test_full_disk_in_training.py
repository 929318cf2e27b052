"""A disk that fills up while a training runs: it goes on from memory, and what it computes is the same (F6)."""

from __future__ import annotations

import errno
import json
import os
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
