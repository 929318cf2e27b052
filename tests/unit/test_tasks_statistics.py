import math

import pytest

from burnish.tasks import (
    METRICS,
    Difference,
    bootstrap_interval,
    build_comparisons,
    compare,
    compare_corpus,
    corpus_bootstrap,
    detectable_difference,
    holm,
    judge,
    mcnemar_exact,
    paired_bootstrap,
    sign_flip_test,
    verdict,
    wilson,
)
from burnish.tasks.metrics import corpus_chrf, macro_f1
from burnish.types import Verdict

PAIRED = [
    paired_bootstrap,
    mcnemar_exact,
    sign_flip_test,
    lambda a, b: compare(a, b, binary=True),
    lambda a, b: compare(a, b, binary=False),
]


@pytest.mark.parametrize("function", PAIRED)
class TestWhatIsRefused:
    def test_unequal_lengths(self, function):
        with pytest.raises(ValueError, match="2 rows against 3"):
            function([0.0, 1.0], [0.0, 1.0, 1.0])

    def test_no_rows(self, function):
        with pytest.raises(ValueError, match="at least one row"):
            function([], [])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_a_number_and_where(self, function, value):
        with pytest.raises(ValueError, match="b: row 1 is not a finite number"):
            function([0.0, 1.0], [0.0, value])


def test_mcnemar_needs_right_or_wrong():
    with pytest.raises(ValueError, match="b: McNemar"):
        mcnemar_exact([1.0, 0.0], [0.5, 0.0])


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_is_a_fraction(confidence):
    for call in (
        lambda: wilson(1, 2, confidence),
        lambda: bootstrap_interval([0.0, 1.0], confidence=confidence),
        lambda: bootstrap_interval([1.0, 1.0], confidence=confidence),
        lambda: detectable_difference(10, confidence=confidence),
    ):
        with pytest.raises(ValueError, match="expected a fraction between 0 and 1"):
            call()


@pytest.mark.parametrize("p_values", [[math.nan], [-0.1], [0.5, 1.1]])
def test_holm_refuses_what_is_no_p_value(p_values):
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        holm(p_values)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"baseline": 1.2}, {"comparisons": 0}, {"correlation": 2}, {"spread": 1.5}])
def test_detectable_difference_refuses_what_is_out_of_range(wrong):
    with pytest.raises(ValueError):
        detectable_difference(**{"n": 100, **wrong})


class TestDegenerateRows:
    def test_one_row_can_never_tell(self):
        for binary in (True, False):
            found = compare([1.0], [0.0], binary=binary)
            assert (found.difference, found.low, found.high, found.p_value) == (1.0, -1.0, 1.0, 1.0)
            assert verdict(found.difference, found.low, found.high, found.p_value) is Verdict.CANT_TELL
        assert compare_corpus(macro_f1, ["a"], baseline=["b"], references=["a"]).p_value == 1.0

    @pytest.mark.parametrize("binary", [True, False])
    def test_equal_candidates(self, binary):
        found = compare([1.0, 0.0] * 50, [1.0, 0.0] * 50, binary=binary)
        assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)

    @pytest.mark.parametrize("binary", [True, False])
    def test_all_rows_won(self, binary):
        few, many = compare([1.0] * 4, [0.0] * 4, binary=binary), compare([1.0] * 40, [0.0] * 40, binary=binary)
        assert (few.low, few.high) == (many.low, many.high) == (1.0, 1.0)
        assert few.p_value == pytest.approx(2 / 2**4)  # four rows cannot tell, however clear
        assert many.p_value < 1e-3

    def test_all_equal_rows_have_an_interval_of_one_point(self):
        assert bootstrap_interval([0.3] * 9) == (0.3, 0.3)


