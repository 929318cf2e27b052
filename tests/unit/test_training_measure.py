"""What a training costs: memory counted by hand, steps timed by an injected clock, and nothing changed by it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import pipeline
from burnish.models import METHODS, load_chat
from burnish.recipe import Recipe, build_recipe
from burnish.run import Run
from burnish.training import StepTimes, time_steps
from burnish.training.measure import count_validations, mean_step, spread_out, straightness
from conftest import colour_rows

LAYERS, HIDDEN, KEYS, INNER, RANK = 3, 32, 16, 64, 4
# Pairs (in, out) of a layer's linear modules: q, k, v, o, gate, up, down. LoRA's A is (rank, in), its B (out, rank).
SHAPES = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN), (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]
ADAPTER_NUMBERS = LAYERS * sum(RANK * (a + b) for a, b in SHAPES)


def ticking(step: float = 1.0) -> Callable[[], float]:
    """A clock that goes on by one unit each time it is read."""
    counter = itertools.count()
    return lambda: next(counter) * step


def prepared(tiny_folder: Path, tmp_path: Path, **changes: Any) -> tuple[Run, Recipe]:
    data = tmp_path / "rows.jsonl"
    data.parent.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(160)))
    training = {"micro_batch_size": 4, "epochs": 2, "learning_rate": 1e-3, **changes.pop("training", {})}
    dtype = changes.pop("dtype", "float32")
    content = {
        "model": {"name": str(tiny_folder), "dtype": dtype},
        "data": str(data),
        "training": training,
        "lora": {"rank": RANK},
        **changes,
    }
    job = Run.create(tmp_path / "run", build_recipe(content))
    pipeline.prepare(job)
    return job, job.recipe()


def measured(job: Run, recipe: Recipe, **options: Any) -> StepTimes:
    return time_steps(pipeline.dataset_of(job), load_chat(recipe.model), recipe, **options)


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 4), ("bfloat16", 2)])
def test_memory_is_that_of_a_hand_count(tiny_folder: Path, tmp_path: Path, tokenizer: Any, dtype: str, bytes_each: int) -> None:
    job, recipe = prepared(tiny_folder, tmp_path, dtype=dtype)
    memory = measured(job, recipe, clock=ticking()).memory
    norms = HIDDEN * (2 * LAYERS + 1)
    base = len(tokenizer) * HIDDEN + LAYERS * sum(a * b for a, b in SHAPES) + norms  # the head is the embedding
    rotary = 2 * 4 * 4  # frequencies of 8-wide heads, twice, always float32
    assert memory.weights == base * bytes_each + rotary
    assert memory.adapter == ADAPTER_NUMBERS * bytes_each
    assert memory.gradients == ADAPTER_NUMBERS * 4
    masters = 0 if dtype == "float32" else 4  # a float32 weight is its own master
    assert memory.optimizer == ADAPTER_NUMBERS * (masters + 8)
    parts = memory.to_dict()
    assert parts["total"] == sum(v for k, v in parts.items() if k not in ("total", "largest_tokens"))
    assert memory.activations > memory.largest_tokens * LAYERS * HIDDEN * bytes_each  # each layer keeps its input at the very least


def test_full_training_holds_no_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    job, recipe = prepared(tiny_folder, tmp_path, training={"method": "full"}, dtype="bfloat16")
    found = measured(job, recipe, clock=ticking())
    assert found.shape.trained_parameters == found.shape.parameters
    assert (found.memory.adapter, found.memory.gradients) == (0, 4 * found.shape.parameters)
    assert found.memory.optimizer == 12 * found.shape.parameters


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_measured(wide_folder: Path, tmp_path: Path, method: str) -> None:
    """On a base in 4 bits (0.5 bytes a weight and its scales) the weights take less than in 16; every part that must be there is."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    job, recipe = prepared(wide_folder, tmp_path, training={"method": method}, dtype="bfloat16")
    found = measured(job, recipe, clock=ticking(), timed=2)
    assert (found.memory.adapter > 0) == (method != "full")
    assert found.memory.optimizer == 12 * found.shape.trained_parameters
    if method == "qlora":
        plain, _ = prepared(wide_folder, tmp_path / "plain", dtype="bfloat16")
        assert found.memory.weights < measured(plain, plain.recipe(), clock=ticking(), timed=2).memory.weights


