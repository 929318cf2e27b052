"""How one answer is judged: `METRICS`, from name to `Metric`. To add one: a reader, a judge and a line in the table.

A metric reads both texts and judges the two readings. What cannot be read is *unscored* with a reason that begins with
"prediction" or "reference"; the reference is read first, so whether a row counts never depends on the candidate. Model
text is hostile: nothing here raises on any `str`. Texts over `MAX_CHARACTERS` are unscored, because BLEU, chrF, ROUGE-L
and edit distance grow faster than the text.

sacrebleu is imported where it is used: `burnish --help` and `burnish check` must start in well under a second.
"""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any, NoReturn, TypeVar

from burnish.types import Score

MAX_CHARACTERS = 100_000  # two such texts take edit distance 0.35 s, chrF 0.3 s, measured on one core
MAX_DEPTH = 100  # levels of nested JSON

Reading = TypeVar("Reading")
Path = tuple[str | int, ...]  # keys and list positions from the root to a leaf
Leaf = tuple[str, Any]  # kind and value: JSON's true is not 1, and "1" is not 1


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    title: str  # for people
    score: Callable[[str, str], Score]  # (prediction, reference), value in 0..1, higher is better
    corpus: Callable[[Sequence[str], Sequence[str]], float] | None  # 0..1, where the headline is not the mean over rows
    binary: bool  # every row is right or wrong and the headline is their mean: Wilson interval and McNemar's test apply
    reads: str  # one sentence for the report


@dataclass(frozen=True, slots=True)
class FieldScore:
    precision: float  # of the values given for this field, the share that is right; 0 where none was given
    recall: float  # of the values expected, the share that was given
    f1: float
    support: int  # values expected, over all rows


class Unreadable(ValueError):
    """A text is not what the metric needs. The message goes on where "prediction" or "reference" stops."""


def metric_from(
    read: Callable[[str], Reading], judge: Callable[[Reading, Reading], float], *, empty: str | None = None
) -> Callable[[str, str], Score]:
    """The row function of a metric: read both texts, judge (prediction, reference).

    `empty` is the reason to leave out a row whose reference reads as nothing, where that would make a perfect answer
    score 0.
    """

    def score(prediction: str, reference: str) -> Score:
        try:
            expected = read(_bounded(reference))
        except Unreadable as problem:
            return Score(None, f"reference {problem}")
        if empty is not None and not expected:
            return Score(None, f"reference {empty}")
        try:
            given = read(_bounded(prediction))
        except Unreadable as problem:
            return Score(None, f"prediction {problem}")
        return Score(min(1.0, max(0.0, float(judge(given, expected)))))  # sacrebleu gives 100.00000000000004 of 100

    return score


def _bounded(text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"is longer than {MAX_CHARACTERS:,} characters")
    return text


def _same(given: object, expected: object) -> float:
    return float(given == expected)


# Text


def one_spaced(text: str) -> str:
    """`text` without outer white space and with single spaces inside."""
    return " ".join(text.split())


def label_of(text: str) -> str:
    """`text` as a class label: case-folded, single-spaced, without trailing punctuation (`"Yes. "` is `"yes"`)."""
    label = one_spaced(text).casefold()
    return label.rstrip(".,;:!?…。 ") or label


# Han and kana are written without spaces: one character is one word. On ASCII this is rouge-score's own tokenizer,
# which drops every other letter and so gives Russian or Japanese answers 0 without a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _f1(hits: float, given: float, expected: float) -> float:
    return 2 * hits / (given + expected) if given + expected else 0.0


def _rouge_1(given: list[str], expected: list[str]) -> float:
    """F1 of single words (Lin 2004), without stemming."""
    return _f1((Counter(given) & Counter(expected)).total(), len(given), len(expected))


def _rouge_l(given: list[str], expected: list[str]) -> float:
    """F1 of the longest common subsequence of words (Lin 2004).

    rouge-score's own loop needs minutes for long texts, rapidfuzz milliseconds; tests/numerics holds the two equal.
    """
    from rapidfuzz.distance import LCSseq

    return _f1(LCSseq.similarity(given, expected), len(given), len(expected))


