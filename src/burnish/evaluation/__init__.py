"""Candidates measured on the same rows.

in          a run with its data prepared (and, for `tuned`, its adapter)
out         candidates/selection.json, one predictions file per candidate, comparison.json
invariant   every candidate answers the same rows; what is chosen is chosen on validation rows; a verdict has a number and an interval
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from burnish.data import Passage, read_passages
from burnish.evaluation.candidates import CANDIDATES, Context, Setting, candidates_for, fitting, make_context
from burnish.evaluation.compare import compare_run, detectable, is_answered
from burnish.evaluation.endpoint import Client, Endpoint
from burnish.evaluation.likelihood import BITS_PER_BYTE, TEXT_CANDIDATES, compare_text, is_measured, measure_text
from burnish.evaluation.predict import Options, predict, read_predictions, rows_per_second
from burnish.evaluation.rescore import TaskRows, score_task
from burnish.evaluation.retention import SUITES, Ground, Measured, measure_suite
from burnish.evaluation.retrieve import BY_WORDS, Library, Words
from burnish.evaluation.samples import draw_samples, drawing_of
from burnish.evaluation.select import select, settings_to_try
from burnish.evaluation.speed import AnswerCost, Asked, costs, spread, text_costs
from burnish.evaluation.suites import DEFAULT_SUITES, Suite, openings, read_suites
from burnish.evaluation.weigh import weigh, weigh_runs
from burnish.models import Chat, Limits, base_state, can_embed, embed, load_base, load_trained, trained_hash, verify_adapter, weights_hash
from burnish.recipe import EndpointSection, Recipe
from burnish.run import Run, hash_of
from burnish.tasks import Metric, Task, find_metric, measure, task_for
from burnish.types import Dataset, Example, Tell, silent

_LONGEST_CONTEXT_TOKENS = 4096  # of a baseline's prompt, even where the model could read more: it is what measuring costs


def evaluate(run: Run, dataset: Dataset, recipe: Recipe, chat: Chat, task: Task, *, trained: bool, tell: Tell = silent) -> None:
    """Answer the test rows with the candidates that need no training (`trained=False`, after choosing their prompts on validation rows)
    or with those that do. Answers already in the run are kept."""
    names = [name for name in recipe.evaluation.candidates if CANDIDATES[name].trained == trained]
    if not names:
        return
    recipe = on_tuned_base(run, recipe) if trained else recipe
    model = load_trained(recipe, run.adapter_folder, tell) if trained else load_base(recipe, tell)
    identity = base_state(recipe)
    if trained:
        identity = hash_of(identity, trained_hash(verify_adapter(run.adapter_folder, weights_hash(recipe.model.name))))
    limits = limits_for(dataset.train, int(recipe.evaluation.max_new_tokens))
    window = int(getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST_CONTEXT_TOKENS))
    room = max(64, min(window, _LONGEST_CONTEXT_TOKENS) - limits.max_new_tokens)
    library = library_for(run, dataset, recipe, tell)
    context = make_context(chat, task, library, instruction=recipe.task.instruction, prompt_limit=room, client=client_for(run, recipe))
    options = Options(recipe.evaluation.batch_size, identity=identity, tell=tell)
    chosen = _chosen_before(run) if trained else _choose(run, model, names, dataset.validation, context, limits, recipe, task, options)
    for name in names:
        setting = Setting(**chosen[name]) if name in chosen else Setting()
        kept = Options(options.batch_size, identity=identity, keep=run.predictions_file(name), tell=tell)
        predict(model, name, dataset.test, setting=setting, context=context, limits=limits, options=kept)
        if (drawing := drawing_of(recipe)) is not None and CANDIDATES[name].by == "model":
            drawn = dataclasses.replace(kept, keep=run.samples_file(name))
            draw_samples(
                model, name, dataset.test, setting=setting, context=context, limits=limits, options=drawn, drawing=drawing, seed=recipe.seed
            )


def library_for(run: Run | None, dataset: Dataset, recipe: Recipe, tell: Tell = silent) -> Library:
    """What the run's candidates can look up: its training rows, and the recipe's documents. Without a run by words only."""
    passages: list[Passage] = []
    if recipe.data.documents is not None:
        tell("reading the documents", 0, 0, recipe.data.documents)
        passages = read_passages(recipe.data.documents, [example.reference for example in dataset.train])
    if run is None or not can_embed():
        return Library(dataset.train, passages)
    return Library(dataset.train, passages, embed=partial(embed, tell=tell), folder=run.predictions_file("base").parent)


def client_for(run: Run, recipe: Recipe) -> Client | None:
    """Of the recipe's larger model; its answers are kept in the run, so that none is paid for twice."""
    section = recipe.evaluation.endpoint
    return None if section is None else Client(endpoint_of(section), run.endpoint_file("endpoint"))


def endpoint_of(section: EndpointSection) -> Endpoint:
    """Raises RecipeError for an address that a key must not be sent to."""
    return Endpoint(name="endpoint", **section.model_dump())


def _chosen_before(run: Run) -> dict[str, dict[str, Any]]:
    """The tuned model reads the documents as the base does best, and is asked as it was trained."""
    chosen = run.read_json(run.selection_file)["chosen"] if run.selection_file.exists() else {}
    rag = chosen.get("rag", asdict(Setting(passages=1)))
    return {"tuned_rag": {**rag, "prompt_form": "as_is", "shots": 0}}


