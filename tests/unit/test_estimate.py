"""Forecasts from numbers alone: work of a batch counted token by token, unit costs found again, FLOPs and bytes by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from burnish.advice import GPUS, find_gpu, forecast_here, forecast_on
from burnish.advice.estimate import ANSWER_NOISE, COMPARE_SECONDS, NOISE
from burnish.advice.gpus import BANDWIDTH_SHARE, UTILISATION, answer_seconds, step_flops, step_seconds
from burnish.errors import RecipeError
from burnish.evaluation import AnswerCost
from burnish.evaluation.speed import UNITS, _Probe, fit, reckon, work_of
from burnish.models import Limits
from burnish.training import MemoryParts, Shape, StepTimes
from burnish.training.memory import Plan

CONFIG = SimpleNamespace(num_hidden_layers=2)
CONFIG.get_text_config = lambda: CONFIG


def counted(lengths: list[int], answers: list[int], *, shared: int, first: bool) -> list[float]:
    """The same by going through a batch token by token (a prompt is padded to the longest)."""
    width = max(lengths)
    tokens, pairs = 0.0, 0.0
    if first:
        tokens, pairs = tokens + shared, pairs + sum(range(shared))
    for _ in lengths:
        for place in range(shared, width):
            tokens, pairs = tokens + 1, pairs + place
    steps = decoded = 0
    active = [answer - 1 for answer in answers]
    while any(left > steps for left in active):
        for left in active:
            if left > steps:
                decoded, pairs = decoded + 1, pairs + width + steps
        steps += 1
    return [tokens, steps, decoded, pairs]


@pytest.mark.parametrize(
    ("lengths", "answers", "shared", "first"),
    [
        ([9], [4], 0, True),
        ([120, 140, 139], [1, 30, 22], 100, True),
        ([120, 140, 139], [1, 30, 22], 100, False),
        ([40] * 8, [5] * 8, 0, True),
    ],
)
def test_work_of_a_batch_is_that_of_a_count(lengths: list[int], answers: list[int], shared: int, first: bool) -> None:
    assert work_of(lengths, answers, shared=shared, first=first).tolist() == counted(lengths, answers, shared=shared, first=first)


def test_unit_costs_are_found_again() -> None:
    """Seconds made from known costs, with 3 % of noise: a batch of another shape is foretold within 5 %."""
    costs = np.array([2e-4, 0.05, 4e-3, 5e-7])
    draw = np.random.default_rng(3)
    probes = []
    for lengths, shared in (([16] * 24, 0), ([300] * 14, 0), ([1700, 1690, 1710, 1705], 1660), ([560] * 12, 0)):
        answers = sorted(int(n) for n in draw.integers(5, 40, size=len(lengths)))
        work = np.array([work_of(lengths, [min(other, mine) for other in answers], shared=shared, first=True) for mine in answers])
        probes.append(_Probe(work, work @ costs * draw.normal(1, 0.03, size=len(lengths)), tuple(answers)))
    units = fit(probes)
    assert (units >= 0).all()
    other = work_of([420] * 20, [25] * 20, shared=0, first=True)
    assert float(units @ other) == pytest.approx(float(costs @ other), rel=0.05)


def test_a_sample_stands_for_all_rows() -> None:
    """Every tenth of 200 prompts reckons like all 200, batch by batch as `generate` lays them out."""
    prompts = [[7] * 5 + [index % 90 + 8] + [9] * (10 + index % 37) for index in range(200)]
    limits, answers = Limits(30), [12, 30, 7]
    whole = reckon(CONFIG, prompts, count=200, answers=answers, limits=limits, batch_size=32)
    part = reckon(CONFIG, prompts[::10], count=200, answers=answers, limits=limits, batch_size=32)
    assert part == pytest.approx(whole, rel=0.1)
    assert whole[2] == sum(answers[i % 3] - 1 for i in range(200))
    few = reckon(CONFIG, prompts, count=200, answers=[500], limits=limits, batch_size=32)
    assert few[2] == 200 * 29, "no answer is longer than the limit"


SHAPE = Shape(parameters=1_010_000, trained_parameters=10_000, adapter=True, weight_bytes=4, layers=4, hidden_size=100, vocabulary=2_000,
              batch_tokens=500, batch_targets=100)  # fmt: skip
MEMORY = MemoryParts(
    weights=4_000_000, adapter=40_000, gradients=40_000, optimizer=80_000, activations=700_000, head=300_000, largest_tokens=200
)
STEPS = StepTimes(
    steps=100, seconds_per_step=2.0, seconds_per_token=0.01, tokens_per_step=200, real_tokens_per_step=200, target_tokens_per_step=80, spread=0.05,
    forward_seconds_per_token=0.004, validation_seconds=3.0, validations=5, rate_seconds=10.0, reference_seconds=0.0, load_seconds=4.0,
    memory=MEMORY, peak_bytes=9_000_000, plan=Plan(4, False, 3000.0, 1, 2, 3500.0), shape=SHAPE, timed=((200, 2.0),),
)  # fmt: skip
ANSWERS = AnswerCost(
    selection=20.0, test={"base": 10.0, "few_shot": 30.0, "tuned": 12.0}, low=60.0, high=90.0, unit_seconds=dict.fromkeys(UNITS, 0.0),
    work={"baselines": dict(zip(UNITS, (1000.0, 50.0, 400.0, 1e5), strict=True)), "tuned": dict(zip(UNITS, (100.0, 20.0, 80.0, 1e4), strict=True))},
    tuned_factor=1.1, load_seconds=3.0, answer_tokens={}, probed_rows=10,
)  # fmt: skip


def here(**changes: Any) -> Any:
    options = {"prepare_seconds": 1.5, "machine": "m", "memory_available": 10**9, "peak_bytes": 9_000_000, **changes}
    return forecast_here(options.pop("steps", STEPS), options.pop("answers", ANSWERS), **options)


def test_seconds_add_up_by_hand() -> None:
    found = here()
    assert found.seconds == {
        "prepare": 1.5, "baselines": 3 + 20 + 10 + 30, "train": 4 + 10 + 5 * 3 + 100 * 2, "evaluate": 3 + 12, "compare": COMPARE_SECONDS,
    }  # fmt: skip
    fixed = 1.5 + COMPARE_SECONDS + 2 * 3
    assert found.low_seconds == pytest.approx((1 - NOISE) * fixed + (1 - NOISE - 0.05) * 229 + (1 - ANSWER_NOISE) * 60)
    assert found.high_seconds == pytest.approx((1 + NOISE) * fixed + (1 + NOISE + 0.05) * 229 + (1 + ANSWER_NOISE) * 90)


def test_memory_adds_up_to_the_peak_and_never_below_its_parts() -> None:
    parts = 4_000_000 + 40_000 + 40_000 + 80_000 + 700_000 + 300_000
    assert here().memory["everything_else"] == 9_000_000 - parts
    assert here().memory["total"] == 9_000_000
    assert here(peak_bytes=1).memory["total"] == parts
    assert here().fits
    assert not here(memory_available=8_999_999).fits


def test_money_is_hours_times_the_price() -> None:
    found = here(price_per_hour=36.0)
    assert found.money() == {
        "expected": round(found.total_seconds / 100, 4), "low": round(found.low_seconds / 100, 4), "high": round(found.high_seconds / 100, 4),
    }  # fmt: skip
    assert here().money() is None


def test_nothing_trained_costs_no_training() -> None:
    answers = replace(ANSWERS, test={"base": 10.0}, low=30.0, high=30.0)
    found = here(steps=None, answers=answers)
    assert (found.seconds["train"], found.seconds["evaluate"], found.memory["total"]) == (0, 0, 9_000_000)


def test_flops_of_a_step_by_hand() -> None:
    """LoRA: base forward and backward (2 + 2 a weight and token), the adapter's own gradients too (2 + 2 + 2); the head on targets, twice."""
    body = 1_010_000 - 10_000 - 2_000 * 100
    expected = 200 * (4 * body + 6 * 10_000) + 80 * 4 * 200_000
    assert step_flops(SHAPE, tokens=200, targets=80) == expected
    assert step_flops(SHAPE, tokens=200, targets=80, checkpointing=True) == expected + 200 * 2 * (body + 10_000)
    full = replace(SHAPE, adapter=False, trained_parameters=1_010_000)
    assert step_flops(full, tokens=200, targets=80) == 200 * 6 * (1_010_000 - 200_000) + 80 * 6 * 200_000