def _edit_similarity(given: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer text."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(given, expected))


@cache
def _sacrebleu(name: str) -> Any:
    import sacrebleu

    # effective_order only matters where no answer has four words: without it a perfect corpus of "yes" scores 0.
    return sacrebleu.CHRF() if name == "chrf" else sacrebleu.BLEU(effective_order=True, force=True)


def _bleu(given: str, expected: str) -> float:
    return float(_sacrebleu("bleu").sentence_score(given, [expected]).score) / 100


def _chrf(given: str, expected: str) -> float:
    return float(_sacrebleu("chrf").sentence_score(given, [expected]).score) / 100


def corpus_bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the corpus, 0..1: sacrebleu's default (13a tokens, 4-grams, smoothing "exp"). ValueError without rows."""
    _paired(predictions, references)
    return min(1.0, float(_sacrebleu("bleu").corpus_score(list(predictions), [list(references)]).score) / 100)


def corpus_chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of the corpus, 0..1: sacrebleu's default (6 characters, no words, beta 2). ValueError without rows."""
    _paired(predictions, references)
    return min(1.0, float(_sacrebleu("chrf").corpus_score(list(predictions), [list(references)]).score) / 100)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean F1 over the labels that occur in `references`, 0..1. ValueError without rows.

    A label the model invented is a miss for the right one but no class of its own: each would enter the mean as a zero
    and push a talkative baseline towards 0. Equals scikit-learn's `f1_score(labels=sorted(set(references)),
    average="macro", zero_division=0)`.
    """
    _paired(predictions, references)
    given, expected = [label_of(text) for text in predictions], [label_of(text) for text in references]
    hits = Counter(label for label, right in zip(given, expected, strict=True) if label == right)
    answered, support = Counter(given), Counter(expected)
    return sum(_f1(hits[label], answered[label], count) for label, count in support.items()) / len(support)


def _paired(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; expected one of each per row")


# Numbers

# "-$1,234.50", "3e5". Commas only as thousands: "1,5" is two numbers. A minus after a digit or a bracket is a
# subtraction.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]%])[-−])?[$€£¥]?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?"
)


def number_of(text: str) -> Decimal:
    """The number after the first `####` (GSM8K's form), else the last number of the text. Unreadable without one.

    The first `####`, because a base model may ramble on into a next question. `$`, `%`, thousands commas and a trailing
    period are no part of the number.
    """
    _, marker, after = text.partition("####")
    found = _NUMBER.search(after.split("\n", 1)[0]) if marker else None
    if found is None:
        found = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)  # the last one
    if found is None:
        raise Unreadable("has no number")
    sign = "-" if found["sign"] else ""
    return Decimal(sign + found["digits"].replace(",", "") + (found["exponent"] or ""))


# JSON


_FENCE = re.compile(r"\s*```(?:json|JSON)?[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)


def parse_json(text: str) -> Any:
    """The JSON value of `text`, numbers as Decimal. Unreadable if not JSON, with a duplicate key, NaN or Infinity.

    One Markdown fence around it (```json … ```) is looked through: chat models were taught to write it, and every client strips it.
    """
    if fenced := _FENCE.fullmatch(text):
        text = fenced.group(1)
    try:
        # Decimal: 1 == 1.0, 0.1 == 0.10, 1e400 is no infinity, and 5,000 digits do not hit Python's limit for int.
        return json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as problem:
        raise Unreadable(f"is not JSON ({problem.msg})") from None  # without the position: reasons are counted
    except RecursionError:
        raise Unreadable(f"is JSON nested deeper than {MAX_DEPTH} levels") from None
    except ArithmeticError:
        raise Unreadable("is JSON with a number out of range") from None


def _no_constant(name: str) -> NoReturn:
    raise Unreadable(f"is not JSON ({name} is no JSON number)")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable("is JSON with a duplicate key")
    return found


def json_leaves(text: str) -> dict[Path, Leaf]:
    """Every leaf of a JSON text by its path, so that two texts mean the same if and only if their leaves are equal.

    An empty object or list is a leaf.
    """
    leaves: dict[Path, Leaf] = {}
    waiting: list[tuple[Path, Any]] = [((), parse_json(text))]
    while waiting:  # an own stack: recursion would end at a depth that depends on the caller
        path, value = waiting.pop()
        if isinstance(value, dict | list) and len(path) >= MAX_DEPTH:
            raise Unreadable(f"is JSON nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict) and value:
            waiting.extend(((*path, key), item) for key, item in value.items())
        elif isinstance(value, list) and value:
            waiting.extend(((*path, position), item) for position, item in enumerate(value))
        else:
            leaves[path] = (type(value).__name__, None if isinstance(value, dict | list) else value)
    return leaves


def _fields(text: str) -> Counter[tuple[Path, Leaf]]:
    """(path, value) with counts. List positions are all 0: one item left out must not turn all that follow wrong."""
    return Counter((tuple(0 if isinstance(step, int) else step for step in path), leaf) for path, leaf in json_leaves(text).items())


def _field_f1(given: Counter[tuple[Path, Leaf]], expected: Counter[tuple[Path, Leaf]]) -> float:
    return _f1((given & expected).total(), given.total(), expected.total())


def _field_name(path: Path) -> str:
    """`rooms[].name`; a key that holds a dot or a bracket is quoted."""
    name = ""
    for step in path:
        if isinstance(step, int):
            name += "[]"
        else:
            key = json.dumps(step) if not step or re.search(r'[.\[\]"]', step) else step
            name += f".{key}" if name else key
    return name or "(all)"


def json_fields(predictions: Sequence[str], references: Sequence[str]) -> dict[str, FieldScore]:
    """Precision, recall and F1 of every field over all rows, the most frequent field first.

    Rows whose reference is not JSON are left out; a prediction that is not JSON gives no field and misses all. A field
    that no reference has (support 0) was invented by the model. Equal numbers of rows, else ValueError.
    """
    hits: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    support: Counter[str] = Counter()
    for prediction, reference in zip(predictions, references, strict=True):
        try:
            expected = _fields(_bounded(reference))
        except Unreadable:
            continue
        try:
            given = _fields(_bounded(prediction))
        except Unreadable:
            given = Counter()
        for total, part in ((hits, given & expected), (answered, given), (support, expected)):
            for (path, _), count in part.items():
                total[_field_name(path)] += count
    return {
        name: FieldScore(
            precision=hits[name] / answered[name] if answered[name] else 0.0,
            recall=hits[name] / support[name] if support[name] else 0.0,
            f1=_f1(hits[name], answered[name], support[name]),
            support=support[name],
        )
        for name in sorted(answered | support, key=lambda name: (-support[name], name))
    }


_label_correct = metric_from(label_of, _same, empty="is empty")

METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        name="exact_match",
        title="Exact match",
        score=metric_from(one_spaced, _same),
        corpus=None,
        binary=True,
        reads="The answer is the reference, letter for letter; only white space may differ.",
    ),
    "json_match": Metric(
        name="json_match",
        title="JSON match",
        score=metric_from(json_leaves, _same),
        corpus=None,
        binary=True,
        reads="The answer parses to the same JSON value: key order and 1 or 1.0 do not matter, everything else does.",
    ),
    "json_field_f1": Metric(
        name="json_field_f1",
        title="JSON field F1",
        score=metric_from(_fields, _field_f1),
        corpus=None,
        binary=False,
        reads="F1 over the fields of the JSON answer, each a path and its value; order within lists is free.",
    ),
    "rouge_l": Metric(
        name="rouge_l",
        title="ROUGE-L",
        score=metric_from(_words, _rouge_l, empty="has no words"),
        corpus=None,
        binary=False,
        reads="F1 of the longest sequence of words that answer and reference share in the same order.",
    ),
    "rouge_1": Metric(
        name="rouge_1",
        title="ROUGE-1",
        score=metric_from(_words, _rouge_1, empty="has no words"),
        corpus=None,
        binary=False,
        reads="F1 of the words that answer and reference share, in any order.",
    ),
    "bleu": Metric(
        name="bleu",
        title="BLEU",
        score=metric_from(str.strip, _bleu, empty="is empty"),
        corpus=corpus_bleu,
        binary=False,
        reads="sacreBLEU of the whole set: shared runs of one to four words, with a penalty for short answers.",
    ),
    "chrf": Metric(
        name="chrf",
        title="chrF",
        score=metric_from(str.strip, _chrf, empty="is empty"),
        corpus=corpus_chrf,
        binary=False,
        reads="chrF2 of the whole set: shared runs of one to six characters, recall weighing twice; fits any language.",
    ),
    "edit_similarity": Metric(
        name="edit_similarity",
        title="Edit similarity",
        score=metric_from(one_spaced, _edit_similarity),
        corpus=None,
        binary=False,
        reads="One minus the share of characters to change to get from the answer to the reference.",
    ),
    "label_accuracy": Metric(
        name="label_accuracy",
        title="Label accuracy",
        score=_label_correct,
        corpus=None,
        binary=True,
        reads="The answer is the right label; case, outer white space and trailing punctuation do not matter.",
    ),
    "macro_f1": Metric(
        name="macro_f1",
        title="Macro F1",
        score=_label_correct,
        corpus=macro_f1,
        binary=False,  # a row is right or wrong, but the headline is not their mean
        reads="F1 of each label, averaged over the labels, so that a rare label weighs as much as a frequent one.",
    ),
    "numeric_answer": Metric(
        name="numeric_answer",
        title="Numeric answer",
        score=metric_from(number_of, _same),
        corpus=None,
        binary=True,
        reads="The number after ####, or else the last number of the answer, equals the reference's.",
    ),
}
