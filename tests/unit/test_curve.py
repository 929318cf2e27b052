"""The learning curve: known parameters come back, two ways of fitting agree, the interval covers the truth, and what is not trustworthy says so."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.advice import Answer, answer_curve, fit_curve, nested, row_draws, seed_draws
from burnish.advice.curve import EXPONENTS, _profile
from burnish.cli.rows import parse_parts
from burnish.errors import RecipeError
from burnish.pipeline.curve import CurvePlan, _budgeted, _expected, _Part, sentence
from burnish.recipe import build_recipe
from burnish.training import planned_steps
from burnish.types import Dataset

SIZES = (50, 100, 200, 400)


# --------------------------------------------------------------------------------------------------------------- parts


@given(
    groups=st.lists(st.integers(0, 12).map(str), min_size=1, max_size=80),
    fractions=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_parts_are_nested_and_keep_groups_whole(groups: list[str], fractions: list[float], seed: int) -> None:
    sets = nested(groups, [*fractions, 1.0], seed)
    assert sets[1.0] == list(range(len(groups)))
    for smaller, larger in pairwise(sets[fraction] for fraction in sorted(sets)):
        assert set(smaller) <= set(larger)
    for places in sets.values():
        assert {groups[place] for place in places}.isdisjoint(groups[place] for place in set(range(len(groups))) - set(places))
        assert places


def test_parts_come_as_near_as_groups_allow_and_differ_by_seed() -> None:
    single = [str(n) for n in range(400)]
    sets = nested(single, (0.125, 0.25, 0.5, 1.0), 0)
    assert [len(sets[f]) for f in sorted(sets)] == [50, 100, 200, 400]
    assert nested(single, (0.125,), 0) == nested(single, (0.125,), 0)
    assert nested(single, (0.125,), 0) != nested(single, (0.125,), 1)
    with pytest.raises(ValueError, match="at most 1"):
        nested(single, (1.5,), 0)


# ----------------------------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize(("c", "a", "b"), [(0.9, 3.0, 0.5), (0.8, 20.0, 1.0), (0.95, 1.2, 0.2), (1.0, 2.0, 0.3)])
def test_known_parameters_come_back(c: float, a: float, b: float) -> None:
    """Without noise the fit is exact, for a score and, turned over, for a loss; doubling is f(2N) − f(N) of the true curve."""
    scores = [c - a * n**-b for n in SIZES]
    fit = fit_curve(SIZES, scores)
    assert (fit.asymptote, fit.exponent, fit.to_dict()["a"]) == pytest.approx((c, b, a), rel=0.02)
    assert fit.doubled == pytest.approx(a * 400**-b - a * 800**-b, rel=0.01)
    loss = fit_curve(SIZES, [0.2 + a * n**-b for n in SIZES], lower_is_better=True)
    assert (loss.asymptote, loss.exponent) == pytest.approx((0.2, b), rel=0.05)
    assert [loss.at(n) for n in SIZES] == pytest.approx([0.2 + a * n**-b for n in SIZES], rel=1e-3)


def test_the_grid_agrees_with_scipy() -> None:
    """The fit of every draw against scipy's curve_fit on the same numbers: the same curve, and no larger cost."""
    from scipy.optimize import curve_fit

    random = np.random.default_rng(0)
    x = np.array(SIZES) / SIZES[-1]
    for _ in range(20):
        values = 0.9 - 0.15 * x**-0.5 + 0.01 * random.standard_normal(4)
        c, gap, b = (float(part[0]) for part in _profile(x, values[None], np.ones(4), 1.0))
        bounds = ([-np.inf, 0, EXPONENTS[0]], [1.0, np.inf, EXPONENTS[1]])
        best, _ = curve_fit(lambda x, c, g, b: c - g * x**-b, x, values, p0=(0.9, 0.1, 0.5), bounds=bounds, max_nfev=20000)
        costs = [float(((p[0] - p[1] * x ** -p[2] - values) ** 2).sum()) for p in ((c, gap, b), best)]
        assert costs[0] <= 1.03 * costs[1] + 5e-7  # the grid's steps of the exponent are 3.5 %
        assert gap * (1 - 2**-b) == pytest.approx(best[1] * (1 - 2 ** -best[2]), abs=2e-3)


def test_one_training_gone_wrong_does_not_bend_the_curve() -> None:
    sizes = [size for size in SIZES for _ in range(4)]
    random = np.random.default_rng(1)
    clean = np.array([0.9 - 3 * n**-0.5 for n in sizes]) + 0.003 * random.standard_normal(16)
    bad = clean.copy()
    bad[13] = 0.1
    plain = _profile(np.array(SIZES) / 400, bad.reshape(4, 4).mean(1)[None], np.ones(4), 1.0)
    assert abs(fit_curve(sizes, bad.tolist()).at(400) - 0.75) < 0.03 < abs(float(plain[0][0] - plain[1][0]) - 0.75)