class TestVerdict:
    @pytest.mark.parametrize(
        ("difference", "low", "high", "p", "expected"),
        [
            (0.2, 0.1, 0.3, 0.01, Verdict.BETTER),
            (-0.2, -0.3, -0.1, 0.01, Verdict.WORSE),
            (0.2, 0.1, 0.3, 0.05, Verdict.CANT_TELL),  # p must lie below alpha
            (0.2, 0.0, 0.3, 0.01, Verdict.CANT_TELL),  # the interval touches 0
            (-0.2, -0.3, 0.0, 0.01, Verdict.CANT_TELL),
            (0.0, 0.0, 0.0, 1.0, Verdict.CANT_TELL),
            (0.2, -0.3, -0.1, 0.01, Verdict.CANT_TELL),  # test and interval disagree
        ],
    )
    def test_both_test_and_interval_must_agree(self, difference, low, high, p, expected):
        assert verdict(difference, low, high, p) is expected

    def test_alpha_is_respected(self):
        assert verdict(0.2, 0.1, 0.3, 0.03, alpha=0.01) is Verdict.CANT_TELL

    def test_not_a_number_is_no_verdict(self):
        with pytest.raises(ValueError, match="no verdict"):
            verdict(0.2, math.nan, 0.3, 0.01)


class TestComparisons:
    SCORES = {  # noqa: RUF012
        "tuned": [1.0] * 60 + [0.0] * 40,
        "base": [0.0] * 100,
        "few_shot": [1.0] * 55 + [0.0] * 45,
        "wild": [1.0] * 100,
    }

    def test_each_baseline_once_in_order_with_holm_over_all(self):
        found = build_comparisons(self.SCORES, "tuned", baselines=["few_shot", "base", "wild"], metric=METRICS["exact_match"])
        assert [(c.baseline, c.verdict.value) for c in found] == [
            ("few_shot", "CAN'T TELL"),
            ("base", "BETTER"),
            ("wild", "WORSE"),
        ]
        assert [c.p_adjusted for c in found] == pytest.approx(holm([c.p_value for c in found]))
        first = found[0]
        assert (first.candidate, first.metric, first.n) == ("tuned", "exact_match", 100)
        assert first.difference == pytest.approx(0.05)
        assert first.low <= first.difference <= first.high
        assert first.p_value == pytest.approx(2 / 2**5)  # five rows differ, all one way

    def test_holm_can_take_a_verdict_away(self):
        close = Difference(0.1, 0.01, 0.19, 0.03, 100)
        assert judge({"base": close}, "tuned", metric="m")[0].verdict is Verdict.BETTER
        both = judge({"base": close, "few_shot": close}, "tuned", metric="m")
        assert [c.verdict for c in both] == [Verdict.CANT_TELL] * 2

    def test_a_higher_confidence_asks_for_more(self):
        close = {"base": Difference(0.1, 0.01, 0.19, 0.03, 100)}
        assert judge(close, "tuned", metric="m", confidence=0.99)[0].verdict is Verdict.CANT_TELL

    def test_same_seed_same_numbers(self):
        scores = {"tuned": [0.1, 0.9, 0.4, 0.7] * 20, "base": [0.3, 0.2, 0.9, 0.1] * 20}
        options = {"baselines": ["base"], "metric": METRICS["rouge_l"], "resamples": 300}
        first = build_comparisons(scores, "tuned", seed=1, **options)
        assert first == build_comparisons(scores, "tuned", seed=1, **options)
        assert first != build_comparisons(scores, "tuned", seed=2, **options)

    def test_a_missing_candidate_is_named(self):
        with pytest.raises(ValueError, match="no scores of rag; there are tuned, base"):
            build_comparisons(self.SCORES, "tuned", baselines=["base", "rag"], metric=METRICS["exact_match"])

    def test_rows_cannot_stand_for_a_corpus_metric(self):
        with pytest.raises(ValueError, match="use compare_corpus and judge"):
            build_comparisons(self.SCORES, "tuned", baselines=["base"], metric=METRICS["bleu"])

    def test_a_corpus_metric_goes_through_judge(self):
        references = ["the cat sat on the mat", "a dog ran home", "rain is on its way"] * 10
        worse = ["the cat", "a dog", "rain"] * 10
        difference = compare_corpus(corpus_chrf, references, baseline=worse, references=references, resamples=100)
        (found,) = judge({"base": difference}, "tuned", metric="chrf")
        assert found.verdict is Verdict.BETTER
        assert found.difference == pytest.approx(1 - corpus_chrf(worse, references))

    def test_corpus_functions_refuse_unequal_lengths(self):
        with pytest.raises(ValueError, match="1 predictions for 2 references"):
            corpus_bootstrap(macro_f1, ["a"], references=["a", "b"])
        with pytest.raises(ValueError, match="0, 0 predictions for 0 references"):
            compare_corpus(macro_f1, [], baseline=[], references=[])