def answer_costs(
    dataset: Dataset, recipe: Recipe, chat: Chat, task: Task, *, test_rows: int, clock: Callable[[], float] = time.perf_counter, tell: Tell = silent
) -> AnswerCost:  # fmt: skip
    """What `evaluate` will take for all candidates, from a few batches answered now. Validation rows stand for the `test_rows` test rows, which are not read."""
    began = clock()
    model = load_base(recipe, tell)
    load_seconds = clock() - began
    limits = limits_for(dataset.train, int(recipe.evaluation.max_new_tokens))
    window = int(getattr(model.config.get_text_config(), "max_position_embeddings", _LONGEST_CONTEXT_TOKENS))
    room = max(64, min(window, _LONGEST_CONTEXT_TOKENS) - limits.max_new_tokens)
    library, ways = library_for(None, dataset, recipe, tell), {kind: {"chosen": BY_WORDS} for kind in ("examples", "passages")}
    context = make_context(chat, task, library, instruction=recipe.task.instruction, prompt_limit=room)
    rows = sorted(dataset.validation, key=lambda example: example.id)[: recipe.evaluation.selection_rows]
    some = spread(dataset.validation)

    def prompts(name: str, setting: Setting, examples: Sequence[Example]) -> list[list[int]]:
        return [fitting(name, example, setting, context)[1] for example in examples]

    asked = []
    for name in (name for name in recipe.evaluation.candidates if CANDIDATES[name].by == "model"):
        trained = CANDIDATES[name].trained
        for setting in [Setting()] if trained else settings_to_try(name, recipe.evaluation, library, ways=ways, chosen={}):
            asked.append(Asked(name, [] if trained else prompts(name, setting, rows), prompts(name, setting, some)))
    references = [len(chat.tokenizer.encode(example.reference, add_special_tokens=False)) + 1 for example in some]
    return costs(
        model, recipe, chat, asked, limits=limits, references=references, test_rows=test_rows, load_seconds=load_seconds, tell=tell
    )


def on_tuned_base(run: Run, recipe: Recipe) -> Recipe:
    """The recipe with the base that the run's adapter belongs to: its own, or what earlier stages of a chain left in the run's folder."""
    folder = run.read_json(run.training_file).get("base_folder")
    if folder is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(run.path / folder)})})


def validation_answers(model: Any, dataset: Dataset, recipe: Recipe, chat: Chat, metric: Metric, tell: Tell = silent) -> list[str]:
    """What the model, as it is now, answers to the validation rows, in order, when it is asked as it was trained."""
    limits = limits_for(dataset.train, int(recipe.evaluation.max_new_tokens))
    task = task_for(metric.name, [example.reference for example in dataset.train])
    context = make_context(chat, task, Library(()), instruction=recipe.task.instruction or "", prompt_limit=_LONGEST_CONTEXT_TOKENS)
    options = Options(recipe.evaluation.batch_size, title="answering validation rows", tell=tell)
    made = predict(model, "tuned", dataset.validation, setting=Setting(), context=context, limits=limits, options=options)
    return [prediction.text for prediction in made]


def validation_score(model: Any, dataset: Dataset, recipe: Recipe, chat: Chat, metric: Metric, tell: Tell = silent) -> float | None:
    """The score of `validation_answers`. None: no row could be scored."""
    answers = validation_answers(model, dataset, recipe, chat, metric, tell)
    return measure(metric, answers, [example.reference for example in dataset.validation]).value


def limits_for(train: Sequence[Example], max_new_tokens: int) -> Limits:
    """Where no training answer has a line break, an untrained model's answer ends at the first one; likewise with empty lines."""
    references = [example.reference.strip() for example in train]
    for stop in ("\n", "\n\n"):
        if not any(stop in text for text in references):
            return Limits(max_new_tokens, (stop,))
    return Limits(max_new_tokens)


def _choose(
    run: Run, model: Any, names: Sequence[str], validation: Sequence[Example], context: Context, limits: Limits, recipe: Recipe, task: Task,
    options: Options,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    library = context.library
    seen = [row.id for row in [*validation, *library.train]]
    key = hash_of(
        names,
        seen,
        [[passage.text, passage.answer] for passage in library.passages],
        library.ways,
        {key: value for key, value in recipe.to_dict()["evaluation"].items() if key != "checks"},
        task.metric,
        context.instruction,
        asdict(limits),
        context.chat.template_hash,
        options.identity,
    )
    if run.selection_file.exists() and (before := run.read_json(run.selection_file)).get("key") == key:
        return dict(before["chosen"])
    metric, settings = find_metric(task.metric), recipe.evaluation
    found = select(model, names, validation, context=context, limits=limits, metric=metric, settings=settings, options=options)
    run.write_json(run.selection_file, {"key": key, **found})
    return dict(found["chosen"])


__all__ = [
    "BITS_PER_BYTE", "CANDIDATES", "DEFAULT_SUITES", "SUITES", "TEXT_CANDIDATES", "AnswerCost", "Client", "Endpoint", "Ground",
    "Measured", "Suite", "TaskRows", "Words", "answer_costs", "candidates_for", "compare_run", "compare_text", "detectable", "drawing_of",
    "endpoint_of", "evaluate", "is_answered", "is_measured", "limits_for", "measure_suite", "measure_text", "on_tuned_base", "openings",
    "read_predictions", "read_suites", "rows_per_second", "score_task", "text_costs", "validation_answers", "validation_score", "weigh",
    "weigh_runs",
]  # fmt: skip
