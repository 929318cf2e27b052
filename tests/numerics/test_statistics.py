"""Every interval and test against scipy, a count by hand, or a simulation of what it promises."""

import math
import time

import numpy as np
import pytest
from scipy import stats

from burnish.tasks import (
    METRICS,
    bootstrap_interval,
    build_comparisons,
    compare,
    compare_corpus,
    corpus_bootstrap,
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    sign_flip_test,
    statistics,
    wilson,
)
from burnish.tasks.metrics import macro_f1
from burnish.types import Verdict


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 60), (60, 60), (1, 24), (9, 24), (77, 150), (999, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(successes, n, confidence):
    peer = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx((peer.low, peer.high), abs=1e-12)


def right_wrong(only_a: int, only_b: int, both: int = 30, neither: int = 30) -> tuple[list[float], list[float]]:
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * both + [0.0] * neither
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * both + [0.0] * neither
    return a, b


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (8, 2), (10, 10), (40, 25), (0, 150)])
def test_mcnemar_equals_the_sum_of_binomial_terms(only_a, only_b):
    n, fewer = only_a + only_b, min(only_a, only_b)
    by_hand = min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    a, b = right_wrong(only_a, only_b)
    assert mcnemar_exact(a, b) == pytest.approx(by_hand, rel=1e-9)
    assert mcnemar_exact(b, a) == mcnemar_exact(a, b)
    assert mcnemar_exact(a, b) == pytest.approx(mcnemar_exact(*right_wrong(only_a, only_b, 0, 1)), rel=1e-12)


