"""Every metric against a second source: sacrebleu, rouge-score, scikit-learn, a textbook recursion, a count by hand."""

import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score, precision_recall_fscore_support

from burnish.tasks import METRICS, json_fields, measure
from burnish.tasks.metrics import corpus_bleu, corpus_chrf, macro_f1

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "under",
    "mat",
    "tree,",
    "and",
    "it's",
    "12.5",
    "Home.",
    "state-of-the-art",
]


def sentences(seed: int, count: int = 60) -> tuple[list[str], list[str]]:
    """References, and predictions that are edits of them, so that scores spread over 0..1."""
    rng = random.Random(seed)
    references = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(count)]
    predictions = []
    for reference in references:
        kept = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference.split() if rng.random() < 0.9]
        predictions.append(" ".join(kept))
    return predictions, references


@pytest.mark.parametrize(("name", "peer"), [("rouge_l", "rougeL"), ("rouge_1", "rouge1")])
def test_rouge_equals_rouge_score(name, peer):
    scorer = RougeScorer([peer], use_stemmer=False)
    found = []
    for prediction, reference in zip(*sentences(1, 200), strict=True):
        found.append(METRICS[name].score(prediction, reference).value)
        assert found[-1] == pytest.approx(scorer.score(reference, prediction)[peer].fmeasure, abs=1e-12)
    assert len(set(found)) > 50  # the comparison saw more than zeros and ones


def test_rouge_l_by_hand():
    # "the cat the mat" is common: 4 of 5 words given, 4 of 6 expected; F1 = 2 * 4 / 11.
    score = METRICS["rouge_l"].score("the cat the big mat", "the cat sat on the mat")
    assert score.value == pytest.approx(8 / 11)


def test_rouge_reads_scripts_that_rouge_score_drops():
    assert RougeScorer(["rougeL"]).score("кошка сидит", "кошка сидит")["rougeL"].fmeasure == 0.0
    assert METRICS["rouge_l"].score("кошка сидит", "кошка сидит").value == 1.0
    assert METRICS["rouge_1"].score("東京", "東北").value == 0.5  # one of two characters


@pytest.mark.parametrize("seed", [1, 2])
def test_bleu_and_chrf_equal_sacrebleu(seed):
    predictions, references = sentences(seed)
    assert corpus_bleu(predictions, references) == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score / 100, abs=1e-12)
    assert corpus_chrf(predictions, references) == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score / 100, abs=1e-12)
    for prediction, reference in zip(predictions, references, strict=True):
        row = METRICS["bleu"].score(prediction, reference).value
        assert row == pytest.approx(min(1, sacrebleu.sentence_bleu(prediction, [reference]).score / 100), abs=1e-12)
        row = METRICS["chrf"].score(prediction, reference).value
        assert row == pytest.approx(min(1, sacrebleu.sentence_chrf(prediction, [reference]).score / 100), abs=1e-12)


def test_bleu_of_a_corpus_is_not_the_mean_of_its_rows():
    predictions, references = ["yes", "rain is expected in the south"], ["yes", "snow fell over all of it"]
    rows = [METRICS["bleu"].score(*pair).value for pair in zip(predictions, references, strict=True)]
    assert rows == pytest.approx([1.0, 0.0])
    assert measure(METRICS["bleu"], predictions, references).value == corpus_bleu(predictions, references)
    assert corpus_bleu(predictions, references) < 0.2  # 1 word right of 7, not one row right of two


def test_bleu_of_one_word_answers_is_not_zero():
    assert sacrebleu.corpus_bleu(["yes", "no"], [["yes", "no"]]).score == 0.0
    assert corpus_bleu(["yes", "no"], ["yes", "no"]) == pytest.approx(1.0)


def levenshtein(a: str, b: str) -> int:
    """The textbook recursion (Wagner & Fischer 1974)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_edit_similarity_equals_the_textbook_recursion():
    assert METRICS["edit_similarity"].score("kitten", "sitting").value == pytest.approx(1 - 3 / 7)
    for prediction, reference in zip(*sentences(4), strict=True):
        expected = 1 - levenshtein(prediction, reference) / max(len(prediction), len(reference))
        assert METRICS["edit_similarity"].score(prediction, reference).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_scikit_learn(seed):
    rng = random.Random(seed)
    references = rng.choices("abcd", weights=[60, 30, 9, 1], k=120)
    predictions = [label if rng.random() < 0.6 else rng.choice("abcdxyz") for label in references]
    expected = f1_score(references, predictions, labels=sorted(set(references)), average="macro", zero_division=0)
    assert macro_f1(predictions, references) == pytest.approx(expected, abs=1e-12)


def test_macro_f1_by_hand():
    # yes: 2 right of 3 given and 2 expected, F1 4/5. no: 1 right of 1 given and 2 expected, F1 2/3.
    assert macro_f1(["Yes.", "yes", "no", "YES"], ["yes", "yes", "no", "no"]) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_an_invented_label_is_a_miss_and_not_a_class():
    # a: F1 1. b: F1 0. As a class of its own the essay would make it 1/3.
    assert macro_f1(["a", "I think that b"], ["a", "b"]) == pytest.approx(1 / 2)


def test_json_field_f1_by_hand():
    # Given: intent (right), area (wrong), name (right). Expected: intent, area, name, level. So 2 of 3 and 2 of 4.
    prediction = '{"slots": {"name": "lamp", "area": "hall"}, "intent": "on"}'
    reference = '{"intent": "on", "slots": {"area": "kitchen", "name": "lamp", "level": 3}}'
    assert METRICS["json_field_f1"].score(prediction, reference).value == pytest.approx(2 * 2 / (3 + 4))


def test_json_fields_by_hand():
    predictions = [
        '{"intent": "on", "area": "hall"}',
        "no JSON",
        '{"intent": "on", "rooms": [{"n": 1}, {"n": 2}]}',
        "{}",
    ]
    references = ['{"intent": "on", "area": "hall"}', '{"intent": "on"}', '{"intent": "off", "rooms": [{"n": 2}]}', "?"]
    fields = json_fields(predictions, references)
    assert list(fields) == ["intent", "area", "rooms[].n"]
    intent = fields["intent"]  # given twice, once right; expected three times; the last row is left out
    assert (intent.precision, intent.recall, intent.support) == (1 / 2, 1 / 3, 3)
    assert intent.f1 == pytest.approx(2 / 5)
    rooms = fields["rooms[].n"]  # {1, 2} given, {2} expected
    assert (rooms.precision, rooms.recall, rooms.support) == (1 / 2, 1.0, 1)


def test_json_fields_equal_scikit_learn_on_a_single_value():
    rng = random.Random(7)
    truth = [rng.random() < 0.5 for _ in range(200)]
    given = [value if rng.random() < 0.8 else not value for value in truth]
    as_json = (
        [['{"other": 0}', '{"flag": true}'][value] for value in truth],
        [['{"other": 0}', '{"flag": true}'][value] for value in given],
    )
    flag = json_fields(as_json[1], as_json[0])["flag"]
    precision, recall, f1, _ = precision_recall_fscore_support(truth, given, average="binary")
    assert (flag.precision, flag.recall, flag.f1) == pytest.approx((precision, recall, f1))
    assert flag.support == sum(truth)
