"""The steps of one run: each reads from the run's folder, writes into it, and is not done again where it ended well on the same inputs."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from burnish import data as data_room
from burnish import evaluation, report, training
from burnish.data import REPLAY, SPLITS, Checked, Loaded
from burnish.errors import DataError, RecipeError
from burnish.evaluation import CANDIDATES
from burnish.models import (
    Chat,
    Merged,
    base_state,
    context_window,
    licence_of,
    load_chat,
    merge_adapter,
    resolve_device,
    resolve_dtype,
    tokenizer_hash,
    tokens_of,
    trained_hash,
    verify_adapter,
    weights_hash,
)
from burnish.recipe import Recipe
from burnish.run import Run, hash_file, hash_of, write_whole
from burnish.tasks import Task, detect_task, find_metric, task_for, verify_checks
from burnish.training import BASE, Start
from burnish.types import Dataset, Tell, silent

EXAMPLES_AT_ONCE = 8  # what training.micro_batch_size: auto begins with
PROBE_ROWS = 8  # on which a merged model must answer as base and adapter do


def check(recipe: Recipe, *, tell: Tell = silent) -> tuple[Loaded, dict[str, Checked], Chat]:
    """Read and check the rows with the recipe's own tokenizer and template. Writes nothing."""
    loaded = data_room.load(recipe)  # first: a missing file should not wait for a model
    chat = load_chat(recipe.model, tell)
    return loaded, checked_rows(loaded, recipe, chat, tell), chat


def prepare(job: Run, *, chat: Chat | None = None, apart: Dataset | None = None, tell: Tell = silent) -> Dataset:
    """Three JSONL files, a manifest, and the recipe with every `auto` resolved. `apart`: of the run that this one is a stage of."""
    return prepare_once(job, chat=chat, apart=apart, tell=tell) or dataset_of(job)


def prepare_once(job: Run, *, chat: Chat | None = None, apart: Dataset | None = None, tell: Tell = silent) -> Dataset | None:
    """Prepare where it is not done yet. None: what is on the disk holds, and nothing of it was read."""
    recipe = job.recipe_as_asked()
    others = [] if apart is None else [apart.manifest["splits"][split]["sha256"] for split in ("test", "validation")]
    content = recipe.to_dict()
    del content["evaluation"]["checks"]  # rows do not depend on how answers are judged
    asked = hash_of(content, _tokens_state(recipe), *others)
    inputs = hash_of(asked, [_fingerprint(name) for name in _data_files(recipe)])
    _take_over_checks(job, recipe)
    if job.step_done("prepare", inputs):
        return None
    if gone := _gone(job, recipe, asked):
        tell("source gone", 0, 0, f"{gone} is no longer there; the run goes on with its own copy of the rows")
        return None
    tell("reading the rows", 0, 0, recipe.data.train)
    with job.step("prepare", inputs) as entry:
        loaded = data_room.load(recipe)
        chat = chat or load_chat(recipe.model, tell)
        dataset = data_room.prepare(loaded, checked_rows(loaded, recipe, chat, tell), recipe, apart=apart)
        resolved = job.resolve(_resolved_values(recipe, dataset, chat))
        for split in dataset.manifest["splits"]:
            job.write_jsonl(job.split_file(split), [data_room.example_to_row(example) for example in getattr(dataset, split)])
            dataset.manifest["splits"][split]["file_sha256"] = hash_file(job.split_file(split))
        job.write_json(job.manifest_file, dataset.manifest)
        job.note(base_license=licence_of(recipe.model.name))  # for the model card, which is written without a model
        entry["asked"] = asked
        entry["rows"] = {split: len(getattr(dataset, split)) for split in dataset.manifest["splits"]}
    counts = " · ".join(f"{split} {len(getattr(dataset, split))}" for split in dataset.manifest["splits"])
    removed = "".join(f", {count} left out ({reason})" for reason, count in dataset.manifest["removed_counts"].items())
    tell("prepared", 0, 0, counts + removed)
    if resolved.training.objective != "preference" and any(example.rejected is not None for example in dataset.train):
        tell("rejected answers", 0, 0, "not used: the chosen ones are trained. training.objective: preference trains on both")
    if resolved.training.objective == "text":
        tell("what is measured", 0, 0, f"bits per byte of {len(dataset.test)} test documents, before and after")
        return dataset
    metric = find_metric(resolved.task.metric)
    shown = evaluation.detectable(len(dataset.test), resolved, metric)
    points = "no difference at all; get more test rows" if shown is None else f"differences of about {100 * shown:.0f} points or more"
    tell("what can be shown", 0, 0, f"{len(dataset.test)} test rows, {metric.title.lower()}: {points}")
    job.event("detectable_difference", rows=len(dataset.test), difference=shown)
    return dataset


