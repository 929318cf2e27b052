"""Tone: does an answer read like the training answers, or like the untrained model?

A small classifier (logistic regression over word and character n-grams, scikit-learn, extra `checks`) learns to tell the training answers from
what the untrained model wrote to the test questions. Rows that are judged were never fitted on: the test rows are cut into folds, group by
group, and a row is judged by the classifier that saw the untrained answers of the other folds only. The references of the test rows, which no
classifier saw either, say how well the two voices can be told apart (area under the ROC curve, cross-validated), and what share of real answers
passes: a fine-tuned model cannot be expected to pass more often.

It measures likeness, not quality: an answer that is wrong in the house's voice passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.errors import DataError, missing_extra

FOLDS = 5
LEAST_ROWS = 20  # of each voice
LEAST_CHARACTERS = 25  # median of the training answers; a label or a code has no tone
MOST_TRAINED = 1_000  # training answers fitted on
MOST_READ_CHARACTERS = 2_000  # of each text; a voice shows in its beginning
LEAST_AUC = 0.6  # the lower end of its interval must lie above: nearer to 0.5 the two voices are one


class Unfit(Exception):
    """A check has nothing to say about this data. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Tone:
    auc: float  # test references against held-out untrained answers
    low: float
    high: float
    references_pass: float  # share of the test references that read like training answers
    models: tuple[Any, ...]  # of each fold
    fold_of: tuple[int, ...]  # of each test row

    def reads_like_training(self, answer: str, row: int) -> bool:
        return bool(self.models[self.fold_of[row]].predict([answer[:MOST_READ_CHARACTERS]])[0] == 1)


def learn_tone(train: Sequence[str], untrained: Sequence[str], *, references: Sequence[str], groups: Sequence[str], seed: int = 0) -> Tone:
    """`untrained`, `references` and `groups` are of the test rows, in one order. Raises Unfit with the reason where there is no tone to learn."""
    if len(train) < LEAST_ROWS or len(untrained) < LEAST_ROWS:
        raise Unfit(f"{len(train)} training answers and {len(untrained)} untrained ones: {LEAST_ROWS} of each are needed")
    middle = float(np.median([len(text) for text in train]))
    if middle < LEAST_CHARACTERS:
        raise Unfit(f"training answers are too short to have a tone (median {middle:.0f} characters; {LEAST_CHARACTERS} are needed)")
    folds = _folds(groups, seed)
    train, untrained, references = ([text[:MOST_READ_CHARACTERS] for text in texts] for texts in (train, untrained, references))
    random = np.random.default_rng(seed)
    kept = [train[index] for index in sorted(random.permutation(len(train))[:MOST_TRAINED].tolist())]
    with missing_extra("checks", "the check tone", DataError):
        from sklearn.metrics import roc_auc_score
    models, ours, theirs = [], np.zeros(len(references)), np.zeros(len(references))
    passes = np.zeros(len(references), dtype=bool)
    for fold in range(int(folds.max()) + 1):
        others, here = np.flatnonzero(folds != fold).tolist(), np.flatnonzero(folds == fold).tolist()
        known = {references[index] for index in here}
        model = _fit([text for text in kept if text not in known], [untrained[index] for index in others])
        models.append(model)
        ours[here] = model.decision_function([references[index] for index in here])
        theirs[here] = model.decision_function([untrained[index] for index in here])
        passes[here] = ours[here] > 0
    auc = float(roc_auc_score([1] * len(ours) + [0] * len(theirs), np.concatenate([ours, theirs])))
    low, high = auc_interval(auc, len(ours), len(theirs))
    if low <= LEAST_AUC:
        raise Unfit(
            f"training answers and untrained ones read alike (AUC {auc:.2f} [{low:.2f}, {high:.2f}]; its lower end must be above {LEAST_AUC}): "
            "there is no tone to tell"
        )
    return Tone(auc, low, high, float(passes.mean()), tuple(models), tuple(folds.tolist()))


def auc_interval(auc: float, positives: int, negatives: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of an area under the ROC curve (Hanley & McNeil 1982), cut to 0..1."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)) / (positives * negatives)
    half = z * float(np.sqrt(max(0.0, variance)))
    return max(0.0, auc - half), min(1.0, auc + half)


def _folds(groups: Sequence[str], seed: int) -> NDArray[np.int64]:
    """The fold of each row; rows of one group are in one fold."""
    names = list(dict.fromkeys(groups))
    count = min(FOLDS, len(names))
    if count < 2:
        raise Unfit("all test rows are of one group: nothing is left to learn from while it is judged")
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[name]: place % count for place, name in enumerate(order)}
    return np.array([fold_of[name] for name in groups])


def _fit(ours: Sequence[str], theirs: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", max_features=20_000, sublinear_tf=True)
    letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), max_features=40_000, sublinear_tf=True)
    model = make_pipeline(make_union(words, letters), LogisticRegression(C=4.0, class_weight="balanced", max_iter=1000))
    return model.fit([*ours, *theirs], [1] * len(ours) + [0] * len(theirs))
