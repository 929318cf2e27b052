"""`burnish retain`: what the tuned model has forgotten, and the point between task and retention that is worth shipping.

suites       rows of what must still work                       evaluation.suites
measure      base and tuned on the same rows, kept as they come  evaluation.retention
judge        each suite, the whole, the gate                     advice.retain
repair       as far as asked                                     pipeline.repair
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish import evaluation, report
from burnish.advice import Pair, judge_gate, judge_retention, retention_sentence
from burnish.errors import DataError
from burnish.evaluation import SUITES, Ground, Measured, Suite, TaskRows, measure_suite, read_suites, score_task
from burnish.models import (
    Chat,
    Scaled,
    base_state,
    context_window,
    load_base,
    load_chat,
    load_trained,
    trained_hash,
    verify_adapter,
    weights_hash,
)
from burnish.pipeline.steps import dataset_of, task_of
from burnish.recipe import Recipe
from burnish.run import Run, hash_of
from burnish.tasks import Task
from burnish.types import Dataset, Tell, silent

LONGEST_TOKENS = 4096  # of a row of a suite, even where the model could read more
SHOWN_BROKEN = 20  # prompts that worked before and do not now


@dataclass(frozen=True, slots=True)
class RetainOptions:
    """What `burnish retain` may be told besides the recipe's `retain`."""

    suites: tuple[str, ...] = ()  # none: the recipe's, else the embedded ones
    max_drop: float | None = None  # none: the recipe's
    rows: int = 200  # of each suite, at most
    task_rows: int = 100  # validation rows that each point answers, at most
    repairs: tuple[str, ...] = ()  # keys of pipeline.repair.REPAIRS, in order of cost
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.25)  # besides 0, the base, and 1, the tuned model
    budget_seconds: float | None = None  # of this call's repairs
    replay_data: str | None = None  # general rows for `replay`; none: what the base itself writes


@dataclass(slots=True)
class State:
    """One model: its name among the points, a hash of its weights, and how to get it."""

    name: str
    key: str
    model: Callable[[], Any]


@dataclass(slots=True)
class Bench:
    """Where models are measured: the run, its rows, the suites. One model is in memory at a time."""

    job: Run
    recipe: Recipe  # on the base that was tuned
    chat: Chat
    dataset: Dataset
    suites: list[Suite]
    ground: Ground
    options: RetainOptions
    tell: Tell
    _scaled: Scaled | None = field(default=None, init=False)
    _other: tuple[str, Any] | None = field(default=None, init=False)

    @property
    def scaled(self) -> Scaled:
        if self._scaled is None:
            self._other = None
            self._scaled = Scaled(self.recipe, self.job.adapter_folder, self.tell)
        return self._scaled

    @property
    def task(self) -> Task | None:
        """What good means; none: plain text, which is judged by its bits."""
        return None if self.recipe.training.objective == "text" else task_of(self.recipe, self.dataset)

    @property
    def base(self) -> State:
        """The recipe's own base. Where earlier stages left the base that was tuned, that is another model."""
        own = self.job.recipe()
        if own.model.name == self.recipe.model.name:
            return State("base", base_state(own), lambda: self.scaled.at(0))
        return State("base", base_state(own), lambda: self._load("base", lambda: load_base(own, self.tell)))

    @property
    def tuned(self) -> State:
        return self.at(1)

    def at(self, scale: float) -> State:
        manifest = verify_adapter(self.job.adapter_folder, weights_hash(self.recipe.model.name))
        tuned = hash_of(base_state(self.recipe), trained_hash(manifest))  # as `burnish evaluate` names it
        return State(
            "tuned" if scale == 1 else f"scale {scale:g}", tuned if scale == 1 else hash_of(tuned, scale), lambda: self.scaled.at(scale)
        )

    def trained(self, name: str, recipe: Recipe, folder: Path) -> State:
        """A model that a repair trained."""
        manifest = verify_adapter(folder, weights_hash(recipe.model.name))
        key = hash_of(base_state(recipe), trained_hash(manifest))
        return State(name, key, lambda: self._load(key, lambda: load_trained(recipe, folder, self.tell)))

    def release(self) -> None:
        """Let go of every model: a training needs the memory."""
        self._scaled = self._other = None

    def suite_rows(self, state: State, only: dict[str, frozenset[str]] | None = None) -> dict[str, dict[str, Measured]]:
        """{suite: {item: row}}; `only`: those items of each suite."""
        return {
            suite.name: measure_suite(
                self.job.retain_rows_file,
                state.key,
                state.model,
                suite,
                self.ground,
                only=None if only is None else only[suite.name],
                title=state.name,
            )
            for suite in self.suites
        }

    def task_values(self, state: State, split: str) -> dict[str, float]:
        """{example: value} of validation rows (at most `task_rows`) or of the test rows."""
        rows: Sequence[Any] = self.dataset.test
        if split == "validation":
            rows = sorted(self.dataset.validation, key=lambda example: example.id)[: self.options.task_rows]
        answers = self.job.retain_folder / "answers" / f"{state.key}-{split}.jsonl"
        known = self.job.predictions_file("tuned") if split == "test" and state.name == "tuned" else None
        wanted = TaskRows(self.dataset, tuple(rows), self.recipe, self.chat, self.task, answers, known)
        return score_task(self.job.retain_rows_file, state.key, state.model, wanted, title=f"{state.name}: {split} rows", tell=self.tell)

    def _load(self, key: str, load: Callable[[], Any]) -> Any:
        if self._other is None or self._other[0] != key:
            self.release()
            self._other = (key, load())
        return self._other[1]


