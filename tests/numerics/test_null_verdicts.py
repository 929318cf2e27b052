"""A verdict where there is none to be had: of 2,000 comparisons between candidates that are equally good, BETTER or WORSE comes out at most 5 % of the time.

Whole comparisons are simulated, as `burnish compare` makes them: one trained candidate against one or three baselines on the same rows, paired tests,
Holm over the baselines, the verdict of each pair (`any`: one false claim anywhere in the family counts) and the run's own (`evaluation.compare.overall`).
The rates are in docs/statistics.md; `python tests/numerics/test_null_verdicts.py` prints them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from burnish.evaluation.compare import overall
from burnish.tasks import METRICS, build_comparisons, compare_corpus, judge
from burnish.types import Comparison, Verdict

SIMULATIONS, CORPUS_SIMULATIONS = 2000, 1000  # of 1,000, a rate of 4 % comes out above 5 % once in fifteen tries
RESAMPLES = 400  # a recipe's default is 10,000; with few draws p-values and intervals wander, which is the harder case
LIMIT = 0.05
Scores = tuple[NDArray[np.float64], list[str] | None]  # (candidates, rows) and the rows' groups


def right_or_wrong(random: np.random.Generator, candidates: int) -> Scores:
    """150 rows of all difficulties; whoever answers is right with the row's own probability."""
    return (random.random((candidates, 150)) < random.beta(1.2, 1.2, 150)).astype(float), None


def hardly_ever_right(random: np.random.Generator, candidates: int) -> Scores:
    """40 rows, one in twelve right: few rows tell the candidates apart."""
    return (random.random((candidates, 40)) < 1 / 12).astype(float), None


def graded(random: np.random.Generator, candidates: int) -> Scores:
    """100 rows with values in 0..1, many of them exactly 0 or 1, as F1 of an answer has them; rows that are hard are hard for all."""
    hard = random.beta(1, 1, 100)
    return np.clip(hard + random.normal(0, 0.35, (candidates, 100)), 0, 1), None


def graded_askew(random: np.random.Generator, candidates: int) -> Scores:
    """60 rows on which the candidates differ in form: the trained one gains a lot on few rows and loses a little on many, nothing on the whole."""
    scores = random.normal(0.5, 0.02, (candidates, 60))
    scores[0] += (random.exponential(1.0, 60) - 1) / 8
    return scores, None


def in_groups(random: np.random.Generator, candidates: int) -> Scores:
    """200 rows of 40 users; a candidate has its own luck with each user, which all of that user's rows share."""
    users = np.sort(random.integers(0, 40, 200))
    luck = np.clip(random.beta(1.5, 1.5, 40) + random.normal(0, 0.2, (candidates, 40)), 0, 1)
    return (random.random((candidates, 200)) < luck[:, users]).astype(float), [f"user {user}" for user in users]


def graded_in_groups(random: np.random.Generator, candidates: int) -> Scores:
    """90 rows of 18 templates, with values in 0..1."""
    templates = np.sort(random.integers(0, 18, 90))
    luck = random.beta(2, 2, 18) + random.normal(0, 0.15, (candidates, 18))
    values = luck[:, templates] + random.normal(0, 0.1, (candidates, 90))
    return np.clip(values, 0, 1), [f"template {template}" for template in templates]


WORLDS: dict[str, tuple[Callable[[np.random.Generator, int], Scores], str]] = {
    "right or wrong": (right_or_wrong, "exact_match"),
    "hardly ever right": (hardly_ever_right, "exact_match"),
    "graded": (graded, "rouge_l"),
    "graded, askew": (graded_askew, "rouge_l"),
    "right or wrong, in groups": (in_groups, "exact_match"),
    "graded, in groups": (graded_in_groups, "rouge_l"),
}


def claims(made: list[Comparison], means: NDArray[np.float64]) -> tuple[bool, bool]:
    """(a false claim in any pair, a false claim of the run)."""
    candidates = {f"baseline {number}": {"score": mean} for number, mean in enumerate(means[1:])}
    return any(item.verdict is not Verdict.CANT_TELL for item in made), overall(made, candidates) is not Verdict.CANT_TELL


