"""A disk that is full: whatever write fails, no later step takes a half-written thing for whole, and the error says what to do."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish import pipeline
from burnish.errors import BurnishError, TrainingError
from burnish.recipe import build_recipe
from burnish.run import Run, append_line, read_lines, write_folder, write_whole
from conftest import colour_rows


def fail_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> dict[str, int]:
    """os.fsync raises ENOSPC from the given call on: the place where a full disk shows at the latest."""
    count = {"n": 0}
    real = os.fsync

    def fsync(handle: int) -> None:
        count["n"] += 1
        if count["n"] > calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return count


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    fail_after(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"cannot write .*a\.json: No space left on device"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with write_folder(tmp_path / "adapter") as aside:
        (aside / "weights").write_bytes(b"old")
    fail_after(monkeypatch, 1)

    def rewrite() -> None:
        with write_folder(tmp_path / "adapter") as aside:
            (aside / "weights").write_bytes(b"new")
            (aside / "more").write_bytes(b"new")

    with pytest.raises(TrainingError, match="No space left"):
        rewrite()
    assert (tmp_path / "adapter" / "weights").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "tor')
    assert list(read_lines(path)) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert list(read_lines(path)) == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("calls", [0, 1, 2, 5, 8, 12, 16, 20, 30, 45])
def test_the_run_survives_a_full_disk_at_any_write(calls: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail from the n-th fsync on; then free the disk and run again: the result is whole."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(120)))
    content: dict[str, Any] = {
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "data": {"train": str(data), "test_fraction": 0.2, "validation_fraction": 0.15, "overlap_ngram": 0},
        "task": {"metric": "exact_match"},
        "training": {"epochs": 1, "learning_rate": 0.01},
        "evaluation": {"candidates": ["base", "tuned"], "selection_rows": 4, "resamples": 200, "max_new_tokens": 4},
    }
    recipe = build_recipe(content)
    with monkeypatch.context() as patch:
        count = fail_after(patch, calls)
        told = ""
        try:
            pipeline.run_recipe(recipe, folder=tmp_path / "run")
        except BurnishError as problem:
            told = str(problem)
    assert ("No space left" in told) == (count["n"] > calls)
    run = Run(tmp_path / "run")
    for path in run.path.rglob("*.json"):
        json.loads(path.read_text())
    assert not [p for p in run.path.rglob("*") if ".tmp" in p.name]
    done = pipeline.run_recipe(recipe, folder=run.path)
    assert done.read_json(done.comparison_file)["verdict"]
    assert len(done.read_json(done.comparison_file)["rows_detail"]) == len(pipeline.dataset_of(done).test)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_command_tells_a_full_disk_in_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    """A file-size limit makes the kernel itself refuse the write."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(200)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_folder}\ndata: {data}\n")
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        f"sys.argv = ['burnish', 'prepare', {str(recipe)!r}, '--run', {str(tmp_path / 'run')!r}]\nfrom burnish.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "data" / "train.jsonl").exists()
