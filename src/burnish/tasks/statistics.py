"""Is a difference real? Intervals, tests and the verdict, on rows that both candidates answered.

Values are fractions. Everything is a pure function of its arguments: the random numbers come from `seed`. Not a number,
unequal lengths and no rows at all are ValueErrors; one row is never enough to tell (p = 1). scipy.stats needs a second
to import, so it comes in where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.tasks.metrics import Metric
from burnish.types import Comparison, Verdict

Floats = NDArray[np.float64]
Corpus = Callable[[Sequence[str], Sequence[str]], float]

RESAMPLES = 10_000  # the ends of a 95 % interval then repeat to about 1 % of its width
CORPUS_RESAMPLES = 400  # each one computes a corpus metric twice; the smallest p is 1/401
EXACT_FLIPS = 12  # up to 2**12 sign patterns are enumerated
_CELLS = 4_000_000  # random numbers held at once (32 MB)


@dataclass(frozen=True, slots=True)
class Difference:
    """A candidate against a baseline, before the p-values of the run are adjusted."""

    difference: float  # candidate minus baseline
    low: float
    high: float
    p_value: float
    n: int  # rows


def _checked(values: Sequence[float] | Floats, name: str = "values") -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: expected one number per row and at least one row, found shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: row {int(np.flatnonzero(~np.isfinite(array))[0])} is not a finite number")
    return array


def _pair(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    left, right = _checked(a, "a"), _checked(b, "b")
    if left.size != right.size:
        raise ValueError(f"{left.size} rows against {right.size}: a comparison needs the same rows in the same order")
    return left, right


def _share(value: float, name: str) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; expected a fraction between 0 and 1")
    return value


# Intervals


def wilson(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): good for small n and near 0 and 1 too.

    `n` may be an effective number of rows (`effective_rows`), and `successes` the same share of it.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}: expected 0 <= successes <= n and n > 0")
    z = NormalDist().inv_cdf(0.5 + _share(confidence, "confidence") / 2)
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1 but for rounding.
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == n else middle + half)


def _resampled_means(values: Floats, resamples: int, seed: int) -> Floats:
    """The means of `resamples` draws with replacement, in blocks that fit in memory."""
    random = np.random.default_rng(seed)
    blocks = [values[random.integers(0, values.size, size=(count, values.size))].mean(axis=1) for count in _blocks(resamples, values.size)]
    return np.concatenate(blocks)


def _blocks(rows: int, width: int) -> Iterator[int]:
    """`rows` cut into counts of which each times `width` stays within `_CELLS`."""
    step = max(1, _CELLS // width)
    for start in range(0, rows, step):
        yield min(step, rows - start)


def _percentiles(draws: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - _share(confidence, "confidence")) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_interval(
    values: Sequence[float] | Floats,
    *,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron 1979). With `groups` (one name a row), whole groups are drawn.

    Percentile and not BCa: for the mean of 100 rows and more the two agree to a few per cent of the width, BCa's
    acceleration is not defined when rows are (nearly) all equal, which is common here (a base model that scores 0), and
    no verdict rests on the interval alone. Rows that are all equal give (v, v): nothing was seen to vary, and the test
    has to say how little that means.
    """
    array = _checked(values)
    _share(confidence, "confidence")
    if (array == array[0]).all():
        return float(array[0]), float(array[0])
    if groups is None or len(set(groups)) == array.size:
        return _percentiles(_resampled_means(array, resamples, seed), confidence)
    sums, counts = group_sums(array, groups)
    random = np.random.default_rng(seed)
    draws = []
    for count in _blocks(resamples, sums.size):
        drawn = random.integers(0, sums.size, size=(count, sums.size))
        draws.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return _percentiles(np.concatenate(draws), confidence)


