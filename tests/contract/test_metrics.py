"""What every entry of METRICS keeps to, whatever it measures. A new metric needs a sample below at most."""

import time

import pytest

from burnish.tasks import METRICS, TASKS, headline, measure, score_rows, values

# References that a metric can read, and answers that are wrong but readable.
SAMPLES = {
    "json_match": ['{"intent": "on", "slots": {"area": "kitchen"}}', "[1, 2]", "{}"],
    "json_field_f1": ['{"intent": "on", "slots": {"area": "kitchen"}}', "[1, 2]", "{}"],
    "numeric_answer": ["6 times 7 is 42\n#### 42", "-3.50", "It costs $1,200."],
    "label_accuracy": ["card_arrival", "Refund", "yes"],
    "macro_f1": ["card_arrival", "Refund", "yes"],
}
TEXTS = ["the cat sat on the mat", "Straße nach 東京", "one"]

HOSTILE = [
    "",
    " \n\t ",
    "\x00",
    "[" * 100_000,
    "[" * 90_000 + "]" * 90_000,
    '{"a":' * 50_000 + "1" + "}" * 50_000,
    "[" * 500 + "]" * 500,
    "9" * 5_000,
    "9" * 99_999,
    "1e999999999",
    "1e99999999999999999999999999",
    "[1e99999999999999999999999999]",
    "NaN",
    '{"a": Infinity}',
    '{"a": 1, "a": 2}',
    '{"a": "\\ud800"}',
    "\ud800\udfff \udc00",
    "\u2028\u0085\x1c",
    "é" * 50_000 + "ͯ" * 40_000,
    "#### " * 20_000,
    "1," * 50_000,
    "1,111" * 20_000,
    "-" * 99_999,
    "a b " * 24_000,
    "x" * 1_000_000,
    "[" + "1," * 499_999 + "1]",
    "<script>alert(1)</script>",
    "(((((" * 19_000,
]


def samples(name: str) -> list[str]:
    return SAMPLES.get(name, TEXTS)


@pytest.mark.parametrize("name", METRICS)
class TestEveryMetric:
    def test_is_filed_under_its_own_name_and_explained(self, name):
        metric = METRICS[name]
        assert metric.name == name
        assert metric.title
        assert metric.reads.endswith(".")
        assert not (metric.binary and metric.corpus), "Wilson and McNemar would be wrong for a corpus number"

    def test_perfect_answers_score_one(self, name):
        metric, texts = METRICS[name], samples(name)
        assert values(score_rows(metric, texts, texts)) == [1.0] * len(texts)
        found = measure(metric, texts, texts)
        assert found.value == pytest.approx(1.0, abs=1e-12)
        assert (found.n, found.unscored, found.left_out) == (len(texts), 0, 0)

    def test_wrong_answers_score_less_and_stay_in_range(self, name):
        metric, texts = METRICS[name], samples(name)
        wrong = texts[1:] + texts[:1]
        scores = score_rows(metric, wrong, texts)
        assert all(score.scored and 0.0 <= score.value < 1.0 for score in scores)
        assert measure(metric, wrong, texts).value < 0.9
        if metric.binary:
            assert values(scores) == [0.0] * len(texts)

    def test_an_empty_answer_is_never_right(self, name):
        metric, texts = METRICS[name], samples(name)
        assert values(score_rows(metric, [""] * len(texts), texts)) == [0.0] * len(texts)
        assert measure(metric, [""] * len(texts), texts).value == 0.0

    def test_hostile_answers_never_raise_and_never_stall(self, name):
        metric, reference = METRICS[name], samples(name)[0]
        metric.score(reference, reference)  # the import of the metric's library is not its time
        for text in HOSTILE:
            started = time.process_time()
            score = metric.score(text, reference)
            assert time.process_time() - started < 2.0, text[:20]
            assert score.value is None or 0.0 <= score.value < 1.0, text[:20]
            assert score.scored or score.reason.startswith("prediction"), text[:20]
        assert 0.0 <= measure(metric, HOSTILE, [reference] * len(HOSTILE)).value < 1.0

    def test_hostile_references_never_raise_and_leave_the_row_out_for_every_candidate(self, name):
        metric = METRICS[name]
        for text in HOSTILE:
            started = time.process_time()
            left_out = {headline([metric.score(answer, text)]).left_out for answer in (samples(name)[0], "")}
            assert time.process_time() - started < 6.0, text[:20]
            assert len(left_out) == 1, text[:20]

    def test_both_texts_at_the_limit_stay_within_two_seconds(self, name):
        metric = METRICS[name]
        a, b = ("ab cd " * 17_000)[:100_000], ("cd ba " * 17_000)[:100_000]
        started = time.process_time()
        metric.score(a, b)
        assert time.process_time() - started < 2.0

    def test_same_texts_same_score(self, name):
        metric, texts = METRICS[name], samples(name)
        wrong = texts[1:] + texts[:1]
        assert score_rows(metric, wrong, texts) == score_rows(metric, wrong, texts)
        assert measure(metric, wrong, texts) == measure(metric, wrong, texts)


@pytest.mark.parametrize("name", TASKS)
def test_every_kind_of_task_names_metrics_that_exist(name):
    kind = TASKS[name]
    assert {kind.metric, *kind.further_metrics} <= set(METRICS)
    assert kind.metric not in kind.further_metrics
    assert METRICS[kind.metric].corpus is None, "the verdict of a detected task rests on rows"
