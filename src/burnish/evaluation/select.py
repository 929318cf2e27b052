"""Give the baselines their best shot: how they ask, how many examples they show, where they look up. Chosen on validation rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from burnish.evaluation.candidates import CANDIDATES, Context, Setting
from burnish.evaluation.predict import Options, predict
from burnish.evaluation.retrieve import BY_WORDS, Library
from burnish.models import Limits
from burnish.recipe import EvaluationSection
from burnish.tasks import Metric, measure
from burnish.types import Example

NEIGHBOURS = (1, 3, 5, 10, 20)  # how many vote
PASSAGES = (1, 4)  # how many are read
LOOKED_UP_ROWS = 200  # validation rows on which what needs no model is chosen


def select(
    model: Any, candidates: Sequence[str], validation: Sequence[Example], *, context: Context, limits: Limits, metric: Metric,
    settings: EvaluationSection, options: Options,
) -> dict[str, Any]:  # fmt: skip
    """Try every setting of every untrained candidate. Returns what selection.json holds. A tie goes to the cheaper prompt."""
    ordered = sorted(validation, key=lambda example: example.id)
    rows, many = ordered[: settings.selection_rows], ordered[:LOOKED_UP_ROWS]
    ways = choose_ways(context.library, many, metric)
    tried: list[dict[str, Any]] = []
    chosen: dict[str, Setting] = {}
    for candidate in candidates:
        if CANDIDATES[candidate].trained:
            continue
        asked = many if CANDIDATES[candidate].by == "neighbours" else rows
        best: tuple[float, float] | None = None
        for setting in settings_to_try(candidate, settings, context.library, ways=ways, chosen=chosen):
            title = f"choosing for {candidate}: {_told(setting)}"
            made = predict(model, candidate, asked, setting=setting, context=context, limits=limits, options=replace(options, title=title))
            score = measure(metric, [prediction.text for prediction in made], [example.reference for example in asked])
            tokens = sum(prediction.prompt_tokens for prediction in made) / len(made)
            tried.append(
                {"candidate": candidate, **asdict(setting), "score": score.value, "n": score.n, "prompt_tokens_mean": round(tokens, 1)}
            )
            rank = (score.value if score.value is not None else -1.0, -tokens)
            if best is None or rank > best:
                best, chosen[candidate] = rank, setting
    prompts = {
        name: context.chat.render(CANDIDATES[name].messages(rows[0], setting, context), add_generation_prompt=True)
        for name, setting in chosen.items()
    }
    return {
        "metric": metric.name,
        "rows": len(rows),
        "tried": tried,
        "chosen": {name: asdict(setting) for name, setting in chosen.items()},
        "ways": ways,
        "instruction": context.instruction,
        "example_prompts": prompts,
    }


def settings_to_try(
    candidate: str, settings: EvaluationSection, library: Library, *, ways: dict[str, dict[str, Any]], chosen: dict[str, Setting]
) -> list[Setting]:
    """`chosen`: of the candidates before this one; who reads documents *and* sees examples takes over what each does best."""
    forms, way = settings.prompt_forms, ways["examples"]["chosen"]
    fewest = min(settings.shots)
    if candidate == "neighbours":
        pools = ("examples", "labelled") if library.labelled else ("examples",)
        return [Setting(shots=k, way=one, pool=pool) for pool in pools for one in library.ways for k in NEIGHBOURS]
    if candidate == "endpoint":
        return [Setting("instructed", shots, way=way) for shots in (0, fewest)]
    if candidate == "rag":
        return [Setting(form, 0, passages, ways["passages"]["chosen"]) for passages in PASSAGES for form in forms]
    if candidate == "rag_few_shot":
        form = chosen["rag"].prompt_form if "rag" in chosen else forms[-1]
        return [Setting(form, fewest, passages, ways["passages"]["chosen"]) for passages in PASSAGES]
    shown = settings.shots if CANDIDATES[candidate].shots else [0]
    return [Setting(form, number, way=way) for number in shown for form in forms]


def choose_ways(library: Library, rows: Sequence[Example], metric: Metric) -> dict[str, dict[str, Any]]:
    """By words or by meaning? For examples: whose nearest training row has the better answer. For passages: whose nearest knows the answer, or
    holds more words of it. No model is asked."""
    references = [row.reference for row in rows]

    def vote(pool: str, way: str) -> float:
        library.ask([row.question for row in rows], way, pool)
        return measure(metric, [library.vote(row.question, 1, way, pool) for row in rows], references).value or 0.0

    def held(way: str) -> float:
        library.ask([row.question for row in rows], way, "passages")
        texts = (" ".join(passage.text for passage in library.read(row.question, max(PASSAGES), way)) for row in rows)
        return sum(_recall(row.reference, text) for row, text in zip(rows, texts, strict=True)) / max(1, len(rows))

    measured = {"examples": {way: vote("examples", way) for way in library.ways}}
    if library.passages:
        measured["passages"] = {way: vote("labelled", way) if library.labelled else held(way) for way in library.ways}
    best = {kind: max(scores, key=lambda way: scores[way]) for kind, scores in measured.items()}  # of equals the first: by words
    found = {kind: {"chosen": best[kind], "scores": {way: round(value, 4) for way, value in measured[kind].items()}} for kind in measured}
    return {"examples": {"chosen": BY_WORDS, "scores": {}}, "passages": {"chosen": BY_WORDS, "scores": {}}, **found}


def _recall(reference: str, text: str) -> float:
    """The share of the reference's words that stand in the text."""
    wanted = set(re.findall(r"\w+", reference.casefold()))
    return len(wanted & set(re.findall(r"\w+", text.casefold()))) / len(wanted) if wanted else 0.0


def _told(setting: Setting) -> str:
    parts = [setting.prompt_form, f"{setting.shots} shots"]
    return ", ".join(
        parts + ([f"{setting.passages} passages"] if setting.passages else []) + ([setting.way] if setting.way != BY_WORDS else [])
    )
