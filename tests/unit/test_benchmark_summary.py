"""The figures of benchmarks/train_speed.py, counted by hand on made-up runs; and what it reads from a run while it is still written."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("speed.summary")


def outcome(speed: Any, name: str, losses: list[float], seconds: list[float], *, number: int = 1, peak: int = 10**9) -> Any:
    steps = [{"loss": loss, "seconds": second, "tokens": 100, "examples": 8} for loss, second in zip(losses, seconds, strict=True)]
    return speed.Outcome(name, "plain", number, steps=steps, peak_bytes=peak, first_step_begins=3.0, first_step_done=9.0)


def test_ratios_leave_the_first_step_out_and_compare_the_same_steps_within_a_round(speed: Any) -> None:
    runs = {
        # Burnish: 50 s for the warm-up, then 1 s, 1 s, and a slow step 4 that TRL never did.
        ("plain", "burnish", 1): outcome(speed, "burnish", [2.0, 1.5, 1.0, 0.9], [50, 1, 1, 10], peak=2 * 10**9),
        ("plain", "burnish", 2): outcome(speed, "burnish", [2.0, 1.5, 1.0, 0.9], [50, 2, 2, 20], number=2),
        ("plain", "trl-fp32", 1): outcome(speed, "trl-fp32", [2.0, 1.5, 1.0], [9, 6, 6]),  # 6 × slower
        ("plain", "trl-fp32", 2): outcome(speed, "trl-fp32", [2.0, 1.5, 1.0], [9, 8, 8], number=2),  # 4 ×
        ("plain", "unsloth-fp32", 1): outcome(speed, "unsloth-fp32", [2.0, 1.5, 1.0], [9, 3, 3]),  # 3 ×
        ("plain", "plain-targets-fp32", 1): outcome(speed, "plain-targets-fp32", [2.0, 1.6, 1.0, 0.9], [9, 7, 7, 70]),
    }
    names = ["burnish", "trl-fp32", "unsloth-fp32", "plain-targets-fp32"]
    table = speed.summarise_case("plain", runs, names, {"burnish": 0.808, "plain-targets-fp32": 0.8})
    assert table["trl-fp32"]["burnish_is_faster"] == 5.0
    assert table["trl-fp32"]["tokens_per_second"] == pytest.approx((100 / 6 + 100 / 8) / 2, abs=0.01)
    result = speed.result_line({"plain": table}, runs)
    assert list(result)[:7] == [
        "burnish_tokens_per_second", "ratio_trl_plain", "ratio_fastest_peer_plain", "ratio_fastest_peer_prefix", "peak_memory_gb",
        "startup_seconds", "max_loss_difference",
    ]  # fmt: skip
    assert (result["ratio_trl_plain"], result["ratio_fastest_peer_plain"], result["fastest_peer_plain"]) == (5.0, 3.0, "unsloth-fp32")
    assert (result["peak_memory_gb"], result["startup_seconds"], result["ratio_fastest_peer_prefix"]) == (2.0, 9.0, None)
    assert result["max_loss_difference"] == pytest.approx(0.1 / 1.6, abs=1e-6)  # step 2; the held-out loss differs by 1 % only


def test_a_peer_that_failed_has_a_reason_and_no_speed(speed: Any) -> None:
    failed = speed.Outcome("unsloth-fp32", "plain", 1, problem="exit 1: no such wheel")
    runs = {("plain", "burnish", 1): outcome(speed, "burnish", [2.0, 1.5], [5, 1]), ("plain", "unsloth-fp32", 1): failed}
    table = speed.summarise_case("plain", runs, ["burnish", "unsloth-fp32"], {})
    assert table["unsloth-fp32"] == {"title": "Unsloth, float32, checkpointing off", "problem": "exit 1: no such wheel"}
    document = {
        "command": "c", "when": "w", "machine": speed.machine(), "absent": {}, "cases": {"plain": table},
        "result_json": json.dumps(speed.result_line({"plain": table}, runs)),
    }  # fmt: skip
    assert "no such wheel" in speed.markdown(document)


def test_batches_that_are_not_the_given_ones_are_a_problem(speed: Any, tmp_path: Path) -> None:
    launch = importlib.import_module("speed.launch")
    case = {"train": [{"input_ids": [1] * 4}, {"input_ids": [1] * 6}], "batches": [[0], [1]]}
    metrics = tmp_path / "training" / "metrics.jsonl"
    metrics.parent.mkdir()
    rows = [{"step": 1, "loss": 2.0, "tokens": 4, "seconds": 3.0}, {"step": 2, "loss": 1.0, "tokens": 10, "seconds": 5.0}]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo', encoding="utf-8")
    right = speed.Outcome("burnish", "plain", 1)
    launch.burnish_events(metrics, right, 100.0, case, {1: 107.0, 2: 109.5})
    assert (right.problem, right.first_step_begins, right.first_step_done) == (None, 4.0, 7.0)
    assert [(step["tokens"], step["seconds"]) for step in right.steps] == [(4, 3.0), (6, 2.5)]
    other = speed.Outcome("burnish", "plain", 1)
    launch.burnish_events(metrics, other, 100.0, case | {"batches": [[1], [0]]}, {1: 107.0, 2: 109.5})
    assert other.problem is not None
    assert "step 1" in other.problem


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_process_is_watched_to_its_end_with_its_peak_of_memory(speed: Any) -> None:
    # From a small process: Linux counts what the starting process held as the first memory of the one it starts.
    code = (
        "import os, subprocess, sys\nsys.path.insert(0, sys.argv[1])\nfrom speed import launch, summary\n"
        "process = subprocess.Popen([sys.executable, '-c', \"held = b'x' * 150_000_000\"], env=dict(os.environ))\n"
        "seen = launch.Outcome('burnish', 'plain', 1)\nprint(launch.watch(process, 60.0, seen, lambda: None), process.returncode, seen.peak_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True, check=True)
    problem, status, peak = done.stdout.split()
    assert (problem, status) == ("None", "0")
    assert 150_000_000 < int(peak) < 10**9
