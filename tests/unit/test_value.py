"""Signals of rows and the rule that joins them, by hand counts; the proof on simulated nulls."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from burnish.advice import find_neighbours, judge_kept, kept_rows, rank_rows, reasons, row_draws
from burnish.advice.neighbours import Neighbours
from burnish.advice.value import KEPT, RANDOM, Signals, places
from burnish.data import make_example
from burnish.errors import DataError, RecipeError
from burnish.pipeline.value import ValuePlan, _table, folds, halves
from burnish.types import Example, Verdict


def row(question: str, answer: str, number: int = 0) -> Example:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return make_example(messages, source=f"rows.jsonl:{number}")


def silent_neighbours(n: int) -> Neighbours:
    return Neighbours(np.full(n, np.nan), np.zeros(n), (None,) * n, ("",) * n, ((0, 0),) * n)


def test_places_are_shares_with_ties_in_the_middle() -> None:
    assert places(np.array([10.0, 30.0, 20.0])).tolist() == [0.0, 1.0, 0.5]  # type: ignore[union-attr]
    assert places(np.array([1.0, 1.0, 5.0])).tolist() == [0.25, 0.25, 1.0]  # type: ignore[union-attr]
    assert places(np.array([1.0, np.nan, 5.0])).tolist() == [0.0, 0.5, 1.0]  # type: ignore[union-attr]
    assert places(np.array([2.0, 2.0])) is None
    assert places(np.array([np.nan, 2.0])) is None


def test_badness_is_the_mean_place_over_signals_that_tell_rows_apart() -> None:
    """By hand: losses put the rows at 0, 0.5, 1; losses minus base at 0.5, 1, 0; gradients (lowest is worst) at 1, 0, 0.5; no neighbours."""
    signals = Signals(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 6.0]), np.array([-0.1, 0.3, 0.1]), silent_neighbours(3))
    badness, by_signal = rank_rows(signals)
    assert set(by_signal) == {"held_out_loss", "not_learnt", "gradient"}
    assert badness == pytest.approx([(0 + 0.5 + 1) / 3, (0.5 + 1 + 0) / 3, (1 + 0 + 0.5) / 3])
    worst = Signals(np.array([1.0, 2.0, 9.0]), np.ones(3), np.array([0.1, 0.2, -0.3]), silent_neighbours(3))
    assert rank_rows(worst)[0].tolist() == pytest.approx([(0 + 0 + 0.5) / 3, (0.5 + 0.5 + 0) / 3, 1.0])
    flat = Signals(np.ones(4), np.ones(4), None, silent_neighbours(4))
    assert rank_rows(flat)[0].tolist() == [0.5] * 4


def test_kept_rows() -> None:
    assert kept_rows(np.array([0.1, 0.9, 0.5, 0.8, 0.2]), 0.4) == [0, 2, 4]
    assert kept_rows(np.array([0.5, 0.5, 0.5]), 1 / 3) == [0, 1]  # of equal rows the later ones go


def test_neighbours_vote_and_find_copies() -> None:
    rows = [
        row("where is my red card", "card", 1), row("where is my blue card", "card", 2), row("where is my green card", "card", 3),
        row("where is my red card please", "cash", 4), row("how much money can I take out", "cash", 5), row("How much money can I take out?", "cash", 6),
    ]  # fmt: skip
    found = find_neighbours(rows, labels=True)
    assert found.disagreement.argmax() == 3  # asks like three others, answers otherwise
    assert found.majority[3] == "card"
    assert found.differing[3] == (3, 3)
    assert found.disagreement[4] == -1.0  # its only neighbour with a word in common answers the same
    assert found.twin[5] == 4
    assert found.duplicate[5] >= 0.9
    assert found.twin[4] is None  # the first of two copies is none
    assert found.twin[3] is None  # a contradiction is no copy
    assert found.duplicate[3] == 0.0
    signals = Signals(np.arange(6.0), np.ones(6), None, found)
    _, by_signal = rank_rows(signals)
    said = reasons(3, signals, by_signal, [one.source for one in rows])
    assert "3 of the 3 nearest rows answer otherwise, most: card" in said
    assert any("rows.jsonl:5" in text for text in reasons(5, signals, by_signal, [one.source for one in rows]))


def test_disagreement_by_a_hand_count() -> None:
    """Three equal questions but for a word that all share out: the scores are equal, so shares are counts."""
    rows = [row(f"alpha beta gamma{n}", answer) for n, answer in enumerate(("x", "x", "y", "y"))]
    found = find_neighbours(rows, labels=True)
    assert found.disagreement == pytest.approx([2 / 3 - 1 / 3] * 4)  # of three neighbours two answer otherwise, one alike
    alike = find_neighbours([row(f"alpha beta gamma{n}", f"answer {n}") for n in range(4)], labels=False)
    assert alike.disagreement == pytest.approx([-14 / 16] * 4)  # `answer 0` and `answer 1`: one letter of eight out, one in


def test_plain_text_and_hostile_text() -> None:
    texts = ["one two three four five six", "One two three four five six!", "\u202e\x1b[31m", "seven eight nine"]
    found = find_neighbours([make_example([{"role": "assistant", "content": text}], source="d:1") for text in texts], labels=False)
    assert np.isnan(found.disagreement).all()
    assert found.twin == (None, 0, None, None)


def test_a_table_has_no_formula() -> None:
    content = {
        "rank": 1, "id": "a", "source": "=f.jsonl:1", "badness": 0.5, "kept": True, "signals": {"x": -0.5}, "reason": "why",
        "question": "=HYPERLINK(1)", "answer": " @SUM(1)",
    }  # fmt: skip
    cells = list(csv.reader(io.StringIO(_table([content], ["x"]))))[1]
    assert cells == ["1", "a", "'=f.jsonl:1", "0.5", "True", "-0.5", "why", "'=HYPERLINK(1)", "' @SUM(1)"]


def test_folds_and_halves_keep_groups_whole() -> None:
    groups = [f"g{n % 7}" for n in range(50)]
    parts = folds(groups, 3, seed=1)
    assert sorted(place for part in parts for place in part) == list(range(50))
    assert max(map(len, parts)) - min(map(len, parts)) <= 8
    for group in set(groups):
        assert sum(any(groups[place] == group for place in part) for part in parts) == 1
    with pytest.raises(DataError, match="2 groups"):
        folds(["a", "b"] * 5, 3, seed=0)
    examples = [row(f"question {n}", "a") for n in range(9)]
    guides, judges = halves(examples)
    assert (len(guides), len(judges)) == (5, 4)
    assert not {one.id for one in guides} & {one.id for one in judges}
    with pytest.raises(DataError, match="one group"):
        halves(
            [
                make_example([{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{n}"}], source="f:1", group="g")
                for n in range(4)
            ]
        )


@pytest.mark.parametrize("wrong", [{"drop": 0.0}, {"drop": 1.0}, {"folds": 1}, {"seeds": -1}])
def test_plans_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        ValuePlan(**wrong)  # type: ignore[arg-type]


def simulate(random: np.random.Generator, *, gain: float, seeds: int = 3, rows: int = 60, scatter: float = 0.03) -> Verdict:
    """Six trainings on 60 validation rows of their own difficulty; the kept arm is better by `gain`."""
    difficulty = random.random(rows)
    arms = [KEPT, RANDOM] * seeds
    levels = [0.7 + gain * (arm == KEPT) + scatter * random.standard_normal() for arm in arms]
    right = np.array([(np.where(random.random(rows) < 0.7, difficulty, random.random(rows)) < level) for level in levels], dtype=float)
    weights = row_draws([str(n) for n in range(rows)], draws=400, seed=1)
    return judge_kept(arms, right.mean(1).tolist(), weights @ right.T / rows).verdict


def test_no_difference_is_called_one_in_at_most_five_per_cent() -> None:
    random = np.random.default_rng(0)
    said = [simulate(random, gain=0.0) for _ in range(400)]
    assert sum(one is not Verdict.CANT_TELL for one in said) / 400 <= 0.05
    assert sum(simulate(random, gain=0.25) is Verdict.BETTER for _ in range(50)) >= 45
    assert simulate(random, gain=-0.3) is Verdict.WORSE


def test_one_seed_never_tells() -> None:
    assert judge_kept([KEPT, RANDOM], [0.9, 0.1], np.tile([0.9, 0.1], (100, 1))).verdict is Verdict.CANT_TELL