def test_time_on_a_gpu_follows_its_table() -> None:
    large = replace(SHAPE, parameters=8_000_000_000, layers=32, vocabulary=128_000, hidden_size=4096)
    slow, fast = GPUS["l4"], GPUS["h100"]
    ratio = step_seconds(slow, large, tokens=8192, targets=2048) / step_seconds(fast, large, tokens=8192, targets=2048)
    assert ratio == pytest.approx(989 / 121)
    work = dict(zip(UNITS, (0.0, 100.0, 3200.0, 0.0), strict=True))
    read = 2 * (8_000_000_000 - 10_000) / (BANDWIDTH_SHARE * 3350e9)  # all weights in 2 bytes, once a step
    assert answer_seconds(fast, large, work) == pytest.approx(100 * read)
    work["prompt tokens"] = 1e6
    assert answer_seconds(fast, large, work) == pytest.approx(100 * read + 2e6 * (8_000_000_000 - 10_000) / (UTILISATION * 989e12))


def test_a_forecast_for_a_gpu_adds_up_and_says_that_it_is_reckoned() -> None:
    found = forecast_on("RTX 4090", STEPS, ANSWERS, prepare_seconds=1.5, price_per_hour=0.5)
    assert not found.measured
    assert any("not measured" in text for text in found.assumptions)
    assert found.memory["total"] == sum(value for name, value in found.memory.items() if name != "total")
    assert found.memory["weights"] == 2_000_000, "float32 here, bfloat16 there"
    assert found.memory["optimizer"] == 12 * 10_000
    assert found.memory["activations"] == int(500 * 3500 / 2 * 1.1)
    assert found.low_seconds < found.total_seconds < found.high_seconds


def test_the_table_of_gpus_is_whole_and_a_slip_is_told() -> None:
    for name, gpu in GPUS.items():
        assert name == name.lower()
        assert 20 <= gpu.memory_gb <= 200
        assert 50 <= gpu.bf16_tflops <= 2500
        assert 200 <= gpu.bandwidth_gb <= 8000
        assert len(gpu.source) > 15
    with pytest.raises(RecipeError, match="did you mean a100-80gb"):
        find_gpu("a100-80g")