def _take_over_checks(job: Run, recipe: Recipe) -> None:
    """Read the files of the checks, so that a broken one is told before anything is computed; the resolved recipe follows the one asked for."""
    checks = recipe.evaluation.checks
    verify_checks([(check.name, check.settings) for check in checks or ()])
    if job.resolved_file.exists() and job.recipe().evaluation.checks != checks:
        job.resolve({"evaluation.checks": recipe.to_dict()["evaluation"]["checks"]}, further=True)


def evaluate(
    job: Run, *, trained: bool | None = None, dataset: Dataset | None = None, chat: Chat | None = None, tell: Tell = silent
) -> None:
    """Answers of the candidates: those that need no training, those that do, or (None) both as far as there is an adapter."""
    if trained is None:
        evaluate(job, trained=False, dataset=dataset, chat=chat, tell=tell)
        if not any(CANDIDATES[name].trained for name in job.recipe().evaluation.candidates):
            return
        if job.training_file.exists():
            evaluate(job, trained=True, dataset=dataset, chat=chat, tell=tell)
        else:
            tell("not evaluated", 0, 0, "the fine-tuned candidate: `burnish train` comes first")
        return
    dataset, recipe = dataset or dataset_of(job), job.recipe()
    names = [name for name in recipe.evaluation.candidates if CANDIDATES[name].trained == trained]
    adapter = job.read_json(job.training_file)["adapter_sha256"] if trained else None
    measured = evaluation.on_tuned_base(job, recipe) if trained else recipe
    inputs = hash_of(names, _measured_by(recipe), _splits(dataset), base_state(measured), _tokens_state(recipe), adapter)
    step = "evaluate" if trained else "baselines"
    plain = recipe.training.objective == "text"
    answered = evaluation.is_measured if plain else evaluation.is_answered
    if not names or (job.step_done(step, inputs) and all(answered(job, name, dataset.test) for name in names)):
        return
    if trained and adapter != trained_hash(verify_adapter(job.adapter_folder, weights_hash(measured.model.name))):
        raise DataError(f"{job.adapter_folder} is not the adapter that {job.training_file} tells of: run `burnish train` again")
    with job.step(step, inputs):
        chat = chat or load_chat(recipe.model, tell)
        if plain:
            evaluation.measure_text(job, dataset, recipe, chat, trained=trained, tell=tell)
        else:
            evaluation.evaluate(job, dataset, recipe, chat, task_of(recipe, dataset), trained=trained, tell=tell)


def train_once(
    job: Run, *, dataset: Dataset, chat: Chat, start: Start = BASE, allow_change: Sequence[str] = (), tell: Tell = silent
) -> dict[str, Any]:
    """Fine-tune from the base model, or from what a stage before left; the best checkpoint becomes the run's adapter. Returns the summary.

    A training that was cut off goes on. `allow_change`: conditions (recipe keys, `versions`) that may differ from those under which it began.
    """
    recipe = with_rate(job, dataset, chat, start=start, tell=tell)
    inputs = _training_inputs(recipe, dataset, start)
    if job.step_done("train", inputs) and job.adapter_folder.exists():
        training.dismiss()
        training.forget_checkpoints(job)
        return dict(job.read_json(job.training_file))
    if job.status()["steps"].get("train", {}).get("state") == "done":
        training.forget_checkpoints(job)  # of a training that is over
    with job.step("train", inputs) as entry:

        def note(**values: Any) -> None:
            job.amend("train", entry, **values)

        summary = training.train(job, dataset, on_base(recipe, start), chat, tell, begin=start, allow_change=allow_change, note=note)
    training.forget_checkpoints(job)
    return summary


def with_rate(job: Run, dataset: Dataset, chat: Chat, *, start: Start = BASE, tell: Tell = silent) -> Recipe:
    """The resolved recipe; `learning_rate: auto` becomes a number here, on the disk before the first step, and stays that number while rows,
    weights and recipe stay the same."""
    asked, recipe = job.recipe_as_asked(), job.recipe()
    if asked.training.learning_rate != "auto":
        return recipe
    unresolved = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": "auto"})})
    key = _training_inputs(unresolved, dataset, start)
    found = job.read_json(job.rate_file) if job.rate_file.exists() else {}
    if found.get("key") != key:
        found = {"key": key, **training.range_test(job, dataset, on_base(unresolved, start), chat, start=start, tell=tell).to_dict()}
        job.write_json(job.rate_file, found)
        tell("learning rate", 0, 0, f"{found['learning_rate']}: {found['reason']}")
    if recipe.training.learning_rate == found["learning_rate"]:
        return recipe
    return job.resolve({"training.learning_rate": found["learning_rate"]}, further=True)


