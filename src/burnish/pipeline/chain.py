"""Training in stages: each a run of its own under stages/NAME, continuing from the one before, with a gate after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from burnish import data as data_room
from burnish import evaluation, training
from burnish.errors import DataError, GateError, RecipeError
from burnish.models import ADAPTER_MANIFEST, Chat, base_state, load_chat, merge_adapter, tokens_of, weights_hash
from burnish.pipeline.steps import PROBE_ROWS, checked_rows, dataset_of, on_base, prepare, task_of, train_once
from burnish.recipe import DataSection, Recipe, StageSection, differences, stage_recipes
from burnish.run import Run, hash_of, is_allowed
from burnish.tasks import find_metric
from burnish.training import BASE, Start
from burnish.types import Dataset, Example, Tell, Tokens, silent

TASK, RETAINED = "the run's own rows", "rows to be retained"


def train(
    job: Run, *, dataset: Dataset | None = None, chat: Chat | None = None, allow_change: Sequence[str] = (), tell: Tell = silent
) -> dict[str, Any]:
    """Fine-tune, in one training or in the recipe's stages; what is best becomes the run's adapter. Returns the summary.

    `allow_change`: conditions that may differ from those under which a training that was cut off began; of a chain, in the stages that are not done yet.
    Raises GateError where a stage does not pass its gate; what the stages before it left stays in their folders.
    """
    dataset, recipe = dataset or dataset_of(job), job.recipe()
    chat = chat or load_chat(recipe.model, tell)
    if not recipe.stages:
        return train_once(job, dataset=dataset, chat=chat, allow_change=allow_change, tell=tell)
    if training.several_processes():
        training.dismiss()
        raise RecipeError("stages run in one process: leave out --processes, or train the stages one by one")
    inputs = hash_of(
        recipe.to_dict(), [dataset.manifest["splits"][split]["file_sha256"] for split in data_room.SPLITS], weights_hash(recipe.model.name)
    )
    if job.step_done("train", inputs) and job.adapter_folder.exists():
        return dict(job.read_json(job.training_file))
    with job.step("train", inputs), ExitStack() as locks:
        stages = []
        # All rows before the first step: what is wrong with the last stage's should not wait for the first one's training.
        for stage, own in zip(recipe.stages, stage_recipes(job.recipe_as_asked()), strict=True):
            folder = job.stage_folder(stage.name)
            place = locks.enter_context(Run.working(folder, _as_begun(Run(folder), own, allow_change), allow_change=allow_change))
            rows = prepare(place, chat=chat, apart=dataset, tell=_titled(stage.name, tell))
            stages.append(_hold_back(_Stage(stage, place, rows), chat, tell))
        return _train_stages(job, dataset, stages, chat, allow_change=allow_change, tell=tell)


def _as_begun(place: Run, own: Recipe, allow_change: Sequence[str]) -> Recipe:
    """The recipe of a stage. One that is done stays what it was: what may change in mid-training changes for those that still train."""
    if not allow_change or place.status()["steps"].get("train", {}).get("state") != "done":
        return own
    begun = place.recipe_as_asked()
    return begun if all(is_allowed(key, allow_change) for key in differences(begun, own)) else own


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows whose loss is measured between the stages."""

    examples: tuple[Example, ...]
    sequences: list[Tokens]

    @classmethod
    def of(cls, examples: Sequence[Example], recipe: Recipe, chat: Chat) -> _Rows:
        chosen = training.drawn(examples, recipe.seed)
        return cls(tuple(chosen), [tokens for example in chosen for tokens in tokens_of(chat, example, recipe)])


@dataclass(frozen=True, slots=True)
class _Stage:
    section: StageSection
    job: Run
    dataset: Dataset
    retained: _Rows | None = None  # for the gate; none of them is trained on

    @property
    def name(self) -> str:
        return self.section.name