@pytest.mark.parametrize("n", [40, 150])
def test_bootstrap_equals_scipy(n):
    rng = np.random.default_rng(5)
    a = rng.beta(4, 2, n)
    b = np.clip(a - 0.05 + rng.normal(0, 0.15, n), 0, 1)
    ours = paired_bootstrap(a, b, seed=1)
    peer = stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9_999,
        rng=2,
    ).confidence_interval
    width = peer.high - peer.low
    assert ours == pytest.approx((peer.low, peer.high), abs=0.05 * width)
    bca = stats.bootstrap((a - b,), np.mean, method="BCa", n_resamples=9_999, rng=3).confidence_interval
    assert ours == pytest.approx((bca.low, bca.high), abs=0.08 * width), "percentile was chosen because BCa is no different"
    # And the t interval, which rests on no random numbers at all.
    half = stats.t.ppf(0.975, n - 1) * (a - b).std(ddof=1) / math.sqrt(n)
    assert ours == pytest.approx(((a - b).mean() - half, (a - b).mean() + half), abs=0.08 * width)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(600):
        low, high = bootstrap_interval(rng.binomial(1, 0.3, 120) * 1.0, resamples=400, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.92 <= hits / 600 <= 0.98  # 0.95 with a standard error of 0.009


def test_bootstrap_is_the_same_in_blocks_and_at_once(monkeypatch):
    rows = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(rows, resamples=500, seed=3)
    monkeypatch.setattr("burnish.tasks.statistics._CELLS", 50 * 7)
    assert bootstrap_interval(rows, resamples=500, seed=3) == whole


@pytest.mark.parametrize("n", [3, 8, 12])
def test_sign_flip_equals_scipy_where_both_count_every_pattern(n):
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.random(n) * 0.8
    peer = stats.permutation_test((a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(a, b) == pytest.approx(peer.pvalue, abs=1e-12)


def test_sign_flip_equals_scipy_where_both_draw():
    rng = np.random.default_rng(3)
    a, b = rng.random(60) + 0.1, rng.random(60)
    peer = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=50_000, rng=1
    ).pvalue
    assert 0.005 < peer < 0.5, "a p-value that the draws can tell from its neighbours"
    assert sign_flip_test(a, b, resamples=50_000, seed=2) == pytest.approx(peer, abs=4 * math.sqrt(peer / 50_000))


@pytest.mark.parametrize("n", [30, 120])
def test_studentized_p_is_that_of_the_t_test_where_differences_are_normal(n):
    """Second source: Student's t. For normal differences the two test the same; 20,000 draws leave them about a tenth apart at p = 0.05."""
    for shift in (0.1, 0.2, 0.35):
        differences = np.random.default_rng([5, n]).normal(0, 1, n)
        differences = (differences - differences.mean()) / differences.std() + shift
        peer = stats.ttest_1samp(differences, 0).pvalue
        ours = statistics.studentized_test(differences, np.zeros(n), resamples=20_000)
        assert ours == pytest.approx(peer, rel=0.35, abs=0.004)


def test_studentized_test_by_hand_and_at_its_edges():
    """Two rows, 1 and 3: mean 2, error 1. Draws (1,1), (1,3), (3,1), (3,3): t* = −∞, 0, 0, +∞; one in four is above 2, so p = 2/4."""
    assert statistics.studentized_test([1, 3], [0, 0], resamples=4_000) == pytest.approx(0.5, abs=0.05)
    assert statistics.studentized_test([1, 1, 0], [1, 1, 0]) == 1
    assert statistics.studentized_test([1.0], [0.0]) == 1
    assert statistics.studentized_test([1, 0, 1, 0], [0, 1, 0, 1]) == 1
    one_a_group = [str(number) for number in range(40)]
    a = np.random.default_rng(1).normal(0.2, 1, 40)
    assert statistics.studentized_test(a, np.zeros(40), groups=one_a_group) == statistics.studentized_test(a, np.zeros(40))


def test_sign_flips_of_right_and_wrong_rows_are_mcnemar():
    a, b = right_wrong(9, 2)
    assert sign_flip_test(a, b) == pytest.approx(mcnemar_exact(a, b), rel=1e-9)
    a, b = right_wrong(30, 15)
    assert sign_flip_test(a, b, resamples=100_000) == pytest.approx(mcnemar_exact(a, b), abs=0.003)


def test_sign_flip_counts_sums_that_are_equal_but_for_rounding():
    a, b = [0.1, 0.2, 0.3, 0.3], [0.0, 0.0, 0.0, 0.0]
    # |sum| >= 0.9 only with all signs equal: 2 of 16. In floats 0.1 + 0.2 + 0.3 + 0.3 depends on the order of adding.
    assert sign_flip_test(a, b) == 2 / 16
    assert sign_flip_test(a[::-1], b) == 2 / 16


def test_sign_flip_never_gives_zero():
    assert sign_flip_test([1.0] * 200, [0.0] * 200, resamples=999) == 1 / 1000


def test_holm_by_hand():
    # Sorted .005 .01 .03 .04 times 4 3 2 1 gives .02 .03 .06 .04; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def draw_pairs(rng: np.random.Generator, n: int, baseline: float, gain: float) -> tuple[np.ndarray, np.ndarray]:
    return (rng.random(n) < baseline + gain) * 1.0, (rng.random(n) < baseline) * 1.0


@pytest.mark.parametrize(("n", "baseline"), [(150, 0.5), (200, 0.3), (500, 0.5), (200, 0.05)])
def test_detectable_difference_has_the_power_it_says(n, baseline):
    gain = detectable_difference(n, baseline=baseline)
    rng = np.random.default_rng(n)
    power = np.mean([mcnemar_exact(*draw_pairs(rng, n, baseline, gain)) < 0.05 for _ in range(1500)])
    assert 0.75 <= power <= 0.85


def test_detectable_difference_of_a_mean_has_the_power_it_says():
    gain = detectable_difference(100, spread=0.3)
    assert gain == pytest.approx((1.959964 + 0.841621) * 0.3 / 10, rel=1e-5)
    rng = np.random.default_rng(1)
    p_values = [sign_flip_test(rng.normal(gain, 0.3, 100), np.zeros(100), resamples=400, seed=t) for t in range(600)]
    assert 0.75 <= np.mean(np.array(p_values) < 0.05) <= 0.85


def test_detectable_difference_solves_connors_formula():
    gain = detectable_difference(200)  # both right by chance: half of the rows differ
    needed = ((1.959964 * math.sqrt(0.5) + 0.841621 * math.sqrt(0.5 - gain**2)) / gain) ** 2
    assert needed == pytest.approx(200, rel=1e-4)


def test_detectable_difference_moves_the_right_way():
    assert detectable_difference(400) < detectable_difference(100)
    assert detectable_difference(200, comparisons=3) > detectable_difference(200)
    assert detectable_difference(200, correlation=0.5) < detectable_difference(200)
    assert detectable_difference(200, power=0.9) > detectable_difference(200)
    assert detectable_difference(7) is None
    assert detectable_difference(200, baseline=0.99) is None
    assert detectable_difference(200, baseline=1.0) is None


def test_of_a_thousand_runs_without_any_difference_at_most_five_in_a_hundred_claim_one():
    """The promise to the user: three baselines, 150 rows of unequal difficulty, as real ones are, one verdict table."""
    rng = np.random.default_rng(2026)
    claims = 0
    for trial in range(1000):
        chance = rng.beta(1.5, 1.5, 150)
        scores = {name: ((rng.random(150) < chance) * 1.0).tolist() for name in ("tuned", "base", "few_shot", "retrieved")}
        found = build_comparisons(
            scores,
            "tuned",
            baselines=["base", "few_shot", "retrieved"],
            metric=METRICS["exact_match"],
            resamples=200,
            seed=trial,
        )
        claims += any(comparison.verdict is not Verdict.CANT_TELL for comparison in found)
    assert claims <= 50
    assert claims > 0, "a verdict that never comes is not careful but broken"


def test_a_real_difference_is_found():
    rng = np.random.default_rng(4)
    better = [compare(*draw_pairs(rng, 150, 0.3, 0.3), binary=True, resamples=500, seed=t) for t in range(100)]
    assert sum(found.p_value < 0.05 and found.low > 0 for found in better) >= 97


def labels_like(rng: np.random.Generator, references: list[str], accuracy: float) -> list[str]:
    return [label if rng.random() < accuracy else str(rng.choice(list("abc"))) for label in references]


def test_corpus_bootstrap_of_a_mean_is_the_bootstrap_of_its_rows():
    rng = np.random.default_rng(0)
    references = list(rng.choice(list("abc"), 100))
    first, second = labels_like(rng, references, 0.8), labels_like(rng, references, 0.4)

    def accuracy(predictions, truth):
        return sum(x == y for x, y in zip(predictions, truth, strict=True)) / len(truth)

    rows = [[float(x == y) for x, y in zip(column, references, strict=True)] for column in (first, second)]
    options = {"resamples": 2_000, "seed": 1}
    one = corpus_bootstrap(accuracy, first, references=references, **options)
    assert one == pytest.approx(bootstrap_interval(rows[0], **options), abs=0.02)
    two = corpus_bootstrap(accuracy, first, references=references, against=second, **options)
    assert two == pytest.approx(paired_bootstrap(*rows, **options), abs=0.02)
    found = compare_corpus(accuracy, first, baseline=second, references=references, **options)
    assert found.difference == pytest.approx(np.mean(rows[0]) - np.mean(rows[1]))
    assert found.p_value == pytest.approx(1 / 2_001)


def test_corpus_comparison_of_equals_is_not_significant_too_often():
    rng = np.random.default_rng(8)
    alarms = 0
    for trial in range(150):
        references = list(rng.choice(list("abc"), 60, p=[0.6, 0.3, 0.1]))
        first, second = labels_like(rng, references, 0.5), labels_like(rng, references, 0.5)
        found = compare_corpus(macro_f1, first, baseline=second, references=references, resamples=60, seed=trial)
        alarms += found.p_value < 0.05
    assert alarms <= 15  # 7.5 expected; 16 or more once in 300 such tests


def test_ten_thousand_resamples_of_two_thousand_rows_stay_within_seconds():
    rows = np.random.default_rng(0).random(2_000)
    started = time.process_time()
    compare(rows, rows[::-1], binary=False)
    assert time.process_time() - started < 5


def test_rows_of_one_group_are_not_independent() -> None:
    """Four users with a hundred rows each: evidence of four, whatever the rows say."""
    random = np.random.default_rng(0)
    groups = [f"user{index // 100}" for index in range(400)]
    a, b = np.ones(400), np.zeros(400)
    b[:100] = 1  # the first user is served alike by both
    alone, grouped = statistics.compare(a, b, binary=True), statistics.compare(a, b, binary=True, groups=groups)
    assert alone.p_value < 1e-50
    assert grouped.p_value >= 2 / 8  # three users differ: both all-plus and all-minus of 2**3 patterns; the bootstrap-t knows less still
    assert grouped.high - grouped.low > 5 * (alone.high - alone.low)
    one_each = [str(index) for index in range(400)]
    noisy = random.integers(0, 2, 400)
    assert statistics.compare(noisy, b, binary=True, groups=one_each) == statistics.compare(noisy, b, binary=True)


def test_group_bootstrap_against_scipy() -> None:
    """Groups of equal size: drawing groups is drawing their means, which scipy's bootstrap does."""
    random = np.random.default_rng(1)
    means = random.normal(0.3, 0.2, 40)
    values = np.clip(np.repeat(means, 5) + random.normal(0, 0.02, 200), 0, 1)
    groups = [str(index // 5) for index in range(200)]
    ours = statistics.bootstrap_interval(values, groups=groups, resamples=20_000)
    theirs = stats.bootstrap((values.reshape(40, 5).mean(1),), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_effective_rows() -> None:
    groups = [str(index // 10) for index in range(200)]
    same = np.repeat(np.tile([0.0, 1.0], 10), 10)  # a group is right or wrong as a whole: worth its number of groups
    assert statistics.effective_rows(same, groups) == pytest.approx(20, rel=0.06)
    independent = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    assert statistics.effective_rows(independent, groups) > 100
    assert statistics.effective_rows(np.zeros(200), groups) == 20
    assert statistics.effective_rows(independent, None) == 200


def test_null_comparisons_in_groups_stay_below_the_error_rate() -> None:
    """1,000 comparisons without a true difference, 150 rows in 40 groups that go right together: at most 5 % are called."""
    random = np.random.default_rng(7)
    called = 0
    for _ in range(1000):
        group = np.sort(random.integers(0, 40, 150))
        hard, mood_a, mood_b = random.random(40), random.normal(0, 0.3, 40), random.normal(0, 0.3, 40)
        a = (random.random(150) < np.clip(hard + mood_a, 0, 1)[group]).astype(float)
        b = (random.random(150) < np.clip(hard + mood_b, 0, 1)[group]).astype(float)
        found = statistics.compare(a, b, binary=True, groups=[str(g) for g in group], resamples=300)
        called += statistics.verdict(found.difference, found.low, found.high, found.p_value) != Verdict.CANT_TELL
    assert called <= 60  # 5 % of 1,000 and a little noise
