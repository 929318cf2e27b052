"""How long the candidates will take to answer, from a few batches that this machine answers now.

A batch costs what its prompts cost (tokens, padding among them), each decoding step (the weights are read once for all rows), each token decoded,
and each pair of tokens of which one looks back to the other. What one unit of each costs is fitted to when each request of the probe was done
(non-negative least squares); how many units a batch of the run has follows from its prompts, which are known, and from the lengths of its answers,
which are those of the probe, or of the references where a model is trained to write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.evaluation.candidates import CANDIDATES
from burnish.evaluation.likelihood import TEXT_CANDIDATES
from burnish.models import METHODS, Chat, Limits, generate, layout
from burnish.recipe import Recipe
from burnish.types import Example, Tell, silent

UNITS = ("prompt tokens", "decoding steps", "tokens decoded", "pairs of tokens")
SAMPLED_ROWS = 32  # validation rows whose prompts are laid out to know their lengths
# Of prompts in a batch that only times. The batch with a candidate's longest prompts is answered whole, for its memory, too.
_PROBED_TOKENS = 2048

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AnswerCost:
    """Seconds of the steps `baselines` and `evaluate`, without loading a model."""

    selection: float  # validation rows answered in every setting
    test: dict[str, float]  # candidate → seconds for all test rows; an untrained one: the mean over its settings
    low: float  # all of it, were the cheapest setting chosen for every candidate
    high: float  # and the dearest
    unit_seconds: dict[str, float]  # what one of UNITS costs here
    work: dict[str, dict[str, float]]  # "baselines", "tuned" → how many of UNITS they have
    tuned_factor: float  # how much slower a model with an adapter answers
    load_seconds: float
    answer_tokens: dict[str, float]  # candidate → mean length of its answers, as assumed
    probed_rows: int

    @property
    def baselines(self) -> float:
        return self.selection + sum(seconds for name, seconds in self.test.items() if not CANDIDATES[name].trained)

    @property
    def tuned(self) -> float:
        return sum(seconds for name, seconds in self.test.items() if CANDIDATES[name].trained)


@dataclass(frozen=True, slots=True)
class _Probe:
    """One batch that was answered, and when each request of it was done."""

    work: Floats  # (rows, len(UNITS)) up to each request's last token
    seconds: Floats  # (rows,)
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What one candidate is asked in one setting, as tokens."""

    candidate: str
    selection: list[list[int]]  # on the validation rows where settings are chosen; none for a trained candidate
    test: list[list[int]]  # on rows that stand for the test rows