def _train_stages(
    job: Run, dataset: Dataset, stages: Sequence[_Stage], chat: Chat, *, allow_change: Sequence[str], tell: Tell
) -> dict[str, Any]:
    sets = {stage.name: _Rows.of(stage.dataset.validation, stage.job.recipe(), chat) for stage in stages}
    sets[TASK] = _Rows.of(dataset.validation, job.recipe(), chat)
    told: dict[str, Any] = {
        "rows": {name: len(rows.examples) for name, rows in sets.items()},
        "states": [],
        "stages": [],
        "stopped_at": None,
    }
    told["measured"] = job.read_json(job.stages_file)["measured"] if job.stages_file.exists() else {}
    start, summaries = BASE, []
    for index, stage in enumerate(stages):
        tell(f"stage {index + 1} of {len(stages)}", 0, 0, stage.name)
        before = _state(stage, sets, start, chat, known=told["measured"], tell=tell)
        summary = train_once(
            stage.job, dataset=stage.dataset, chat=chat, start=start, allow_change=allow_change, tell=_titled(stage.name, tell)
        )
        summaries.append(summary)
        left = replace(start, adapter=stage.job.adapter_folder, sha256=summary["adapter_sha256"])
        after = _state(stage, sets, left, chat, known=told["measured"], tell=tell)
        row = _row(stage, summary, before, after, carried=start.adapter is not None)
        told["states"] += [{"after": stage.name, **after}] if index else [{"after": None, **before}, {"after": stage.name, **after}]
        told["stages"].append(row)
        passed = row["gate"] is None or row["gate"]["passed"]
        job.write_json(job.stages_file, {**told, "stopped_at": None if passed else stage.name})
        if not passed:
            raise GateError(
                f"stage {stage.name} did not pass its gate: {row['gate']['sentence']}. The chain stops here; "
                f"the adapters of the stages so far are in {job.path / 'stages'}/*/adapter, the numbers in {job.stages_file}"
            )
        gains = f"its own rows {row['before']:.4f} → {row['after']:.4f}, {TASK} {row['task_before']:.4f} → {row['task_after']:.4f}"
        tell(f"stage {stage.name}", 0, 0, f"validation loss of {gains}")
        start = left if index + 1 == len(stages) else _next_start(stage, stages[index + 1], left, chat, tell)
    return _finish(job, stages[-1], summaries, start)


def _next_start(stage: _Stage, following: _Stage, left: Start, chat: Chat, tell: Tell) -> Start:
    """The adapter is trained on where the next stage has the same shape; whole weights are the next base; else the adapter is merged into one."""
    here, adapter = stage.job.recipe(), stage.job.adapter_folder
    if training.carries_on(here, following.job.recipe()):
        return left
    folder = following.job.path / "base"
    if here.training.method == "full":
        folder = adapter
    elif not _is_merged(folder, left.sha256):
        shutil.rmtree(folder, ignore_errors=True)
        probe = [tokens.input_ids for example in stage.dataset.validation[:PROBE_ROWS] for tokens in tokens_of(chat, example, here)]
        merge_adapter(on_base(here, left), adapter, chat, folder, probe, tell)
    return Start(base=str(folder), sha256=weights_hash(str(folder)))


def _is_merged(folder: Path, adapter_sha256: str) -> bool:
    """Whether the folder holds this adapter, merged; a folder appears whole or not at all."""
    manifest = folder / ADAPTER_MANIFEST
    return manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")).get("adapter_sha256") == adapter_sha256


def _state(stage: _Stage, sets: dict[str, _Rows], start: Start, chat: Chat, *, known: dict[str, float], tell: Tell) -> dict[str, Any]:
    """At one point of the chain: the loss of every stage's validation rows, and what this stage's gate looks at. Nothing is measured twice:
    `known` maps a hash of weights and rows to the number, and grows."""
    recipe, gate = on_base(stage.job.recipe(), start), stage.section.gate
    measured = sets if stage.retained is None else {**sets, RETAINED: stage.retained}
    weights = [base_state(recipe), start.sha256 if start.adapter is not None else ""]
    keys = {name: hash_of(weights, [example.id for example in rows.examples]) for name, rows in measured.items()}
    own = replace(stage.dataset, validation=sets[stage.name].examples)
    score_key = None
    if gate is not None and gate.measure == "validation_score":
        score_key = hash_of("score", keys[stage.name], recipe.to_dict()["evaluation"])
    missing = {name: rows.sequences for name, rows in measured.items() if keys[name] not in known}
    if missing or (score_key is not None and score_key not in known):
        model = training.load_state(recipe, start, tell)
        losses = training.measure_losses(model, missing, at_once=int(recipe.training.micro_batch_size), tell=tell)
        known.update({keys[name]: loss for name, loss in losses.items()})
        if score_key is not None and score_key not in known:
            metric = find_metric(task_of(recipe, own).metric)
            known[score_key] = evaluation.validation_score(model, own, recipe, chat, metric, tell) or 0.0
    return {"losses": {name: known[key] for name, key in keys.items()}, "score": known.get(score_key or "")}