def test_seconds_come_from_the_clock(tiny_folder: Path, tmp_path: Path) -> None:
    """Each timed step is read from the clock twice, so that it takes one unit, whatever it really took."""
    job, recipe = prepared(tiny_folder, tmp_path)
    rows = len(pipeline.dataset_of(job).train)
    found = measured(job, recipe, clock=ticking(0.5), timed=3)
    assert [seconds for _, seconds in found.timed] == [0.5] * 3
    assert found.steps == 2 * -(-rows // 4)
    assert found.seconds_per_step == pytest.approx(0.5, rel=0.3)  # short and long steps stand for shares of other sizes
    assert found.seconds_per_token == pytest.approx(found.seconds_per_step / found.tokens_per_step)
    whole = found.load_seconds + found.validations * found.validation_seconds + found.steps * found.seconds_per_step
    assert found.training_seconds == pytest.approx(whole)
    json.dumps(found.to_dict(), allow_nan=False)


def test_nothing_is_changed(tiny_folder: Path, tmp_path: Path) -> None:
    job, recipe = prepared(tiny_folder, tmp_path)
    before = {path: path.read_bytes() for path in [*job.path.rglob("*"), *tiny_folder.rglob("*")] if path.is_file()}
    random = torch.get_rng_state()
    measured(job, recipe, clock=ticking(), timed=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert {path: path.read_bytes() for path in [*job.path.rglob("*"), *tiny_folder.rglob("*")] if path.is_file()} == before


def test_preferences_and_a_rate_to_be_found_cost_more(tiny_folder: Path, tmp_path: Path) -> None:
    job, recipe = prepared(tiny_folder, tmp_path, training={"learning_rate": "auto", "epochs": 20})
    assert measured(job, recipe, clock=ticking()).rate_seconds > 0
    pairs = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(160)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    content = {"model": {"name": str(tiny_folder)}, "data": str(data), "training": {"objective": "preference", "learning_rate": 1e-3}}
    other = Run.create(tmp_path / "other", build_recipe(content))
    pipeline.prepare(other)
    assert measured(other, other.recipe(), clock=ticking()).reference_seconds > 0


def test_validations_are_those_of_the_loop(tiny_folder: Path, tmp_path: Path) -> None:
    """Second source: the loop's own metrics."""
    for number, settings in enumerate(
        [{"validations_per_epoch": 3}, {"epochs": 1.5, "validations_per_epoch": 2}, {"max_steps": 5, "validations_per_epoch": 9}]
    ):
        place = tmp_path / str(number)
        place.mkdir()
        job, recipe = prepared(tiny_folder, place, training=settings)
        dataset = pipeline.dataset_of(job)
        pipeline.train(job, dataset=dataset)
        made = sum("validation_loss" in row for row in job.read_jsonl(job.metrics_file))
        assert count_validations(len(dataset.train), recipe.training) == made


def test_steps_of_all_lengths_stand_for_the_whole() -> None:
    """Seconds 0.2 + 0.01 a token, sizes from 10 to 400 in odd shares: five timed steps are within 3 % of the true mean; steps a token alike are exact."""
    sizes = [10 + (i * i) % 391 for i in range(200)]
    chosen = spread_out(sizes, 5)
    assert [sizes[place] for place in chosen] == sorted(sizes[place] for place in chosen)
    seconds = [0.2 + 0.01 * sizes[place] for place in chosen]
    true = sum(0.2 + 0.01 * size for size in sizes) / len(sizes)
    assert mean_step(sizes, chosen, seconds) == pytest.approx(true, rel=0.03)
    assert mean_step(sizes, chosen, [0.5 * sizes[place] for place in chosen]) == pytest.approx(0.5 * sum(sizes) / len(sizes))
    assert straightness([sizes[place] for place in chosen], seconds) == pytest.approx(0, abs=1e-9)
    assert straightness([1, 2, 3], [1.0, 4.0, 3.0]) > 0.2
    assert spread_out([5, 5], 5) == [0, 1]