def costs(
    model: Any, recipe: Recipe, chat: Chat, asked: Sequence[Asked], *, limits: Limits, references: Sequence[int], test_rows: int,
    load_seconds: float = 0.0, tell: Tell = silent,
) -> AnswerCost:  # fmt: skip
    """Answer one batch in the cheapest and in the dearest setting of each candidate, and reckon what the run will ask for.

    `references`: tokens of reference answers, which a trained candidate is taken to write. The model is used up: at the end it has an adapter.
    """
    size, untrained = recipe.evaluation.batch_size, [one for one in asked if not CANDIDATES[one.candidate].trained]
    trained = [one for one in asked if CANDIDATES[one.candidate].trained]
    some = next((one.test for one in trained or asked), [])
    probes, tuned_probe = _probe(model, chat, untrained, limits, size, references=references, plain=some, recipe=recipe, tell=tell)
    units = fit([probe for found in probes.values() for probe in found] or [tuned_probe])
    predicted = float(units @ tuned_probe.work[-1])
    factor = float(tuned_probe.seconds.max()) / predicted if predicted > 0 else 1.0
    lengths: dict[str, list[int]] = {name: [n for probe in found for n in probe.answers] for name, found in probes.items()}
    lengths |= {one.candidate: list(references) for one in trained}

    def work(found: Sequence[Sequence[int]], count: int, name: str, limits: Limits) -> Floats:
        return reckon(model.config, found, count=count, answers=lengths[name], limits=limits, batch_size=size)

    nothing = np.zeros(len(UNITS))
    selection = sum((work(one.selection, len(one.selection), one.candidate, limits) for one in untrained), nothing)
    test: dict[str, list[Floats]] = {one.candidate: [] for one in asked}
    for one in untrained:
        test[one.candidate].append(work(one.test, test_rows, one.candidate, limits))
    for one in trained:  # it must stop by itself
        test[one.candidate].append(factor * work(one.test, test_rows, one.candidate, Limits(limits.max_new_tokens)))
    seconds = {name: [float(part @ units) for part in found] for name, found in test.items()}
    means = {name: np.mean(found, axis=0) for name, found in test.items()}
    of = {kind: sum((part for name, part in means.items() if CANDIDATES[name].trained == kind), nothing) for kind in (False, True)}
    chosen = float(selection @ units)
    return AnswerCost(
        selection=chosen,
        test={name: sum(found) / len(found) for name, found in seconds.items()},
        low=chosen + sum(map(min, seconds.values())),
        high=chosen + sum(map(max, seconds.values())),
        unit_seconds=_by_unit(units),
        work={"baselines": _by_unit(selection + of[False]), "tuned": _by_unit(of[True])},
        tuned_factor=factor,
        load_seconds=load_seconds,
        answer_tokens={name: sum(found) / len(found) for name, found in lengths.items()},
        probed_rows=sum(len(probe.answers) for found in probes.values() for probe in found) + len(tuned_probe.answers),
    )


def text_costs(recipe: Recipe, *, load_seconds: float, seconds: float) -> AnswerCost:
    """Where plain text is measured, not answered: `seconds` for a forward pass over the test documents, for each model that reads them."""
    test: dict[str, float] = {name: seconds for name in recipe.evaluation.candidates if name in TEXT_CANDIDATES}
    nothing = dict.fromkeys(UNITS, 0.0)
    total = sum(test.values())
    return AnswerCost(
        0.0, test, total, total, nothing, {"baselines": nothing, "tuned": nothing}, 1.0, load_seconds, dict.fromkeys(test, 0.0), 0
    )


def fit(probes: Sequence[_Probe]) -> Floats:
    """(len(UNITS),) seconds of one unit of each kind: none negative, errors counted relative to the seconds, each batch for as much as another."""
    from scipy.optimize import nnls

    work = np.concatenate([probe.work for probe in probes])
    seconds = np.concatenate([probe.seconds for probe in probes])
    weight = np.concatenate([np.full(len(probe.seconds), len(probe.seconds) ** -0.5) for probe in probes])
    scale = np.maximum(work.max(0), 1.0)  # pairs are millions, steps are dozens
    found, _ = nnls(work / scale * (weight / seconds)[:, None], weight)
    return np.asarray(found / scale, dtype=np.float64)


def work_of(lengths: Sequence[int], answers: Sequence[int], *, shared: int, first: bool) -> Floats:
    """(len(UNITS),) units of one batch: prompts of `lengths` tokens that begin with `shared` tokens alike, answers of `answers` tokens.

    A prompt is padded to the longest; a row leaves the batch with its last token; the first token of an answer comes with the prompt. `first`:
    the shared tokens are computed now.
    """
    rows, width = len(lengths), max(lengths) - shared
    context = shared + width
    decoded = [answer - 1 for answer in answers]
    pairs = rows * width * (shared + (width - 1) / 2) + sum(n * (context + (n - 1) / 2) for n in decoded)
    tokens = float(rows * width)
    if first:
        tokens, pairs = tokens + shared, pairs + shared * (shared - 1) / 2
    return np.array([tokens, max(decoded), sum(decoded), pairs], dtype=np.float64)


