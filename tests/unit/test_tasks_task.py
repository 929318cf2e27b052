import subprocess
import sys

import pytest

from burnish.errors import DataError, RecipeError
from burnish.tasks import (
    METRICS,
    detect_task,
    find_metric,
    headline,
    measure,
    names_code,
    score_rows,
    task_for,
    texts,
    values,
)
from burnish.types import Score

VIGGO = [
    "inform(name[Dirt: Showdown], release_year[2012], esrb[E 10+ (for Everyone 10 and Older)])",
    "request(release_year[2014], specifier[terrible])",
    "give_opinion(name[SpellForce 3], rating[poor], genres[real-time strategy, role-playing])",
] * 10
PROSE = ["The committee met on Tuesday and, after a long debate, agreed to postpone the decision until spring."] * 7 + [
    "Rain is expected in the north, while the south stays dry and warm for the rest of the week."
]


@pytest.mark.parametrize(
    ("references", "kind", "metric"),
    [
        (['{"intent": "on"}', '{"intent": "off"}'] * 50, "json", "json_match"),
        (["[1, 2]"], "json", "json_match"),
        (['{"intent": "on"}', "[1]", "sorry"], "structured", "exact_match"),
        (["2 + 2 = 4\n#### 4", "so $1,200\n#### $1,200", "#### -7"], "numeric", "numeric_answer"),
        (["yes", "no", "Maybe."] * 10, "classification", "label_accuracy"),
        (["1", "2", "3", "4"] * 10, "classification", "label_accuracy"),
        (VIGGO[:3], "structured", "exact_match"),
        (["SELECT runs FROM t WHERE venue = 'a'", "select time from t"], "structured", "exact_match"),
        (["J45.909", "A00.0", "Z99.8"], "structured", "exact_match"),
        ([f"The weather in town number {n} will be mild and a little cloudy." for n in range(30)], "text", "rouge_l"),
        (PROSE, "text", "rouge_l"),
        (["def f(x):\n    return x + 1", "print(f(3))\nprint(f(4))"], "text", "rouge_l"),
    ],
)
def test_the_references_choose_the_metric(references, kind, metric):
    task = detect_task(references)
    assert (task.kind, task.metric) == (kind, metric)
    assert task.reason


def test_one_row_that_is_not_json_is_not_a_json_task():
    assert detect_task(['{"a": 1}'] * 99 + ["{'a': 1}"]).kind != "json"


def test_a_few_rows_without_a_marked_number_leave_a_numeric_task():
    assert detect_task(["so\n#### 4"] * 95 + ["no idea"] * 5).kind == "numeric"
    assert detect_task(["so\n#### 4"] * 94 + ["no idea"] * 6).kind != "numeric"


def test_labels_are_listed_once_as_most_rows_spell_them():
    assert detect_task(["Yes", "yes", "Yes", "no"] * 5).labels == ("Yes", "no")
    assert detect_task(VIGGO[:3]).labels is None


def test_few_rows_or_a_single_answer_are_no_labels():
    assert detect_task(["yes", "no", "maybe"]).labels is None
    assert detect_task(["yes"] * 50).labels is None


def test_no_references_is_an_error():
    with pytest.raises(DataError, match="training split is empty"):
        detect_task([])


def test_a_chosen_metric_comes_first_and_the_detected_ones_follow():
    task = task_for("edit_similarity", ['{"a": 1}'] * 10)
    assert task.metric == "edit_similarity"
    assert task.further_metrics == ("json_match", "json_field_f1")
    assert task.kind == "json"


def test_an_unknown_metric_names_the_nearest_and_all():
    with pytest.raises(RecipeError, match="did you mean rouge_l") as caught:
        task_for("rougeL", ["a"])
    assert all(name in str(caught.value) for name in METRICS)


def test_a_metric_that_can_read_no_reference_is_refused():
    with pytest.raises(RecipeError, match=r"json_match can score none of 2 references .*not JSON"):
        task_for("json_match", ["hello there", "you"])
    assert task_for("json_match", ["hello there", "{}"]).metric == "json_match"