def paired_bootstrap(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of mean(a) - mean(b), drawing rows, so that what makes a row hard cancels out."""
    left, right = _pair(a, b)
    return bootstrap_interval(left - right, confidence=confidence, resamples=resamples, seed=seed)


def corpus_bootstrap(
    function: Corpus,
    predictions: Sequence[str],
    *,
    references: Sequence[str],
    against: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = CORPUS_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a corpus metric (Koehn 2004).

    With `against` of the difference between `predictions` and `against`, both on the same drawn rows.
    """
    columns = [predictions] if against is None else [predictions, against]
    _same_rows(references, columns)
    random = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for number in range(resamples):
        rows = random.integers(0, len(references), size=len(references)).tolist()
        drawn = [references[row] for row in rows]
        found = [function([column[row] for row in rows], drawn) for column in columns]
        draws[number] = found[0] - (found[1] if against is not None else 0.0)
    return _percentiles(draws, confidence)


def _same_rows(references: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    if not references or any(len(column) != len(references) for column in columns):
        found = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"{found} predictions for {len(references)} references: expected one per row and at least one row")


# Tests, all two-sided


def mcnemar_exact(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> float:
    """p-value of McNemar's exact test on rows of 0 or 1: where just one is right, is it the same one too often?"""
    left, right = _pair(a, b)
    for name, array in (("a", left), ("b", right)):
        if not np.isin(array, (0.0, 1.0)).all():
            raise ValueError(f"{name}: McNemar's test needs rows that are 0 or 1")
    only_a, only_b = int(((left == 1) & (right == 0)).sum()), int(((left == 0) & (right == 1)).sum())
    if only_a + only_b == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def sign_flip_test(a: Sequence[float] | Floats, b: Sequence[float] | Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """p-value of Fisher's paired permutation test on the mean difference.

    Were the two alike, each row's difference could as well have the other sign. Up to 12 rows that differ, every
    pattern is counted; above, (1 + hits) / (1 + resamples), which is never 0 and never too small (Phipson & Smyth
    2010).
    """
    left, right = _pair(a, b)
    differences = (left - right)[left != right]  # a row without a difference has no sign to flip
    if differences.size == 0:
        return 1.0
    # A hair below: sums that are equal on paper differ in the last bits, and missing them would make p too small.
    observed = abs(differences.sum()) - 1e-9 * np.abs(differences).sum()
    if differences.size <= EXACT_FLIPS:
        patterns = np.arange(2**differences.size)[:, None] >> np.arange(differences.size) & 1  # (2**n, n)
        return float((np.abs((2 * patterns - 1) @ differences) >= observed).mean())
    random = np.random.default_rng(seed)
    hits = 0
    for count in _blocks(resamples, differences.size):
        signs = random.integers(0, 2, size=(count, differences.size), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ differences) >= observed).sum())
    return (1 + hits) / (1 + resamples)


def studentized_test(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """p-value of the equal-tailed bootstrap-t test of the mean difference (Efron 1979; Hall 1988), of rows or of whole `groups`.

    How often does a resampled mean lie, in its own standard errors, as far above (or as far below) the mean found as that lies above 0? Twice the rarer
    of the two. Unlike flipping signs it does not take the differences for symmetric: who gains much on few rows and loses little on many is no better.
    """
    left, right = _pair(a, b)
    sums, counts = group_sums(left - right, list(map(str, range(left.size))) if groups is None else groups)
    observed = _in_standard_errors(sums[None], counts[None], 0.0)[0]
    if sums.size == 1 or not observed:
        return 1.0
    mean, random = sums.sum() / counts.sum(), np.random.default_rng(seed)
    above = below = 0
    for count in _blocks(resamples, sums.size):
        drawn = random.integers(0, sums.size, size=(count, sums.size))
        found = _in_standard_errors(sums[drawn], counts[drawn], mean)
        above, below = above + int((found >= observed - 1e-9).sum()), below + int((found <= observed + 1e-9).sum())
    return min(1.0, 2 * (1 + min(above, below)) / (1 + resamples))


def _in_standard_errors(sums: Floats, counts: Floats, centre: float) -> Floats:
    """(draws,) how far the mean of each draw of groups (draws, groups) lies from `centre`; one without any spread lies infinitely far."""
    groups = sums.shape[1]
    means = sums.sum(1) / counts.sum(1)
    left = sums - means[:, None] * counts
    errors = np.sqrt((left**2).sum(1) * groups / max(1, groups - 1)) / counts.sum(1)
    away = means - centre
    far = np.abs(away) > 1e-12
    return np.asarray(
        np.where(errors > 1e-12, away / np.maximum(errors, 1e-12), np.where(far, np.copysign(np.inf, away), 0.0)), dtype=np.float64
    )


def _swap_test(
    function: Corpus,
    a: Sequence[str],
    *,
    b: Sequence[str],
    references: Sequence[str],
    resamples: int,
    seed: int,
) -> float:
    """p-value for a corpus metric: rows swapped at random between the two (Riezler & Maxwell 2005)."""
    observed = abs(function(a, references) - function(b, references)) - 1e-12
    random = np.random.default_rng(seed)
    hits = 0
    for _ in range(resamples):
        swap = random.integers(0, 2, size=len(references)).tolist()
        left = [y if change else x for x, y, change in zip(a, b, swap, strict=True)]
        right = [x if change else y for x, y, change in zip(a, b, swap, strict=True)]
        hits += abs(function(left, references) - function(right, references)) >= observed
    return (1 + hits) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): even one false alarm among all comparisons is rarer than alpha."""
    if any(not 0 <= p <= 1 for p in p_values):  # NaN fails both
        raise ValueError(f"p-values must lie in 0..1, found {list(p_values)}")
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


# Before training


def detectable_difference(
    n: int,
    *,
    confidence: float = 0.95,
    power: float = 0.8,
    baseline: float = 0.5,
    correlation: float = 0.0,
    spread: float | None = None,
    comparisons: int = 1,
) -> float | None:
    """The smallest true gain, as a fraction, that `n` rows show with probability `power`.

    None: not even a perfect candidate could be told from the baseline.

    Right/wrong metrics: McNemar's test, n = ((z_a sqrt(d) + z_b sqrt(d - D^2)) / D)^2 (Miettinen 1968; Connor 1987), D
    the gain and d the share of rows where just one of the two is right. d is not known before training. It follows from
    `baseline` (the share the baseline gets right) and the `correlation` of being right; at 0, the default, rows are
    right independently, which is the careful side: a tuned model keeps most of what its base got right, so the true
    figure is usually smaller. 0.5 is the hardest baseline. Other metrics: give `spread`, the standard deviation of the
    row differences; then D = (z_a + z_b) spread / sqrt(n). `comparisons`: how many baselines the candidate must beat;
    alpha is divided by it (Bonferroni, Holm's worst case).
    """
    if n < 1 or comparisons < 1 or not 0 <= baseline <= 1 or not -1 <= correlation <= 1:
        raise ValueError(f"n {n}, comparisons {comparisons}, baseline {baseline}, correlation {correlation}: out of range")
    z_alpha = NormalDist().inv_cdf(1 - (1 - _share(confidence, "confidence")) / 2 / comparisons)
    z_beta = NormalDist().inv_cdf(_share(power, "power"))
    if spread is not None:
        if not 0 <= spread <= 1:
            raise ValueError(f"spread is {spread}; row differences of values in 0..1 have a standard deviation in 0..1")
        found = (z_alpha + z_beta) * spread / math.sqrt(n)
        return found if found <= 1 else None

    def rows_needed(gain: float) -> float:
        rate = baseline + gain
        both = math.sqrt(max(0.0, baseline * (1 - baseline) * rate * (1 - rate)))
        discordant = baseline * (1 - rate) + rate * (1 - baseline) - 2 * correlation * both
        discordant = min(1.0, max(discordant, gain))  # a gain of D needs at least D of the rows to differ
        return ((z_alpha * math.sqrt(discordant) + z_beta * math.sqrt(max(0.0, discordant - gain**2))) / gain) ** 2

    low, high = 0.0, 1 - baseline
    if high <= 0 or rows_needed(high) > n:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rows_needed(middle) <= n else (middle, high)
    return high


# Comparisons and the verdict


def compare(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    binary: bool,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """mean(a) - mean(b) with a paired bootstrap interval and a p-value: exact McNemar if `binary`, else the larger of sign flips and bootstrap-t,
    since the first takes differences for symmetric and the second needs more rows (docs/statistics.md has the error rates).

    Rows of one group (a user, a template) tend to go right or wrong together. Where `groups` (one name a row) has fewer groups than rows,
    whole groups are drawn and flipped instead of rows (Cameron, Gelbach & Miller 2008): a hundred rows of four users are evidence of four.
    With a single row or group the interval is all that is possible, -1..1, and p is 1.
    """
    left, right = _pair(a, b)
    difference = float((left - right).mean())
    if groups is not None and len(set(groups)) < left.size:
        return _compare_groups(left, right, groups, confidence=confidence, resamples=resamples, seed=seed)
    if binary:
        p_value = mcnemar_exact(left, right)
    else:
        p_value = max(
            sign_flip_test(left, right, resamples=resamples, seed=seed), studentized_test(left, right, resamples=resamples, seed=seed)
        )
    if left.size == 1:
        return Difference(difference, -1.0, 1.0, 1.0, 1)
    low, high = paired_bootstrap(left, right, confidence=confidence, resamples=resamples, seed=seed)
    return Difference(difference, low, high, p_value, int(left.size))


def _compare_groups(left: Floats, right: Floats, groups: Sequence[str], *, confidence: float, resamples: int, seed: int) -> Difference:
    sums, counts = group_sums(left - right, groups)
    difference = float(sums.sum() / counts.sum())
    if sums.size == 1:
        return Difference(difference, -1.0, 1.0, 1.0, int(left.size))
    low, high = bootstrap_interval(left - right, groups=groups, confidence=confidence, resamples=resamples, seed=seed)
    flipped = sign_flip_test(sums, np.zeros_like(sums), resamples=resamples, seed=seed)
    p_value = max(flipped, studentized_test(left, right, groups=groups, resamples=resamples, seed=seed))
    return Difference(difference, low, high, p_value, int(left.size))


def group_sums(values: Sequence[float] | Floats, groups: Sequence[str]) -> tuple[Floats, Floats]:
    """Per group, in the order of their first rows: the sum of its values and its number of rows."""
    array = _checked(values)
    if len(groups) != array.size:
        raise ValueError(f"{len(groups)} group names for {array.size} rows")
    index = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    place = np.array([index[name] for name in groups])
    sums, counts = (np.asarray(np.bincount(place, weights=each), dtype=np.float64) for each in (array, np.ones_like(array)))
    return sums, counts


def effective_rows(values: Sequence[float] | Floats, groups: Sequence[str] | None) -> float:
    """How many independent rows these rows are worth: n divided by the design effect of their groups (Kish 1965), at least 1, at most n.

    Where no value differs from another the effect cannot be seen, and the number of groups is taken.
    """
    array = _checked(values)
    if groups is None or len(set(groups)) == array.size:
        return float(array.size)
    sums, counts = group_sums(array, groups)
    mean, variance = array.mean(), array.var()
    if variance == 0 or sums.size == 1:
        return float(sums.size)
    between = ((sums - counts * mean) ** 2).sum() / array.size**2 * sums.size / (sums.size - 1)
    return float(np.clip(variance / between, 1.0, array.size)) if between > 0 else float(array.size)


def compare_corpus(
    function: Corpus,
    candidate: Sequence[str],
    *,
    baseline: Sequence[str],
    references: Sequence[str],
    confidence: float = 0.95,
    resamples: int = CORPUS_RESAMPLES,
    seed: int = 0,
) -> Difference:
    """`compare` for a metric of the whole corpus: paired bootstrap interval, p-value by swapping rows at random."""
    _same_rows(references, [candidate, baseline])
    difference = function(candidate, references) - function(baseline, references)
    if len(references) == 1:
        return Difference(difference, -1.0, 1.0, 1.0, 1)
    options: dict[str, Any] = {"references": references, "resamples": resamples, "seed": seed}
    low, high = corpus_bootstrap(function, candidate, against=baseline, confidence=confidence, **options)
    return Difference(difference, low, high, _swap_test(function, candidate, b=baseline, **options), len(references))


def verdict(difference: float, low: float, high: float, p_adjusted: float, alpha: float = 0.05) -> Verdict:
    """BETTER or WORSE only if the adjusted p is below `alpha` *and* the interval lies wholly on its side of 0."""
    if not all(map(math.isfinite, (difference, low, high, p_adjusted))):
        raise ValueError(f"no verdict from difference {difference}, interval {low}..{high}, p {p_adjusted}")
    if p_adjusted < alpha and low > 0 and difference > 0:
        return Verdict.BETTER
    if p_adjusted < alpha and high < 0 and difference < 0:
        return Verdict.WORSE
    return Verdict.CANT_TELL


def judge(differences: Mapping[str, Difference], candidate: str, *, metric: str, confidence: float = 0.95) -> list[Comparison]:
    """The verdicts of `candidate` against each baseline, from {baseline: Difference}, with Holm over all of them."""
    return judge_pairs({(candidate, baseline): found for baseline, found in differences.items()}, metric=metric, confidence=confidence)


def judge_pairs(differences: Mapping[tuple[str, str], Difference], *, metric: str, confidence: float = 0.95) -> list[Comparison]:
    """The verdicts of several candidates, from {(candidate, baseline): Difference}, with Holm over all pairs."""
    adjusted = holm([found.p_value for found in differences.values()])
    return [
        Comparison(
            candidate=candidate,
            baseline=baseline,
            metric=metric,
            n=found.n,
            difference=found.difference,
            low=found.low,
            high=found.high,
            p_value=found.p_value,
            p_adjusted=p,
            verdict=verdict(found.difference, found.low, found.high, p, 1 - confidence),
        )
        for ((candidate, baseline), found), p in zip(differences.items(), adjusted, strict=True)
    ]


def build_comparisons(
    scores_by_candidate: Mapping[str, Sequence[float]],
    candidate: str,
    *,
    baselines: Sequence[str],
    metric: Metric,
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Comparison]:
    """`candidate` against each of `baselines` on row values (`values` of the scores), in the order of `baselines`.

    For a metric with a `corpus` function give {baseline: compare_corpus(...)} to `judge` instead: a ValueError says so.
    """
    if metric.corpus is not None:
        raise ValueError(f"{metric.name} is a number of the whole corpus, not a mean over rows: use compare_corpus and judge")
    missing = [name for name in (candidate, *baselines) if name not in scores_by_candidate]
    if missing:
        raise ValueError(f"no scores of {', '.join(missing)}; there are {', '.join(scores_by_candidate) or 'none'}")
    differences = {
        name: compare(
            scores_by_candidate[candidate],
            scores_by_candidate[name],
            binary=metric.binary,
            groups=groups,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
        for name in baselines
    }
    return judge(differences, candidate, metric=metric.name, confidence=confidence)