def reckon(config: Any, prompts: Sequence[Sequence[int]], *, count: int, answers: Sequence[int], limits: Limits, batch_size: int) -> Floats:
    """(len(UNITS),) units of answering `count` rows of which `prompts` are a sample, with answers as long as `answers`, in turn."""
    repeated = [prompts[number * len(prompts) // count] for number in range(count)]
    shared, batches = layout(config, repeated, limits, batch_size=batch_size)
    longs = [min(answers[number % len(answers)], limits.max_new_tokens) for number in range(count)]
    total = np.zeros(len(UNITS))
    for number, batch in enumerate(batches):
        total += work_of([len(repeated[i]) for i in batch], [longs[i] for i in batch], shared=shared, first=number == 0)
    return total


# ------------------------------------------------------------------------------------------------------------------ inside


def _by_unit(values: Floats) -> dict[str, float]:
    return dict(zip(UNITS, map(float, values), strict=True))


def spread(examples: Sequence[Example], most: int = SAMPLED_ROWS) -> list[Example]:
    """At most so many rows, evenly spread, in order."""
    count = min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def _probe(
    model: Any, chat: Chat, asked: Sequence[Asked], limits: Limits, batch_size: int, *, references: Sequence[int], plain: list[list[int]],
    recipe: Recipe, tell: Tell,
) -> tuple[dict[str, list[_Probe]], _Probe]:  # fmt: skip
    """One batch for each candidate's settings with the shortest and the longest prompts, and one with an adapter in place."""
    list(generate(model, chat, [plain[0]], Limits(4), batch_size=1))  # warms up, untimed
    chosen: dict[str, list[list[list[int]]]] = {}
    for name in dict.fromkeys(one.candidate for one in asked):
        ordered = sorted((one.selection for one in asked if one.candidate == name), key=lambda found: sum(map(len, found)))
        chosen[name] = [ordered[0], ordered[-1]] if CANDIDATES[name].shots and len(ordered) > 1 else [ordered[0]]
    total = sum(map(len, chosen.values())) + 1
    found: dict[str, list[_Probe]] = {}
    for name, sets in chosen.items():
        for number, prompts in enumerate(sets):
            tell("timing answers", sum(map(len, found.values())), total, name)
            found.setdefault(name, []).append(_answer(model, chat, prompts, limits, batch_size, whole=number == len(sets) - 1))
    tell("timing answers", total - 1, total, "with an adapter")
    # A fresh adapter changes no answer, and costs what a trained one costs; it would go on for ever, so it stops where a trained one does.
    stop = Limits(max(2, min(limits.max_new_tokens, int(np.median(references)))))
    tuned = _answer(METHODS[recipe.training.method](model, recipe).eval(), chat, plain, stop, batch_size)
    tell("timing answers", total, total, "")
    return found, tuned


def _answer(model: Any, chat: Chat, prompts: Sequence[Sequence[int]], limits: Limits, batch_size: int, *, whole: bool = False) -> _Probe:
    """Answer the batch in the middle of those that `generate` would make; evenly spread ones of its prompts, unless it is wanted `whole`."""
    shared, batches = layout(model.config, prompts, limits, batch_size=batch_size)
    middle = batches[len(batches) // 2]
    own = max(1, sum(len(prompts[index]) - shared for index in middle) // len(middle))
    count = len(middle) if whole else max(1, min(len(middle), (_PROBED_TOKENS - shared) // own))
    some = [prompts[middle[number * len(middle) // count]] for number in range(count)]
    shared, _ = layout(model.config, some, limits, batch_size=batch_size)
    made = dict(answer for batch in generate(model, chat, some, limits, batch_size=batch_size) for answer in batch)
    answers = [made[index].completion_tokens for index in range(len(some))]
    lengths = [len(prompt) for prompt in some]
    work = [work_of(lengths, [min(other, mine) for other in answers], shared=shared, first=True) for mine in answers]
    order = np.argsort(answers, kind="stable")
    seconds = np.array([made[index].seconds for index in range(len(some))])
    return _Probe(np.array(work)[order], np.maximum(seconds[order], 1e-6), tuple(answers))


__all__ = ["SAMPLED_ROWS", "UNITS", "AnswerCost", "Asked", "costs", "fit", "reckon", "spread", "text_costs", "work_of"]
