"""How long the candidates will take to answer, from a few batches that this machine answers now.

A batch costs what its prompts cost (tokens, padding among them), each decoding step (the weights are read once for all rows), each token decoded,
and each pair of tokens of which one looks back to the other. What one unit of each costs is fitted to when each request of the probe was done
(non-negative least squares); how many units a batch of the run has follows from its prompts, which are known, and from the lengths of its answers,
which are those of the probe, or of the references where a model is trained to write them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.evaluation.asking import ask, selection_rows
from burnish.evaluation.candidates import CANDIDATES, Context, Setting, prompt_ids
from burnish.evaluation.likelihood import TEXT_CANDIDATES
from burnish.evaluation.select import settings_to_try
from burnish.models import METHODS, Chat, Limits, generate, layout, load_base
from burnish.recipe import Recipe
from burnish.tasks import Task
from burnish.types import Dataset, Example, Tell, silent

UNITS = ("prompt tokens", "decoding steps", "tokens decoded", "pairs of tokens")
_SAMPLED_ROWS = 32  # validation rows whose prompts are laid out to know their lengths
_PROBED_TOKENS = (
    2048  # of prompts in a batch that only times; one batch of each kind with the longest prompts is answered whole, for its memory, too
)

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


def answer_costs(
    dataset: Dataset,
    recipe: Recipe,
    chat: Chat,
    task: Task,
    *,
    test_rows: int,
    clock: Callable[[], float] = time.perf_counter,
    tell: Tell = silent,
) -> AnswerCost:
    """Answer one batch in the cheapest and the dearest setting of each kind, and reckon what the run will ask for. Nothing is kept.

    Validation rows stand for the `test_rows` test rows, which are not read.
    """
    began = clock()
    model = load_base(recipe, tell)
    load_seconds = clock() - began
    context, limits = ask(model, recipe, dataset.train, chat, task)
    rows, size = selection_rows(dataset.validation, recipe), recipe.evaluation.batch_size
    names = [name for name in recipe.evaluation.candidates if not CANDIDATES[name].trained]
    prompts: dict[tuple[str, Setting], list[list[int]]] = {
        (name, setting): [prompt_ids(name, example, setting, context)[0] for example in rows]
        for name in names
        for setting in settings_to_try(name, recipe.evaluation)
    }
    references = [len(chat.tokenizer.encode(example.reference, add_special_tokens=False)) + 1 for example in _some(dataset.validation)]
    probes, tuned_probe = _probe(
        model, chat, prompts, limits, size, references=references, asked=rows, recipe=recipe, context=context, tell=tell
    )
    units = fit([probe for found in probes.values() for probe in found] or [tuned_probe])
    predicted = float(units @ tuned_probe.work[-1])
    factor = float(tuned_probe.seconds.max()) / predicted if predicted > 0 else 1.0
    lengths: dict[str, list[int]] = {name: [n for probe in found for n in probe.answers] for name, found in probes.items()}

    def work(found: Sequence[Sequence[int]], count: int, answers: Sequence[int], limits: Limits) -> Floats:
        return reckon(model.config, found, count=count, answers=answers, limits=limits, batch_size=size)

    selection = sum((work(found, len(rows), lengths[name], limits) for (name, _), found in prompts.items()), np.zeros(len(UNITS)))
    some = _some(dataset.validation)
    test: dict[str, list[Floats]] = {name: [] for name in recipe.evaluation.candidates}
    for name, setting in prompts:
        laid = [prompt_ids(name, example, setting, context)[0] for example in some]
        test[name].append(work(laid, test_rows, lengths[name], limits))
    for name in recipe.evaluation.candidates:
        if CANDIDATES[name].trained:
            laid = [prompt_ids(name, example, Setting(), context)[0] for example in some]
            test[name].append(factor * work(laid, test_rows, references, Limits(limits.max_new_tokens)))
            lengths[name] = references
    seconds = {name: [float(one @ units) for one in found] for name, found in test.items()}
    chosen = float(selection @ units)
    means = {name: np.mean(found, axis=0) for name, found in test.items()}
    whole = {
        "baselines": selection + sum((one for name, one in means.items() if not CANDIDATES[name].trained), np.zeros(len(UNITS))),
        "tuned": sum((one for name, one in means.items() if CANDIDATES[name].trained), np.zeros(len(UNITS))),
    }
    return AnswerCost(
        selection=chosen,
        test={name: sum(found) / len(found) for name, found in seconds.items()},
        low=chosen + sum(map(min, seconds.values())),
        high=chosen + sum(map(max, seconds.values())),
        unit_seconds=dict(zip(UNITS, map(float, units), strict=True)),
        work={name: dict(zip(UNITS, map(float, one), strict=True)) for name, one in whole.items()},
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
    """(len(UNITS),) seconds of one unit of each kind: none negative, errors counted relative to the seconds."""
    from scipy.optimize import nnls

    work = np.concatenate([probe.work for probe in probes])
    seconds = np.concatenate([probe.seconds for probe in probes])
    scale = np.maximum(work.max(0), 1.0)  # pairs are millions, steps are dozens
    found, _ = nnls(work / scale / seconds[:, None], np.ones(len(seconds)))
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


def _some(examples: Sequence[Example]) -> list[Example]:
    """Evenly spread rows, in order."""
    count = min(_SAMPLED_ROWS, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]


def _probe(
    model: Any, chat: Chat, prompts: dict[tuple[str, Setting], list[list[int]]], limits: Limits, batch_size: int, *, references: Sequence[int],
    asked: Sequence[Example], recipe: Recipe, context: Context, tell: Tell,
) -> tuple[dict[str, list[_Probe]], _Probe]:  # fmt: skip
    """One batch for each candidate's settings with the shortest and the longest prompts, and one with an adapter in place."""
    plain = [prompt_ids("tuned", example, Setting(), context)[0] for example in asked]
    short = Limits(4)
    list(generate(model, chat, [plain[0]], short, batch_size=1))  # warms up, untimed
    chosen: dict[str, list[list[list[int]]]] = {}
    for name in dict.fromkeys(name for name, _ in prompts):
        ordered = sorted((found for (other, _), found in prompts.items() if other == name), key=lambda found: sum(map(len, found)))
        chosen[name] = [ordered[0], ordered[-1]] if CANDIDATES[name].shots and len(ordered) > 1 else [ordered[0]]
    total = sum(map(len, chosen.values())) + 1
    found: dict[str, list[_Probe]] = {}
    for name, sets in chosen.items():
        for number, one in enumerate(sets):
            tell("timing answers", sum(map(len, found.values())), total, name)
            found.setdefault(name, []).append(_answer(model, chat, one, limits, batch_size, whole=number == len(sets) - 1))
    tell("timing answers", total - 1, total, "with an adapter")
    # A fresh adapter changes no answer, and costs what a trained one costs; it would go on for ever, so it stops where a trained one does.
    stop = Limits(max(2, min(limits.max_new_tokens, int(np.median(references)))))
    adapted = METHODS[recipe.training.method](model, recipe).eval()
    tuned = _answer(adapted, chat, plain, stop, batch_size)
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


__all__ = ["UNITS", "AnswerCost", "answer_costs", "fit", "reckon", "text_costs", "work_of"]
