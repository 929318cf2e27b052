"""The exit code of a run that has a verdict and a gate on retention; what a person sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from test_report_retain import retention  # type: ignore[import-not-found]
from test_report_run import comparison, fabricate  # type: ignore[import-not-found]

from burnish.cli.retain import _numbers
from burnish.cli.steps import finish, gate_code
from burnish.errors import RecipeError


def gate(state: str) -> dict[str, Any]:
    return {"state": state, "sentence": f"{state}: 2 points may be lost"}


@pytest.mark.parametrize(
    ("verdict", "own", "repaired", "code"),
    [
        ("BETTER", None, None, 0),
        ("BETTER", "PASSED", None, 0),
        ("BETTER", "FAILED", None, 3),
        ("BETTER", "CAN'T TELL", None, 4),
        ("BETTER", "FAILED", "PASSED", 0),
        ("BETTER", "PASSED", "CAN'T TELL", 4),
        ("WORSE", "PASSED", None, 3),
        ("CAN'T TELL", "FAILED", None, 4),
    ],
)
def test_better_and_forgetful_does_not_pass(
    verdict: str, own: str | None, repaired: str | None, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate(tmp_path)
    run.write_json(run.comparison_file, comparison() | {"verdict": verdict, "batch_size": 32})
    content = retention(gate=own and gate(own), max_drop=0.02)
    content["repair"] |= {"gate": repaired and gate(repaired), "task_percent": True}
    run.write_json(run.retain_file, content)
    with pytest.raises(typer.Exit) as left:
        finish(run, False)
    assert left.value.exit_code == code
    printed = capsys.readouterr().out
    assert all(
        part in printed
        for part in ("Something was forgotten.", "general", "-20.0 points", "scale 0.5 (chosen)", "left out: kl", "no longer works")
    )
    state = repaired or own
    assert (state is None) or f"gate: {state}" in printed


def test_no_gate_is_no_code() -> None:
    assert gate_code(None) == 0


def test_scales_are_numbers() -> None:
    assert _numbers("0.25, 1.5") == (0.25, 1.5)
    with pytest.raises(RecipeError, match="numbers with commas"):
        _numbers("half")