def rates(world: str, baselines: int, simulations: int = SIMULATIONS) -> tuple[float, float]:
    """(share of simulations with a false claim in any pair, share with a false verdict of the run)."""
    make, metric = WORLDS[world]
    names = [f"baseline {number}" for number in range(baselines)]
    found = np.zeros(2)
    for trial in range(simulations):
        scores, groups = make(np.random.default_rng([trial, baselines]), baselines + 1)
        by_name = dict(zip(["tuned", *names], scores, strict=True))
        made = build_comparisons(by_name, "tuned", baselines=names, metric=METRICS[metric], groups=groups, resamples=RESAMPLES, seed=trial)
        found += claims(made, scores.mean(1))
    return tuple(found / simulations)


def corpus_rates(baselines: int, simulations: int = CORPUS_SIMULATIONS) -> tuple[float, float]:
    """The same of a metric of the whole corpus: the share of all words that are right, whatever row they stand in."""

    def share(predictions: Sequence[str], references: Sequence[str]) -> float:
        return "".join(predictions).count("x") / len("".join(references))

    names = [f"baseline {number}" for number in range(baselines)]
    found = np.zeros(2)
    for trial in range(simulations):
        random = np.random.default_rng([trial, baselines])
        lengths, hard = random.integers(2, 12, 40), random.beta(1, 1, 40)
        references = ["x" * length for length in lengths]
        texts = {
            name: [
                "".join("x" if random.random() < chance else "y" for _ in range(length))
                for length, chance in zip(lengths, hard, strict=True)
            ]
            for name in ["tuned", *names]
        }
        differences = {
            name: compare_corpus(share, texts["tuned"], baseline=texts[name], references=references, resamples=199, seed=trial)
            for name in names
        }
        means = np.array([share(texts[name], references) for name in ["tuned", *names]])
        found += claims(judge(differences, "tuned", metric="share"), means)
    return tuple(found / simulations)


FAMILY = pytest.param(3, marks=pytest.mark.long)  # a minute together; one of a family runs always


@pytest.mark.parametrize(("world", "baselines"), [*((world, 1) for world in WORLDS), ("graded, in groups", 3)])
def test_thousands_of_null_comparisons_claim_a_difference_at_most_five_times_in_a_hundred(world: str, baselines: int) -> None:
    anywhere, of_the_run = rates(world, baselines)
    assert anywhere <= LIMIT
    assert of_the_run <= anywhere


@pytest.mark.parametrize("baselines", [FAMILY])
@pytest.mark.parametrize("world", [world for world in WORLDS if world != "graded, in groups"])
def test_families_claim_no_more(world: str, baselines: int) -> None:
    assert rates(world, baselines)[0] <= LIMIT


@pytest.mark.parametrize("baselines", [1, FAMILY])
def test_null_comparisons_of_a_corpus_metric(baselines: int) -> None:
    anywhere, of_the_run = corpus_rates(baselines)
    assert anywhere <= LIMIT
    assert of_the_run <= anywhere


def test_the_simulation_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Holm three baselines claim too much; with the rows of a user taken for independent, one does."""
    monkeypatch.setattr("burnish.tasks.statistics.holm", list)
    assert rates("right or wrong, in groups", 3, 300)[0] > LIMIT
    monkeypatch.undo()
    monkeypatch.setitem(WORLDS, "ungrouped", (lambda random, candidates: (in_groups(random, candidates)[0], None), "exact_match"))
    assert rates("ungrouped", 1, 300)[0] > LIMIT


if __name__ == "__main__":
    for name in WORLDS:
        print(f"{name:28s} " + "   ".join("{:.3f} {:.3f}".format(*rates(name, count)) for count in (1, 3)), flush=True)
    print(f"{'corpus':28s} " + "   ".join("{:.3f} {:.3f}".format(*corpus_rates(count)) for count in (1, 3)))