def _row(stage: _Stage, summary: dict[str, Any], before: dict[str, Any], after: dict[str, Any], *, carried: bool) -> dict[str, Any]:
    """One line of the table of what each stage brought."""
    gate, result = stage.section.gate, None
    if gate is not None:
        name = stage.name if gate.measure == "validation_loss" else RETAINED
        pair = [state["score"] if gate.measure == "validation_score" else state["losses"][name] for state in (before, after)]
        result = training.judge_gate(gate, *pair)
    kept = ("method", "steps", "planned_steps", "seconds", "learning_rate", "best_step", "examples", "target_tokens")
    return {
        "name": stage.name,
        **{key: summary.get(key) for key in kept},
        "rows": len(stage.dataset.train),
        "source": stage.job.recipe().data.train,
        "continues": "the adapter before" if carried else "a fresh adapter",
        "before": before["losses"][stage.name],
        "after": after["losses"][stage.name],
        "task_before": before["losses"][TASK],
        "task_after": after["losses"][TASK],
        "score_before": before["score"],
        "score_after": after["score"],
        "gate": result,
    }


def _finish(job: Run, last: _Stage, summaries: Sequence[dict[str, Any]], start: Start) -> dict[str, Any]:
    """The last stage's adapter and curve become the run's; the time is that of all stages."""
    training.adopt(job.adapter_folder, last.job.adapter_folder)
    job.write_text(job.metrics_file, last.job.metrics_file.read_text(encoding="utf-8"))
    base = {} if start.base is None else {"base_folder": str(Path(start.base).relative_to(job.path))}
    total = round(sum(float(summary["seconds"]) for summary in summaries), 2)
    summary = {**summaries[-1], "seconds": total, "stages": len(summaries), **base}
    job.write_json(job.training_file, summary)
    return summary


def _hold_back(stage: _Stage, chat: Chat, tell: Tell) -> _Stage:
    """The rows that a retention gate looks at: of its own file, or a share of the replayed rows that is then not trained on."""
    gate = stage.section.gate
    if gate is None or gate.measure != "retention_loss":
        return stage
    recipe = stage.job.recipe()
    if gate.data is not None:
        examples, beside = _rows_beside(gate.data, recipe, chat, tell)
        return replace(stage, retained=_Rows.of(examples, beside, chat))
    replay = stage.dataset.replay
    held = data_room.take(replay, min(training.MEASURED_ROWS, max(1, len(replay) // 5)), recipe.seed)
    chosen = {example.id for example in held}
    left = tuple(example for example in replay if example.id not in chosen)
    return replace(stage, retained=_Rows.of(held, recipe, chat), dataset=replace(stage.dataset, replay=left))


def _rows_beside(name: str, recipe: Recipe, chat: Chat, tell: Tell = silent) -> tuple[list[Example], Recipe]:
    """Usable rows of a file that is not the recipe's own (rows to be retained), and a recipe that reads them. Raises DataError with all problems."""
    section = DataSection.model_validate({"train": name, "max_length": recipe.data.max_length, "over_length": "drop"})
    training = recipe.training.model_copy(update={"replay_data": None, "objective": "supervised"})
    beside = recipe.model_copy(update={"data": section, "training": training})
    loaded = data_room.load(beside)
    if any(source["format"] == "text" for source in loaded.sources):
        beside = beside.model_copy(update={"training": training.model_copy(update={"objective": "text"})})
    checked = checked_rows(loaded, beside, chat, tell)
    if problems := loaded.problems + [problem for part in checked.values() for problem in part.problems]:
        raise DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {name}", problems)
    return [example for part in checked.values() for example in part.examples], beside


def _titled(name: str, tell: Tell) -> Tell:
    return lambda what, done, total, detail: tell(f"{name}: {what}", done, total, detail)