def test_too_few_sizes_are_no_curve() -> None:
    with pytest.raises(ValueError, match="2 sizes"):
        fit_curve((50, 100, 100), (0.1, 0.2, 0.3))


# ------------------------------------------------------------------------------------------------------------ interval


def simulate(
    truth: Callable[[float], float], random: np.random.Generator, *, scatter: float = 0.01, seeds: int = 3, rows: int = 200,
    sizes: tuple[int, ...] = SIZES, draws: int = 200, loss: bool = False,
) -> Answer:  # fmt: skip
    """Trainings at each size whose level scatters by seed, each answering the same validation rows of different difficulty."""
    difficulty, made, at = random.random(rows), [], []
    for _ in range(seeds):
        for size in sizes:
            level = truth(size) + scatter * random.standard_normal()
            if loss:
                made.append(level * (0.5 + difficulty) + 0.2 * random.standard_normal(rows))
            else:
                made.append((np.where(random.random(rows) < 0.7, difficulty, random.random(rows)) < level).astype(float))
            at.append(size)
    table = np.array(made)
    weights = row_draws([str(n) for n in range(rows)], draws=draws, seed=1)
    return answer_curve(at, table.mean(1).tolist(), weights @ table.T / rows, lower_is_better=loss)


@pytest.mark.parametrize(
    ("c", "a", "b", "options"),
    [(0.9, 3.0, 0.5, {}), (0.85, 15.0, 1.0, {"scatter": 0.015}), (0.95, 1.2, 0.2, {"rows": 100}), (0.6, 0.0, 1.0, {"scatter": 0.02}), (0.3, 5.0, 0.6, {"loss": True, "scatter": 0.02})],
)  # fmt: skip
def test_the_interval_covers_the_truth(c: float, a: float, b: float, options: dict[str, Any]) -> None:
    """100 simulated curves of known truth: at least 95 of 100 intervals hold it (a binomial of 0.95 falls below 90 once in a hundred), and they are no wider
    than twice what the estimates scatter."""
    random, truth = np.random.default_rng(0), (a * 400.0**-b) * (1 - 2.0**-b)
    sign = 1 if options.get("loss") else -1
    answers = [simulate(lambda n: c + sign * a * n**-b, random, **options) for _ in range(100)]
    held = [answer.low <= truth <= answer.high for answer in answers]  # type: ignore[operator]
    assert sum(held) >= 90
    width = np.mean([answer.high - answer.low for answer in answers])  # type: ignore[operator]
    assert width <= 2 * 3.92 * np.std([answer.gain for answer in answers])
    believed = [truth_held for truth_held, answer in zip(held, answers, strict=True) if answer.trustworthy]
    assert len(believed) >= (40 if b == 0.2 else 90)  # with b = 0.2 the intervals are wide, and many are refused for it
    assert sum(believed) >= 0.9 * len(believed)


