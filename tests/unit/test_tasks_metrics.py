import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.tasks import METRICS
from burnish.tasks.metrics import label_of, number_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),  # with lone surrogates, which json escapes
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def score(name: str, prediction: str, reference: str) -> float | None:
    return METRICS[name].score(prediction, reference).value


def reason(name: str, prediction: str, reference: str) -> str | None:
    return METRICS[name].score(prediction, reference).reason


class TestExactMatch:
    @pytest.mark.parametrize(("prediction", "expected"), [("give  the\nlamp ", 1), ("Give the lamp", 0), ("give the lamp.", 0), ("", 0)])
    def test_only_white_space_may_differ(self, prediction, expected):
        assert score("exact_match", prediction, " give the lamp") == expected

    def test_nothing_is_the_right_answer_to_nothing(self):
        assert score("exact_match", " ", "") == 1.0


class TestJsonMatch:
    @pytest.mark.parametrize(
        ("prediction", "reference"),
        [
            ('{"b": 2, "a": [1, {"c": null}]}', ' {"a":[1.0,{"c":null}],"b":2e0}\n'),
            ("1", "1.0"),
            ("0.1", "0.10"),
            ("-0", "0.0"),
            ('"\\u00e9"', '"é"'),
            ("[]", "[ ]"),
            ("1" + "0" * 5000, "1e5000"),
        ],
    )
    def test_same_value_written_differently(self, prediction, reference):
        assert score("json_match", prediction, reference) == 1.0
        assert score("json_field_f1", prediction, reference) == 1.0

    @pytest.mark.parametrize(
        ("prediction", "reference"),
        [
            ("[1, 2]", "[2, 1]"),
            ("true", "1"),
            ("false", "0"),
            ("null", "[]"),
            ("{}", "[]"),
            ('{"a": []}', '{"a": {}}'),
            ('{"a": {}}', "{}"),
            ('"1"', "1"),
            ('{"0": "a"}', '["a"]'),
            ('{"a": 1, "b": 2}', '{"a": 1}'),
            ('{"a.b": 1}', '{"a": {"b": 1}}'),
            ("9007199254740993", "9007199254740992"),  # the same as floats
            ("1e400", "1e401"),  # both infinite as floats
        ],
    )
    def test_different_values(self, prediction, reference):
        assert score("json_match", prediction, reference) == 0.0
        assert score("json_match", reference, prediction) == 0.0

    @pytest.mark.parametrize("text", ['```json\n{"a": 1}\n```', '```\n{"a": 1}```', ' ```json\n\n{"a":\n1}\n\n``` \n'])
    def test_one_fence_is_looked_through(self, text):
        assert METRICS["json_match"].score(text, '{"a": 1}').value == 1

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "is not JSON (Expecting value)"),
            ('```json\n{"a": 1', "is not JSON (Expecting value)"),
            ('text ```json\n{"a": 1}\n```', "is not JSON (Expecting value)"),
            ('{"a": 1} and more', "is not JSON (Extra data)"),
            ("{'a': 1}", "is not JSON (Expecting property name enclosed in double quotes)"),
            ('{"a": NaN}', "is not JSON (NaN is no JSON number)"),
            ("-Infinity", "is not JSON (-Infinity is no JSON number)"),
            ('{"a": 1, "a": 1}', "is JSON with a duplicate key"),
            ("[" * 101 + "]" * 101, "is JSON nested deeper than 100 levels"),
            ("[" * 50_000, "is JSON nested deeper than 100 levels"),
            ("1e99999999999999999999", "is JSON with a number out of range"),
            ('"' + "x" * 100_000 + '"', "is longer than 100,000 characters"),
        ],
    )
    @pytest.mark.parametrize("name", ["json_match", "json_field_f1"])
    def test_what_cannot_be_read_is_unscored_and_says_why(self, name, text, why):
        assert METRICS[name].score(text, "{}").value is None
        assert reason(name, text, "{}") == f"prediction {why}"
        assert reason(name, "{}", text) == f"reference {why}"
        assert reason(name, text, text) == f"reference {why}", "the reference decides first, whatever the candidate wrote"

    def test_nesting_up_to_the_limit_is_read(self):
        assert score("json_match", "[" * 100 + "]" * 100, "[" * 100 + "]" * 100) == 1.0

    @given(JSON)
    def test_a_value_matches_itself_however_it_is_written(self, value):
        text = json.dumps(value)
        again = json.dumps(value, indent=2, ensure_ascii=False)
        assert score("json_match", again, text) == 1.0
        assert score("json_field_f1", again, text) == 1.0

    @given(JSON, JSON)
    def test_match_is_symmetric_and_agrees_with_the_fields(self, a, b):
        first, second = json.dumps(a), json.dumps(b)
        match, fields = score("json_match", first, second), score("json_field_f1", first, second)
        assert match == score("json_match", second, first)
        assert fields == score("json_field_f1", second, first)
        assert 0.0 <= fields <= 1.0
        assert fields == 1.0 or match == 0.0
        if a != b:  # Python's == calls more values equal (true is 1), so this holds one way
            assert match == 0.0

    @settings(max_examples=300)
    @given(st.text(alphabet=st.sampled_from('{}[]":,0123456789eE+-.truefalsn \\u\ud800'), max_size=60))
    def test_no_text_raises(self, text):
        found = METRICS["json_match"].score(text, '{"a": 1}')
        assert found.scored or found.reason.startswith("prediction is ")


