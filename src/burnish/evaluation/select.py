"""Give the baselines their best shot: the prompt form and the number of examples are chosen on validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from burnish.evaluation.candidates import CANDIDATES, Context, Setting
from burnish.evaluation.predict import Options, predict
from burnish.models import Limits
from burnish.recipe import EvaluationSection
from burnish.tasks import Metric, measure
from burnish.types import Example


def settings_to_try(candidate: str, settings: EvaluationSection) -> list[Setting]:
    shots = settings.shots if CANDIDATES[candidate].shots else [0]
    return [Setting(form, number) for number in shots for form in settings.prompt_forms]


def select(
    model: Any, candidates: Sequence[str], examples: Sequence[Example], *, context: Context, limits: Limits, metric: Metric, settings: EvaluationSection,
    options: Options,
) -> dict[str, Any]:  # fmt: skip
    """Try every setting of every untrained candidate. Returns what selection.json holds. A tie goes to the cheaper prompt."""
    tried: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {}
    references = [example.reference for example in examples]
    for candidate in candidates:
        if CANDIDATES[candidate].trained:
            continue
        best: tuple[float, float] | None = None
        for setting in settings_to_try(candidate, settings):
            title = f"choosing for {candidate}: {setting.prompt_form}, {setting.shots} shots"
            made = predict(
                model, candidate, examples, setting=setting, context=context, limits=limits, options=replace(options, title=title)
            )
            score = measure(metric, [prediction.text for prediction in made], references)
            tokens = sum(prediction.prompt_tokens for prediction in made) / len(made)
            tried.append(
                {"candidate": candidate, **asdict(setting), "score": score.value, "n": score.n, "prompt_tokens_mean": round(tokens, 1)}
            )
            rank = (score.value if score.value is not None else -1.0, -tokens)
            if best is None or rank > best:
                best, chosen[candidate] = rank, asdict(setting)
    prompts = {
        name: context.chat.render(CANDIDATES[name].messages(examples[0], Setting(**chosen[name]), context), add_generation_prompt=True)
        for name in chosen
    }
    return {
        "metric": metric.name,
        "rows": len(examples),
        "tried": tried,
        "chosen": chosen,
        "instruction": context.instruction,
        "example_prompts": prompts,
    }
