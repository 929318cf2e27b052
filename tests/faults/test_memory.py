"""Memory that really ends (`ulimit -v`): the step is split and done again, or refused with numbers, and the same command goes on (F12)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Reference, events, finish, forked, log_of, outcome, reference

from conftest import tiny_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")


@pytest.fixture(scope="module")
def whole(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A model whose activations are the greatest part of what a step takes: 4 rows of 400 tokens, 8,192 values wide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("wide")
    config = {**tiny_config("llama", len(tokenizer)).to_dict(), "intermediate_size": 8192}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [f"{n} red cat green dog blue house black tree white car yellow boat " for n in range(64)]
    data = [{"prompt": " ".join([word] * 9), "completion": "a long story"} for word in words]
    return reference(
        folder, tmp_path_factory.mktemp("memory"), data=data, sections={"lora": {"dropout": 0.0}}, max_steps=6, validations_per_epoch=1
    )  # fmt: skip


def test_a_step_that_no_longer_fits_is_split(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, memory=[3, 0.6], tell=True) == 0, log_of(run)
    (event,) = events(run, "out_of_memory")
    assert (event["at_once_before"], event["at_once"]) == (4, 2)
    assert event["at_step"] in (4, 5, 6)
    assert "out of memory" in log_of(run)
    rows, _ = outcome(run)
    losses, expected = [[row["loss"] for row in found if "loss" in row] for found in (rows, whole.rows)]
    assert losses[:3] == expected[:3]
    assert losses == pytest.approx(expected, rel=1e-3)


def test_a_proof_that_does_not_fit_is_told_and_done_again(whole: Reference, tmp_path: Path) -> None:
    """Memory that ends outside a step: an error with numbers, no traceback; what was trained is kept."""
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, memory=[6, -1.0]) == 1, log_of(run)
    text = log_of(run)
    assert "out_of_memory: " in text
    assert "GB were in use at the most" in text
    assert "the same command goes on from there" in text
    assert "Traceback" not in text
    finish(run, whole)


def test_one_example_that_does_not_fit_is_refused_with_numbers(whole: Reference, tmp_path: Path) -> None:
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, memory=[4, 0.0]) == 1, log_of(run)
    text = log_of(run)
    found = re.search(r"out_of_memory: step (\d+) does not fit with one example at a time \(the longest has", text)
    assert found, text
    step = int(found[1])
    assert 5 <= step <= 8, "a step or two may live on what an allocator has kept"
    assert "Lower data.max_length" in text
    assert "Traceback" not in text
    finish(run, whole)  # with more memory: as if nothing had been
    assert [event["at_step"] for event in events(run, "resumed")] == [(step - 1) // 3 * 3], "the last checkpoint, one every three steps"