def retain(
    job: Run, options: RetainOptions | None = None, *, dataset: Dataset | None = None, chat: Chat | None = None, tell: Tell = silent
) -> dict[str, Any]:
    """Measure base and tuned on the suites, judge, repair as far as asked; write retain.json. Returns what it holds.

    Goes on where an earlier call was cut off. Raises DataError before anything is trained, RecipeError for suites or repairs that do not exist.
    """
    from burnish.pipeline.repair import check_repairs, repair  # they build on what is above

    options = options or RetainOptions()
    if not job.training_file.exists():
        raise DataError(f"{job.path}: nothing is trained yet: run `burnish train` first")
    recipe, settings = job.recipe(), job.recipe().retain
    check_repairs(options)
    names = options.suites or tuple(settings.suites or evaluation.DEFAULT_SUITES)
    max_drop = settings.max_drop if options.max_drop is None else options.max_drop
    suites = read_suites(names, rows=options.rows)
    chat = chat or load_chat(recipe.model, tell)
    ground = Ground(
        chat, min(context_window(recipe.model.name) or LONGEST_TOKENS, LONGEST_TOKENS), recipe.evaluation.batch_size, options.rows, tell
    )
    bench = Bench(job, evaluation.on_tuned_base(job, recipe), chat, dataset or dataset_of(job), suites, ground, options, tell)
    with job.step("retain", hash_of(names, options.rows, max_drop, bench.tuned.key)):
        before, after = bench.suite_rows(bench.base), bench.suite_rows(bench.tuned)
        judging: dict[str, Any] = {
            "confidence": recipe.evaluation.confidence,
            "resamples": recipe.evaluation.resamples,
            "seed": recipe.seed,
        }
        pairs = pairs_of(suites, before, after)
        content = {
            "names": list(names),
            "kinds": {suite.name: SUITES[suite.kind].title for suite in suites},
            **judge_retention(pairs, **judging, margin=max_drop),
        }
        content["sentence"] = retention_sentence(content)
        content["broken"] = _broken(suites, before, after)
        content["max_drop"] = max_drop
        content["gate"] = None if max_drop is None else judge_gate(pairs, max_drop, **judging)
        content["repair"] = repair(bench, before, after, judging=judging, max_drop=max_drop) if options.repairs else None
        job.write_json(job.retain_file, content)
    if job.comparison_file.exists():
        with job.step("report", ""):
            report.report(job)
    return content


def pairs_of(
    suites: Sequence[Suite],
    before: dict[str, dict[str, Measured]],
    after: dict[str, dict[str, Measured]],
    only: dict[str, frozenset[str]] | None = None,
) -> list[Pair]:
    """Values of the same rows by two models, suite by suite. A suite of which no row is left is left out."""
    made = []
    for suite in suites:
        way = SUITES[suite.kind]
        items = [item for item in before[suite.name] if item in after[suite.name] and (only is None or item in only[suite.name])]
        if items:
            values = [tuple(rows[suite.name][item].value for item in items) for rows in (before, after)]
            made.append(Pair(suite.name, way.title, values[0], values[1], way.lower_is_better, way.unit))
    return made


def gate_of(content: dict[str, Any]) -> str | None:
    """What the gate says of what is to be shipped: the repaired adapter where there is one, else the tuned model. None: no gate."""
    repaired = (content.get("repair") or {}).get("gate")
    gate = repaired or content["gate"]
    return None if gate is None else str(gate["state"])


def _broken(suites: Sequence[Suite], before: dict[str, dict[str, Measured]], after: dict[str, dict[str, Measured]]) -> list[dict[str, Any]]:
    """Prompts that worked and do not now, with both answers; the largest falls first."""
    found = []
    for suite in suites:
        if suite.kind != "prompts":
            continue
        for item in suite.items:
            one, other = before[suite.name][item.id], after[suite.name][item.id]
            if other.value < one.value:
                wanted = item.row.get("must_contain") or item.row.get("answer")
                texts = {"prompt": item.row["prompt"], "expected": wanted if isinstance(wanted, str) else " · ".join(wanted or ())}
                values = {
                    "before": one.value,
                    "after": other.value,
                    "answer_before": one.facts["answer"],
                    "answer_after": other.facts["answer"],
                }
                found.append({"suite": suite.name, "source": item.source, **texts, **values})
    return sorted(found, key=lambda row: row["after"] - row["before"])[:SHOWN_BROKEN]


__all__ = ["Bench", "RetainOptions", "State", "gate_of", "pairs_of", "retain"]
