"""The space of a sweep, what is proposed, and the record: no model is needed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from burnish.cli.search import parse_time
from burnish.errors import RecipeError, TrainingError
from burnish.recipe import Recipe, build_recipe
from burnish.training.sweep import Aim, Choice, Outcome, Pruned, Span, best_of, default_space, parse_space, propose, read_trials, sweep

pytest.importorskip("optuna")


def recipe(**training: Any) -> Recipe:
    return build_recipe({"model": "m", "data": "d.jsonl", "training": training, "seed": 3})


def test_spans_and_choices() -> None:
    space = parse_space(
        ["training.learning_rate=1e-5..1e-3", "lora.rank=4, 8,16", "training.epochs=1..3", "training.schedule=cosine,linear"], recipe()
    )
    rate, rank, epochs, schedule = space.values()
    assert isinstance(rate, Span)
    assert (rate.low, rate.high, rate.logarithmic, rate.whole) == (1e-5, 1e-3, True, False)
    assert rank == Choice((4, 8, 16))
    assert isinstance(epochs, Span)
    assert (epochs.whole, epochs.logarithmic) == (True, False)
    assert schedule == Choice(("cosine", "linear"))
    assert str(rate) == "1e-05..0.001 (log)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learnin_rate=1..2", "did you mean `training.learning_rate`"),
        ("lr=1e-5..1e-3", "here it is called `training.learning_rate`"),
        ("training.learning_rate", "expected KEY=LOW"),
        ("training.learning_rate=1e-3..1e-5", "the lower one first"),
        ("training.learning_rate=a..b", "two numbers"),
        ("training.learning_rate=1..100", "less than or equal to 10"),
        ("lora.rank=8", "one value is nothing to choose from"),
        ("lora.rank=0,8", "greater than or equal to 1"),
        ("data.train_rows=100,200", "all its trials share the same model, rows and evaluation"),
        ("model.name=a,b", "all its trials share"),
        ("training.objective=supervised,text", "all its trials share"),
    ],
)
def test_what_is_no_space_is_told(text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_space([text], recipe())
    assert expected in str(caught.value)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="given twice"):
        parse_space(["lora.rank=4,8", "lora.rank=8,16"], recipe())


def test_default_space_lies_around_the_method() -> None:
    space = default_space(recipe())
    assert 1e-3 in space["training.learning_rate"]
    assert 16 in space["lora.rank"]


SPACE = {"training.learning_rate": Span(1e-5, 1e-1), "lora.rank": Choice((4, 8, 16)), "training.gradient_accumulation_steps": Span(1, 3)}


def bowl(calls: list[dict[str, Any]], *, dies_in: int | None = None) -> Callable[..., Outcome]:
    """A trial whose loss is lowest at 3e-3 and rank 8, told in four validations."""

    def run(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        rate = float(tried.training.learning_rate)
        calls.append({"rate": rate, "rank": tried.lora.rank, "accumulation": tried.training.gradient_accumulation_steps})
        if dies_in == len(calls):
            raise KeyboardInterrupt
        if rate > 5e-2:
            raise TrainingError("diverged: the loss was not finite")
        import math

        value = 1 + (math.log10(rate) - math.log10(3e-3)) ** 2 + abs(tried.lora.rank - 8) / 10
        for part in range(1, 5):
            watch(part * 10, value + 1 / part)
        return Outcome(value + 0.25, {"steps": 40})

    return run


def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "trial")} for row in rows if row["state"] != "failed"]


def test_a_sweep_that_was_cut_off_makes_the_same_trials(tmp_path: Path) -> None:
    """Cut in its third and, again, in its eighth trial: afterwards the same values and results as without, the cut ones marked failed."""
    aim = Aim(trials=14)
    whole: list[dict[str, Any]] = []
    expected = sweep(tmp_path / "whole.jsonl", recipe(), SPACE, aim, run_trial=bowl(whole))
    path = tmp_path / "cut.jsonl"
    for dies_in in (3, 6, None):
        calls: list[dict[str, Any]] = []
        if dies_in is not None:
            with pytest.raises(KeyboardInterrupt):
                sweep(path, recipe(), SPACE, aim, run_trial=bowl(calls, dies_in=dies_in))
            assert read_trials(path)[-1]["state"] == "running"
            with path.open("a") as file:
                file.write('{"trial": 99, "state": "compl')  # and a line that the crash tore
        else:
            rows = sweep(path, recipe(), SPACE, aim, run_trial=bowl(calls))
    assert bare(rows) == bare(expected)
    assert [row["state"] for row in rows].count("failed") == 2
    assert len(rows) == 16
    assert len({json.dumps(row["values"]) for row in expected}) > 8, "trials differ"
    assert {row["state"] for row in expected} >= {"complete", "pruned"}


def test_the_search_finds_the_bowl_and_starts_at_the_recipes_own_values(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    rows = sweep(tmp_path / "t.jsonl", recipe(learning_rate=1e-3), SPACE, Aim(trials=40), run_trial=bowl(calls))
    assert calls[0] == {"rate": 1e-3, "rank": 16, "accumulation": 1}
    best = best_of(rows, Aim())
    assert best is not None
    assert best["values"]["lora.rank"] == 8
    assert 1e-3 < best["values"]["training.learning_rate"] < 1e-2
    assert {call["accumulation"] for call in calls} <= {1, 2, 3}
    random.seed(1)
    blind = min(1 + (random.uniform(-5, -1) + 2.52) ** 2 + random.choice([0.4, 0, 0.8]) for _ in range(10))
    assert best["value"] - 0.25 < blind


def test_a_hopeless_trial_is_given_up(tmp_path: Path) -> None:
    """Three whole trials at 1, then one at 2: it stops at its first validation that is worse than the median."""
    seen: list[int] = []

    def run(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        for part in range(1, 4):
            watch(part, 1.0 if number < 3 else 2.0)
            seen.append(number)
        return Outcome(1.0 if number < 3 else 2.0)

    rows = sweep(tmp_path / "t.jsonl", recipe(), SPACE, Aim(trials=4), run_trial=run)
    assert [row["state"] for row in rows] == ["complete"] * 3 + ["pruned"]
    assert seen.count(3) == 0
    assert rows[3]["losses"] == [[1, 2.0]]


def test_a_score_is_searched_upwards_and_pruned_by_its_loss(tmp_path: Path) -> None:
    def run(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        watch(1, [1.0, 1.0, 1.0, 3.0, 0.5][number])
        return Outcome([0.2, 0.6, 0.4, 0.9, 0.5][number])

    aim = Aim("validation_score", trials=5)
    rows = sweep(tmp_path / "t.jsonl", recipe(), SPACE, aim, run_trial=run)
    assert [row["state"] for row in rows] == ["complete", "complete", "complete", "pruned", "complete"]
    assert best_of(rows, aim) == rows[1]


def test_divergence_is_an_answer_and_other_failures_are_not(tmp_path: Path) -> None:
    def diverges(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        if number == 0:
            raise TrainingError("diverged: not finite")
        return Outcome(1.0)

    rows = sweep(tmp_path / "a.jsonl", recipe(), SPACE, Aim(trials=3), run_trial=diverges)
    assert [row["state"] for row in rows] == ["diverged", "complete", "complete"]

    def full_disk(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        raise TrainingError("cannot write: No space left on device")

    with pytest.raises(TrainingError, match="No space"):
        sweep(tmp_path / "b.jsonl", recipe(), SPACE, Aim(trials=3), run_trial=full_disk)
    with pytest.raises(TrainingError, match="none of the 2 trials"):
        sweep(tmp_path / "c.jsonl", recipe(), SPACE, Aim(trials=2), run_trial=lambda *_: Outcome(float("nan")))


def test_the_time_is_a_budget_over_all_sessions(tmp_path: Path) -> None:
    """10 s are spent by trials of 4 s; with 12 s the third fits no more, and a further session starts none."""
    path = tmp_path / "t.jsonl"
    rows = [
        {"trial": n, "state": "complete", "values": {"lora.rank": 4}, "value": 1.0, "reason": "", "losses": [], "seconds": 5.0}
        for n in (0, 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls: list[int] = []

    def run(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        calls.append(number)
        return Outcome(1.0)

    space = {"lora.rank": Choice((4, 8))}
    assert len(sweep(path, recipe(), space, Aim(seconds=12.0), run_trial=run)) == 2
    assert calls == []
    assert len(sweep(path, recipe(), space, Aim(seconds=15.0, trials=3), run_trial=run)) == 3


def test_when_the_time_is_up_a_running_trial_stops_at_its_next_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(sys.modules["burnish.training.sweep"], "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def run(number: int, tried: Recipe, watch: Callable[[int, float], None]) -> Outcome:
        for part in range(3):
            clock[0] += 4 if number == 0 else 30
            watch(part, 1.0)
        return Outcome(1.0)

    rows = sweep(tmp_path / "t.jsonl", recipe(), {"lora.rank": Choice((4, 8))}, Aim(seconds=30.0), run_trial=run)
    assert [(row["state"], row["reason"], len(row["losses"])) for row in rows] == [("complete", "", 3), ("pruned", "the time is up", 1)]


def test_a_proposal_depends_on_the_seed_and_the_finished_trials_only() -> None:
    rows = [
        {"trial": n, "state": "complete", "values": {"lora.rank": r}, "value": v, "losses": []}
        for n, (r, v) in enumerate([(4, 2.0), (8, 1.0), (16, 1.5), (8, 1.1), (4, 2.2), (16, 1.4)])
    ]
    space = {"lora.rank": Choice((4, 8, 16)), "training.learning_rate": Span(1e-5, 1e-1)}
    for row in rows:
        row["values"] = {**row["values"], "training.learning_rate": 1e-3 * (1 + row["trial"])}
    ask = [propose(space, rows, aim=Aim(), seed=seed, first={})[1] for seed in (1, 1, 2)]
    failed = [*rows, {"trial": 6, "state": "failed", "values": rows[0]["values"], "value": None}]
    assert ask[0] == ask[1] == propose(space, failed, aim=Aim(), seed=1, first={})[1]
    assert ask[0] != ask[2]


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("30m", 1800), ("1.5h", 5400)])
def test_times(text: str, expected: float) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize("text", ["30", "m", "-3m", "0s", "2 days"])
def test_times_without_a_unit_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="90s, 30m or 2h"):
        parse_time(text)


def test_pruned_is_not_swallowed_as_an_error() -> None:
    assert not issubclass(Pruned, TrainingError)