class TestOwnMetric:
    @pytest.fixture
    def own(self, tmp_path):
        def write(source: str, function: str = "rubric") -> str:
            path = tmp_path / "my_metrics.py"
            path.write_text(source)
            return f"{path}:{function}"

        return write

    def test_a_number_a_bool_and_none(self, own):
        name = own(
            "import numpy as np\n"
            "from dataclasses import dataclass\n"
            "@dataclass\nclass Answer:\n    text: 'str'\n"
            "def rubric(prediction, reference):\n"
            "    return {'half': 0.5, 'yes': True, 'numpy': np.float32(0.25), 'none': None}[Answer(prediction).text]\n"
        )
        metric = find_metric(name)
        scores = score_rows(metric, ["half", "yes", "numpy", "none"], ["r"] * 4)
        assert [score.value for score in scores] == [0.5, 1.0, 0.25, None]
        assert values(scores) == [0.5, 1.0, 0.25, 0.0]
        task = task_for(name, ["yes", "no"] * 10)
        assert (task.metric, task.further_metrics) == (name, ("label_accuracy", "macro_f1"))

    @pytest.mark.parametrize("value", ["1.5", "-0.1", "float('nan')", "'1'", "10**400", "[1]", "1j"])
    def test_any_other_value_is_refused(self, own, value):
        metric = find_metric(own(f"def rubric(prediction, reference):\n    return {value}\n"))
        with pytest.raises(RecipeError, match=r"expected a number in 0\.\.1"):
            metric.score("a", "b")

    def test_a_fault_inside_stops_and_shows_the_row(self, own):
        metric = find_metric(own("def rubric(prediction, reference):\n    return prediction['x']\n"))
        with pytest.raises(RecipeError, match=r"raised TypeError: .* for prediction 'the answer'"):
            metric.score("the answer", "b")

    def test_a_file_that_does_not_run(self, own):
        with pytest.raises(RecipeError, match="does not run: SyntaxError"):
            find_metric(own("def rubric(:\n"))
        with pytest.raises(RecipeError, match="does not run: SystemExit"):
            find_metric(own("raise SystemExit(3)\n"))

    def test_a_function_that_is_not_there_names_those_that_are(self, own):
        with pytest.raises(RecipeError, match="has no function rubric; it has judge"):
            find_metric(own("def judge(p, r):\n    return 1\n"))

    def test_a_missing_file_and_a_missing_function_name(self):
        with pytest.raises(RecipeError, match=r"no file nowhere\.py"):
            find_metric("nowhere.py:rubric")
        with pytest.raises(RecipeError, match=r"expected path/to/file\.py:function"):
            find_metric("nowhere.py")
        with pytest.raises(RecipeError, match=r"expected path/to/file\.py:function"):
            find_metric("os:system")

    def test_the_server_can_tell_code_from_names(self):
        assert [names_code(name) for name in ("a.py:f", "a.py", "os:system")] == [True] * 3
        assert not any(names_code(name) for name in METRICS)


class TestHeadline:
    SCORES = (
        Score(1.0),
        Score(None, "prediction is not JSON (Expecting value)"),
        Score(0.5),
        Score(None, "reference is not JSON (Extra data)"),
        Score(None, "prediction is not JSON (Expecting value)"),
        Score(None, "prediction is JSON with a duplicate key"),
    )

    def test_unscored_predictions_count_as_wrong_and_unscorable_rows_not_at_all(self):
        found = headline(self.SCORES)
        assert found.value == pytest.approx(1.5 / 5)
        assert (found.n, found.unscored, found.left_out) == (5, 3, 1)
        assert list(found.reasons.items()) == [
            ("prediction is not JSON (Expecting value)", 2),
            ("prediction is JSON with a duplicate key", 1),
        ]
        assert values(self.SCORES) == [1.0, 0.0, 0.5, 0.0, 0.0]

    def test_candidates_keep_the_same_rows(self):
        metric, references = METRICS["json_match"], ["{}", "not JSON", "[]"]
        one = score_rows(metric, ["{}", "{}", "x"], references)
        two = score_rows(metric, ["x", "not JSON", "[]"], references)
        assert (values(one), values(two)) == ([1.0, 0.0], [0.0, 1.0])

    def test_nothing_to_score_has_no_value(self):
        assert headline([]).value is None
        assert headline([Score(None, "reference is empty")]).value is None
        assert measure(METRICS["macro_f1"], ["a"], [""]).value is None

    def test_a_corpus_metric_leaves_out_and_blanks_the_same_rows(self):
        metric = METRICS["macro_f1"]
        predictions, references = ["a", "b", "x" * 200_000, "a"], ["a", "", "b", "a"]
        scores = score_rows(metric, predictions, references)
        assert texts(scores, predictions, references) == (["a", "", "a"], ["a", "b", "a"])
        found = measure(metric, predictions, references)
        assert found.value == pytest.approx((1.0 + 0.0) / 2)
        assert (found.n, found.unscored, found.left_out) == (3, 1, 1)

    def test_unequal_lengths_are_refused(self):
        with pytest.raises(ValueError, match="2 predictions for 1 references"):
            score_rows(METRICS["exact_match"], ["a", "b"], ["a"])


def test_importing_the_room_brings_nothing_heavy():
    heavy = ("torch", "scipy", "sklearn", "sacrebleu", "nltk")
    code = f"import sys, burnish.tasks; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
