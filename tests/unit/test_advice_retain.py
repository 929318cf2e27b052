"""KEPT, LOST, CAN'T TELL; the gate; which point is chosen and what is said of it: by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from burnish.advice import Pair, Point, choose, compare_points, halves, judge_gate, judge_retention, next_scale, retention_sentence


def pair(before: Any, after: Any, name: str = "s", **more: Any) -> Pair:
    return Pair(name, name, tuple(map(float, before)), tuple(map(float, after)), **more)


def rows(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def test_a_clear_loss_is_lost_and_names_the_suite() -> None:
    found = judge_retention([pair(rows(160, 200), rows(100, 200), "sums"), pair(rows(90, 200), rows(90, 200), "words")])
    assert [row["verdict"] for row in found["suites"]] == ["LOST", "KEPT"]
    assert found["verdict"] == "LOST"
    assert found["suites"][0]["change"] == pytest.approx(-0.3)
    assert found["whole"]["change"] == pytest.approx(-0.15)
    assert "lost in sums (-30.0)" in retention_sentence(found)


def test_one_lost_suite_is_not_averaged_away() -> None:
    found = judge_retention([pair(rows(150, 200), rows(110, 200), "a"), pair(rows(80, 200), rows(130, 200), "b")])
    assert found["whole"]["change"] > 0
    assert found["verdict"] == "LOST"


def test_many_equal_rows_are_kept_and_few_cannot_tell() -> None:
    many = judge_retention([pair(rows(1200, 2000), rows(1198, 2000))])
    assert many["verdict"] == "KEPT"
    few = judge_retention([pair(rows(6, 10), rows(5, 10))])
    assert few["verdict"] == "CAN'T TELL"
    assert few["suites"][0]["detectable"] > 0.05
    assert "so many rows show a change of about" in retention_sentence(few)


def test_rows_that_all_stay_are_no_proof_where_they_are_few() -> None:
    """An interval without width looks certain; ten rows are not."""
    assert judge_retention([pair(rows(6, 10), rows(6, 10))])["suites"][0]["verdict"] == "CAN'T TELL"
    (row,) = judge_retention([pair(rows(120, 200), rows(120, 200))])["suites"]
    assert row["verdict"] == "KEPT"
    assert row["low"] == pytest.approx(-(1 - 0.05 ** (1 / 200))), "200 rows of which none changed: at most 1.5 % do"
    assert judge_gate([pair(rows(6, 10), rows(6, 10))], 0.05)["state"] == "CAN'T TELL"
    assert judge_retention([pair([1.0], [1.0])])["suites"][0]["verdict"] == "CAN'T TELL"


def test_bits_are_turned_round_and_become_shares() -> None:
    before = np.linspace(0.9, 1.1, 50)
    found = judge_retention([pair(before, before * 1.2, lower_is_better=True, unit="bits per byte")])
    (row,) = found["suites"]
    assert (row["before"], row["after"]) == (pytest.approx(1.0), pytest.approx(1.2))
    assert row["change"] == pytest.approx(-0.2)
    assert row["verdict"] == "LOST"


@pytest.mark.parametrize(
    ("after", "max_drop", "state"),
    [
        (rows(1000, 2000), 0.05, "FAILED"),
        (rows(1200, 2000), 0.05, "PASSED"),
        (rows(1100, 2000), 0.05, "CAN'T TELL"),
        (rows(1100, 2000), 0.1, "PASSED"),
    ],
)
def test_the_gate_has_three_answers(after: list[float], max_drop: float, state: str) -> None:
    """1200 of 2000 before. A loss of 10 points is beyond 5, none is within, 5 ± 1 may be either; with 10 allowed 5 ± 1 passes."""
    found = judge_gate([pair(rows(1200, 2000), after)], max_drop)
    assert found["state"] == state
    assert found["sentence"].startswith(state)


def test_the_gate_sees_one_suite_behind_a_good_mean() -> None:
    found = judge_gate([pair(rows(1500, 2000), rows(1000, 2000), "a"), pair(rows(800, 2000), rows(1300, 2000), "b")], 0.05)
    assert (found["state"], found["failed"]) == ("FAILED", ["a"])


def test_halves_part_the_rows() -> None:
    items = [f"{n:04x}" for n in range(101)]
    one, other = halves(items)
    assert not one & other
    assert one | other == set(items)
    assert (len(one), len(other)) == (51, 50)
    assert halves(items[::-1]) == (one, other), "the order does not decide"


def points(**given: tuple[float, float]) -> list[Point]:
    return [Point(name.replace("_", " "), *values) for name, values in {"base": (0.0, 0.0), "tuned": (0.8, -0.2), **given}.items()]


def test_enough_gain_with_the_least_loss_is_chosen() -> None:
    found = choose(points(a=(0.79, -0.10), b=(0.77, -0.05), c=(0.70, -0.01), d=(0.85, -0.3)))
    assert found["chosen"] == "b", "0.77 is 96 % of 0.8; c keeps only 88 %"
    assert found["kept"]["b"] == {"gain": pytest.approx(0.9625), "loss": pytest.approx(0.25)}
    assert found["kept"]["d"]["gain"] > 1


def test_else_the_best_trade_off() -> None:
    found = choose(points(a=(0.6, -0.10), b=(0.7, -0.08), d=(0.8, -0.25)))
    assert found["chosen"] == "b"
    assert "trade-off" in found["why"]
    assert choose(points(a=(0.2, -0.19)))["chosen"] == "tuned", "a bad trade is none"


def test_nothing_to_repair() -> None:
    assert "no gain to keep" in choose([Point("base", 0.5, 0.0), Point("tuned", 0.5, -0.2), Point("a", 0.5, 0.0)])["why"]
    found = choose([Point("base", 0.0, 0.0), Point("tuned", 0.5, 0.1), Point("a", 0.5, 0.2)])
    assert (found["chosen"], "nothing to repair" in found["why"]) == ("tuned", True)


def test_the_smallest_scale_that_keeps_enough_is_closed_in_on() -> None:
    assert next_scale({0.25: 0.1, 0.5: 0.6, 0.75: 0.97, 1.0: 1.0, 1.25: 0.99}) == 0.625
    assert next_scale({0.25: 0.1, 0.5: 0.6, 0.625: 0.96, 0.75: 0.97, 1.0: 1.0}) == 0.5625
    assert next_scale({0.5: 0.99, 1.0: 1.0}) == 0.25, "down to the base"
    assert next_scale({0.96: 0.5, 1.0: 1.0}) is None, "closer than it matters"
    assert next_scale({0.5: 0.1}) is None


def test_shares_with_intervals_by_hand() -> None:
    """Tuned gains 80 of 100 rows, the point 76 of them; the tuned model loses 40 of 200 rows, the point 10."""
    base, tuned, point = rows(0, 100), rows(80, 100), rows(76, 100)
    before = rows(150, 200)
    lost = pair(before, rows(110, 200)), pair(before, rows(140, 200))
    found = compare_points((base, tuned, point), ([lost[0]], [lost[1]]), confidence=0.95, resamples=4000, seed=0)
    assert found["gain_kept"]["value"] == pytest.approx(0.95)
    assert found["gain_kept"]["low"] < 0.95 < found["gain_kept"]["high"] <= 1
    assert found["loss_kept"]["value"] == pytest.approx(0.25)
    assert 0.1 < found["loss_kept"]["low"] < 0.25 < found["loss_kept"]["high"] < 0.45
    # Delta method: the ratio of 10 lost rows to 40, of which these are a part: se² ≈ p(1 − p) ÷ 40.
    width = found["loss_kept"]["high"] - found["loss_kept"]["low"]
    assert width == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 40) ** 0.5, rel=0.15)


def test_a_share_of_nothing_has_no_number() -> None:
    nothing = pair(rows(5, 10), rows(5, 10))
    found = compare_points((rows(2, 10), rows(3, 10), rows(3, 10)), ([nothing], [nothing]), confidence=0.95, resamples=500, seed=0)
    assert found["loss_kept"] == {"value": None, "low": None, "high": None}
    assert found["gain_kept"]["value"] == 1
    assert found["gain_kept"]["low"] is None, "one row in ten: the gain itself is not certain"