def on_base(recipe: Recipe, start: Start) -> Recipe:
    """The recipe with the weights that a training begins with in the place of its base model."""
    if start.base is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": start.base})})


def _training_inputs(recipe: Recipe, dataset: Dataset, start: Start) -> str:
    parts = recipe.to_dict()
    settings = {key: parts[key] for key in ("seed", "model", "lora", "training", "engine")}
    begin = [start.sha256] if start.sha256 else []
    read = [split for split in dataset.manifest["splits"] if split != "test"]  # replayed rows, too, where there are any
    return hash_of(settings, _splits(dataset, read), base_state(recipe), _tokens_state(recipe), *begin)


def assist(folder: str | Path) -> None:
    """A process beside the one that trains (RANK > 0): it computes its part of each step, and reads the run only."""
    if training.assist():
        job = Run.open(folder)
        recipe = job.recipe()
        training.train(job, dataset_of(job), recipe, load_chat(recipe.model))


def compare(job: Run, *, tell: Tell = silent) -> dict[str, Any]:
    """Scores, intervals, paired comparisons and the verdict, from the answers in the run."""
    dataset, recipe = dataset_of(job), job.recipe()
    needed = {"evaluate" if CANDIDATES[name].trained else "baselines" for name in recipe.evaluation.candidates}
    for step in sorted(needed):
        if job.status()["steps"].get(step, {}).get("state") != "done":
            raise DataError(
                f"{job.path}: the answers of the step `{step}` are not there or no longer hold: `burnish run` or `burnish evaluate` makes them"
            )
    tell("comparing", 0, 0, f"{len(dataset.test)} test rows")
    with job.step("compare", hash_of(_splits(dataset))):
        if recipe.training.objective == "text":
            content = evaluation.compare_text(job, recipe, dataset.test)
        else:
            train = [example.reference for example in dataset.train]
            content = evaluation.compare_run(job, recipe, task_of(recipe, dataset), dataset.test, train=train, tell=tell)
        job.write_json(job.comparison_file, content)
    return content


def merge(job: Run, output: Path, *, tell: Tell = silent) -> Merged:
    """The run's adapter and its base as one model in `output`, proved on validation rows to answer as the two do. Raises ModelError."""
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]):
        raise RecipeError(f"{output} exists already; choose another place with --output")
    if not job.training_file.exists():
        raise DataError(f"{job.path}: nothing is trained yet: run `burnish train` first")
    dataset, recipe = dataset_of(job), evaluation.on_tuned_base(job, job.recipe())
    chat = load_chat(recipe.model, tell)
    rows = dataset.validation or dataset.train
    probe = [tokens.input_ids for example in rows[:PROBE_ROWS] for tokens in tokens_of(chat, example, recipe)]
    job.event("merge_started", output=str(output))
    merged = merge_adapter(recipe, job.adapter_folder, chat, output, probe, tell)
    if job.comparison_file.exists() and (card := report.model_card(job, report.gather(job), merged=True)) is not None:
        write_whole(output / "README.md", card.encode())
    return merged


def write_report(job: Run, *, tell: Tell = silent) -> Path:
    tell("writing the report", 0, 0, str(job.report_file))
    with job.step("report", ""):
        return report.report(job)


def dataset_of(job: Run) -> Dataset:
    """What `prepare` wrote. Raises DataError where a file was changed since: its rows would no longer be those of the manifest."""
    return rows_of(job)


def rows_of(job: Run, *, without: Sequence[str] = ()) -> Dataset:
    """As `dataset_of`; the splits `without` stay empty and their files unread."""
    manifest = job.read_json(job.manifest_file)
    changed = [
        split
        for split in manifest["splits"]
        if split not in without
        and (not job.split_file(split).exists() or hash_file(job.split_file(split)) != manifest["splits"][split].get("file_sha256"))
    ]
    if changed:
        names = ", ".join(str(job.split_file(split)) for split in changed)
        raise DataError(f"{names}: changed since `burnish prepare` wrote it. Change the source data instead and run with --fresh")
    parts = {split: () if split in without else data_room.read_split(job.split_file(split)) for split in manifest["splits"]}
    return Dataset(parts["train"], tuple(parts["validation"]), tuple(parts["test"]), manifest, parts.get(REPLAY, ()))


def task_of(recipe: Recipe, dataset: Dataset) -> Task:
    """What good means: chosen by the recipe, else from the training answers."""
    references = [example.reference for example in dataset.train]
    detected = detect_task(references)
    if recipe.task.metric in ("auto", detected.metric):
        return detected
    return task_for(recipe.task.metric, references)