def test_draws_by_a_hand_count() -> None:
    """Rows of one group come and go together; seeds that do not scatter add nothing; one seed a size is drawn by rows only."""
    weights = row_draws(["a", "a", "b", "c"], draws=500, seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert set((weights @ np.array([0.5, 0.5, 1, 1])).tolist()) == {3.0}
    names, means = seed_draws(np.tile([0.2, 0.2, 0.7], (50, 1)), ["x", "x", "y"])
    assert names == ["x", "y"]
    assert means == pytest.approx(np.tile([0.2, 0.7], (50, 1)))
    # Two seeds at 0 and 1: the variance of their mean is 1/4; with one degree of freedom Student's quantile is 12.7 instead of 1.96.
    _, wide = seed_draws(np.tile([0.0, 1.0], (20000, 1)), ["x", "x"], seed=3)
    assert wide.std() == pytest.approx(0.5 * 12.706 / 1.96, rel=0.03)


# -------------------------------------------------------------------------------------------------------- not to believe


def reasons_of(truth: Callable[[float], float], *, seed: int = 4, **options: Any) -> str:
    answer = simulate(truth, np.random.default_rng(seed), **options)
    assert not answer.trustworthy
    return "; ".join(answer.reasons)


def test_what_is_not_trustworthy_says_why() -> None:
    assert "1 size measured" in reasons_of(lambda n: 0.5, sizes=(400,))
    assert "2 sizes measured" in reasons_of(lambda n: 0.5, sizes=(200, 400))
    assert "200 rows did worse than 100" in reasons_of(lambda n: {50: 0.3, 100: 0.7, 200: 0.4, 400: 0.8}[n])
    assert "bends faster" in reasons_of(lambda n: {50: 0.1, 100: 0.795, 200: 0.8, 400: 0.8}[n], scatter=0.001, rows=4000)
    assert "do not predict the largest" in reasons_of(lambda n: {50: 0.3, 100: 0.33, 200: 0.35, 400: 0.8}[n])
    assert "too wide" in reasons_of(lambda n: 0.4 + n / 4000, scatter=0.1, rows=40)
    assert "one training a size" in reasons_of(lambda n: 0.9 - 3 * n**-0.5, seeds=1)
    assert "every training scored 0" in reasons_of(lambda n: -1.0)


def test_a_good_curve_is_believed_and_one_of_three_sizes_is_marked_unchecked() -> None:
    random = np.random.default_rng(2)
    answer = simulate(lambda n: 0.9 - 3 * n**-0.5, random)
    assert answer.trustworthy
    assert answer.held_out is not None
    assert answer.held_out["low"] <= answer.held_out["observed"] <= answer.held_out["high"]
    assert answer.line[-1]["rows"] == pytest.approx(800)
    assert all(point["low"] <= point["high"] for point in answer.line)
    assert simulate(lambda n: 0.9 - 3 * n**-0.5, random, sizes=(100, 200, 400)).held_out is None
    loss = simulate(lambda n: 0.3 + 5 * n**-0.6, random, loss=True)
    assert loss.held_out is not None
    assert loss.held_out["low"] <= loss.held_out["observed"] == pytest.approx(0.3 + 5 * 400**-0.6, abs=0.05)


def test_sentences() -> None:
    content: dict[str, Any] = {
        "points": [{"rows": 50}, {"rows": 100}, {"rows": 400}] * 3, "missing": [], "gain": 0.031, "low": 0.012, "high": 0.05, "lower_is_better": False,
        "metric_title": "Accuracy", "trustworthy": True, "reasons": [], "held_out": {},
    }  # fmt: skip
    assert sentence(content) == (
        "Doubling your data (400 → 800 rows) is worth +3.1 [+1.2, +5.0] points (Accuracy), by 9 trainings on 50 to 400 rows."
    )
    assert "could not be held out" in sentence({**content, "held_out": None})
    assert "That may be nothing." in sentence({**content, "low": 0.0})
    assert sentence({**content, "trustworthy": False, "reasons": ["why"]}).startswith("Not trustworthy: why. The curve would say")
    assert "2 of 11 trainings are missing" in sentence({**content, "missing": [1, 2]})
    nothing = {**content, "gain": None, "reasons": ["2 sizes measured"], "missing": [1]}
    assert sentence(nothing) == "Can't tell what more data would bring: 2 sizes measured. 1 of 10 trainings are missing."
    assert "+0.031 [+0.012, +0.050] nats per token less" in sentence({**content, "lower_is_better": True})


# ---------------------------------------------------------------------------------------------------------------- plans


def test_equal_steps_give_every_part_as_many_updates_and_validations() -> None:
    recipe = build_recipe({"model": "m", "data": "d.jsonl", "training": {"epochs": 3, "micro_batch_size": 8, "validations_per_epoch": 2}})
    dataset = Dataset(tuple(range(400)), (), (), {})  # type: ignore[arg-type]
    full = planned_steps(400, recipe.training)
    for rows in (50, 100, 203, 400):
        settings = _budgeted(recipe, dataset, rows, CurvePlan(equal="steps")).training
        assert planned_steps(rows, settings) == full
        validations = settings.validations_per_epoch * full / -(-rows // 8)
        assert validations == pytest.approx(6)
    assert _budgeted(recipe, dataset, 50, CurvePlan()) is recipe


def test_what_a_training_will_take() -> None:
    rows = [
        {"rows": 50, "seconds": 4.0, "state": "complete"},
        {"rows": 100, "seconds": 6.0, "state": "complete"},
        {"rows": 9, "seconds": 1, "state": "cut off"},
    ]
    part = lambda n: _Part(0.5, 0, tuple(range(n)))  # noqa: E731
    assert _expected(part(50), rows, CurvePlan()) == 4.0
    assert _expected(part(200), rows, CurvePlan()) == 12.0
    assert _expected(part(200), rows, CurvePlan(equal="steps")) == 6.0
    assert _expected(part(10), rows, CurvePlan()) == 4.0
    assert _expected(part(10), [], CurvePlan()) == 0.0


@pytest.mark.parametrize("wrong", [{"equal": "rows"}, {"seeds": 0}, {"fractions": ()}, {"fractions": (0.5, 1.2)}])
def test_plans_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="expected"):
        CurvePlan(**wrong)


def test_parts_on_the_command_line() -> None:
    assert parse_parts("100, 12.5,25,25") == (0.125, 0.25, 1.0)
    with pytest.raises(RecipeError, match="for example"):
        parse_parts("12.5;25")