class TestJsonFieldF1:
    def test_one_item_left_out_does_not_make_the_following_wrong(self):
        assert score("json_field_f1", "[2, 3, 4]", "[1, 2, 3, 4]") == pytest.approx(2 * 3 / 7)

    def test_repeating_a_value_earns_nothing(self):
        assert score("json_field_f1", "[1, 1, 1, 1]", "[1, 2]") == pytest.approx(2 * 1 / 6)


class TestLabels:
    @pytest.mark.parametrize(
        ("text", "label"),
        [
            (" Yes.\n", "yes"),
            ("NO!", "no"),
            ("Straße", "strasse"),
            ("card  arrival", "card arrival"),
            ("c++", "c++"),
            ("?", "?"),
        ],
    )
    def test_label_of(self, text, label):
        assert label_of(text) == label

    def test_a_sentence_around_the_label_is_not_the_label(self):
        assert score("label_accuracy", "The answer is yes", "yes") == 0.0

    def test_an_empty_reference_is_left_out(self):
        assert reason("label_accuracy", "yes", " ") == "reference is empty"


class TestNumericAnswer:
    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", "18"),
            ("#### 1,234", "1234"),
            ("#### $1,234,567.50.", "1234567.5"),
            ("#### -$5", "-5"),
            ("#### −5", "-5"),
            ("####5", "5"),
            ("#### 7\n\nQuestion: ...\n#### 9", "7"),
            ("#### none\nso 8", "8"),
            ("The answer is 42.", "42"),
            ("It is 50% of 10", "10"),
            ("about 50%", "50"),
            ("10-3", "3"),
            ("(10) - 3", "3"),
            ("x = -3", "-3"),
            (".5", "0.5"),
            ("3e2", "300"),
            ("12,34", "34"),
            ("18.00", "18"),
        ],
    )
    def test_number_of(self, text, number):
        assert number_of(text) == pytest.approx(type(number_of("1"))(number))

    def test_values_are_compared_and_not_spellings(self):
        assert score("numeric_answer", "so it costs $1,200.00.", "#### 1200") == 1.0
        assert score("numeric_answer", "0.1", "#### 0.10") == 1.0
        assert score("numeric_answer", "1200.01", "#### 1200") == 0.0

    def test_more_digits_than_a_float_holds_count(self):
        assert score("numeric_answer", "9" * 5000 + "1", "9" * 5000 + "2") == 0.0

    def test_no_number_is_unscored(self):
        assert reason("numeric_answer", "I do not know", "#### 3") == "prediction has no number"
        assert reason("numeric_answer", "3", "unknown") == "reference has no number"


@pytest.mark.parametrize(
    ("name", "reference", "why"),
    [
        ("rouge_l", "!!! …", "reference has no words"),
        ("rouge_1", "", "reference has no words"),
        ("bleu", " \n", "reference is empty"),
        ("chrf", "", "reference is empty"),
        ("edit_similarity", "x" * 100_001, "reference is longer than 100,000 characters"),
    ],
)
def test_a_reference_that_nothing_can_match_is_left_out(name, reference, why):
    assert reason(name, reference, reference) == why


@given(st.text(), st.text())
@pytest.mark.parametrize("name", [name for name in METRICS if not name.startswith("json")])
def test_any_two_texts_give_a_score_in_range_or_a_reason(name, prediction, reference):
    found = METRICS[name].score(prediction, reference)
    assert (found.value is None) != (found.reason is None)
    assert found.value is None or 0.0 <= found.value <= 1.0
    assert METRICS[name].score(reference, reference).value in (None, pytest.approx(1.0))