def versions() -> dict[str, str]:
    names = ("burnish", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy", "scipy")
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {"system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "memory_gb": round(pages / 1e9, 1)}


def checked_rows(loaded: Loaded, recipe: Recipe, chat: Chat, tell: Tell) -> dict[str, Checked]:
    window = context_window(recipe.model.name)
    if window is not None and window < recipe.data.max_length:
        tell(
            "context window",
            0,
            0,
            f"{recipe.model.name} reads {window} tokens at once: longer rows count as over-long, whatever data.max_length says",
        )
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_length": window})})
    return data_room.check(
        loaded, recipe, tokenize=lambda example: tokens_of(chat, example, recipe), find_control=chat.find_control, tell=tell
    )


def _resolved_values(recipe: Recipe, dataset: Dataset, chat: Chat) -> Mapping[str, Any]:
    """What each `auto` becomes, from the rows, the tokenizer and the machine."""
    device = resolve_device(recipe.model.device)
    longest = dataset.manifest["token_lengths"]["train"].get("target_max", 256)
    values: dict[str, Any] = {"model.device": device, "model.dtype": resolve_dtype(recipe.model.dtype, device)}
    if recipe.training.objective == "text":
        longest = 256  # nothing is answered
        asked = list(evaluation.TEXT_CANDIDATES) if recipe.evaluation.candidates == "auto" else recipe.evaluation.candidates
        candidates = [name for name in asked if name in evaluation.TEXT_CANDIDATES]
        window = context_window(recipe.model.name) or recipe.data.max_length
        values |= {
            "task.metric": evaluation.BITS_PER_BYTE,
            "evaluation.candidates": candidates or ["base"],
            "data.max_length": min(window, recipe.data.max_length),
        }
    else:
        if recipe.evaluation.candidates == "auto":
            values["evaluation.candidates"] = evaluation.candidates_for(recipe)
        if recipe.evaluation.endpoint is not None:
            evaluation.endpoint_of(recipe.evaluation.endpoint)  # an address that is not one should not wait for the baselines
        values["task.metric"] = task_of(recipe, dataset).metric
        find_metric(values["task.metric"])  # a metric of the user's own that does not load should not wait for the training
    if recipe.model.chat_template == "auto" and chat.template_name != "own":
        values["model.chat_template"] = chat.template_name
    if recipe.training.micro_batch_size == "auto":
        values["training.micro_batch_size"] = EXAMPLES_AT_ONCE
    if recipe.evaluation.max_new_tokens == "auto":
        values["evaluation.max_new_tokens"] = int(1.25 * longest) + 8
    return values


def _measured_by(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that decide what a candidate answers, given its weights: a rate found later must not measure the baselines again."""
    parts = recipe.to_dict()
    del parts["evaluation"]["checks"]  # they judge what was answered; only one of them asks for more answers
    drawing = evaluation.drawing_of(recipe)
    drawn = {} if drawing is None else {"drawn": drawing.model_dump()}
    return {key: parts[key] for key in ("seed", "model", "data", "task", "evaluation")} | drawn


def _splits(dataset: Dataset, names: Sequence[str] = SPLITS) -> list[str]:
    return [dataset.manifest["splits"][name]["file_sha256"] for name in names]


def _tokens_state(recipe: Recipe) -> list[str]:
    """What decides how rows become tokens: the tokenizer's files and the template's text."""
    return [tokenizer_hash(recipe.model.name), _fingerprint(recipe.model.chat_template)]


def _gone(job: Run, recipe: Recipe, asked: str) -> str | None:
    """The source file that is gone since the rows were prepared for this same recipe, if one is."""
    entry = job.status()["steps"].get("prepare", {})
    if entry.get("state") != "done" or entry.get("asked") != asked:
        return None
    return next((name for name in _data_files(recipe) if name and not name.startswith(("demo:", "hub:")) and not Path(name).exists()), None)


def _data_files(recipe: Recipe) -> list[str | None]:
    return [*(getattr(recipe.data, split) for split in SPLITS), recipe.training.replay_data, recipe.data.documents]


def _fingerprint(name: str | None) -> str:
    path = Path(name) if name else None
    if path is not None and path.is_dir():
        return hash_of([[str(file.relative_to(path)), hash_file(file)] for file in sorted(path.rglob("*")) if file.is_file()])
    if name and name.startswith("demo:"):
        return f"{name} {_version('home-assistant-intents')} {_version('hassil')}"
    try:
        return hash_file(path) if path is not None and path.is_file() else str(name)
    except OSError as problem:
        raise DataError(f"{name}: cannot be read: {problem.strerror or problem}") from problem
