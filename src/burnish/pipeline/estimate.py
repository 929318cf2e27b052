"""`burnish estimate`: what a run will cost, from a short probe on this machine. The rows are prepared; nothing else of the run is done before its time."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict

import torch

from burnish import evaluation, training
from burnish.advice import Estimate, find_gpu, forecast_here, forecast_on
from burnish.errors import RecipeError
from burnish.evaluation import CANDIDATES, AnswerCost
from burnish.models import Chat, load_chat, resolve_device, tokens_of
from burnish.pipeline.steps import machine, prepare_once, rows_of, task_of
from burnish.recipe import Recipe
from burnish.run import Run
from burnish.tasks import find_metric
from burnish.training import StepTimes
from burnish.types import Dataset, Tell, silent


def estimate(
    job: Run, *, price_per_hour: float | None = None, gpu: str | None = None, chat: Chat | None = None, tell: Tell = silent
) -> Estimate:
    """Foretell time, memory and money of the whole run, and what its test rows can show; write estimate.json, which the report compares with the facts.

    `price_per_hour`: of this machine, or of the `gpu` (a name of advice.GPUS) where one is given; in the currency of your choice. The test rows are
    counted, not read. Raises RecipeError where the recipe has stages, the price is not above 0, or the GPU is not in the table.
    """
    asked = job.recipe_as_asked()
    if asked.stages:
        raise RecipeError("an estimate looks at one training: give it the recipe of one stage, without `stages:`")
    if price_per_hour is not None and not 0 < price_per_hour < float("inf"):
        raise RecipeError(f"--price-per-hour {price_per_hour}: expected a number above 0, in the currency of your choice")
    if gpu is not None:
        find_gpu(gpu)
    chat = chat or load_chat(asked.model, tell)
    prepare_once(job, chat=chat, tell=tell)
    began = time.perf_counter()
    dataset, recipe = rows_of(job, without=("test",)), job.recipe()
    trains = any(CANDIDATES[name].trained for name in recipe.evaluation.candidates)
    if gpu is not None and not trains:
        raise RecipeError(
            f"--gpu {gpu}: nothing of this recipe is trained (evaluation.candidates has no `tuned`), so there is nothing to reckon"
        )
    available = _memory_available(recipe)
    rows = int(dataset.manifest["splits"]["test"]["rows"])
    answers = None if recipe.training.objective == "text" else _answers(dataset, recipe, chat, rows, tell)
    gc.collect()  # the run's own baselines have let go of their model, too, before it trains
    steps = training.time_steps(dataset, chat, recipe, folder=job.tokens_folder, tell=tell) if trains or answers is None else None
    if answers is None:
        assert steps is not None
        answers = _texts(dataset, recipe, chat, rows, steps)
    prepared = float(job.status()["steps"]["prepare"].get("seconds", 0.0))
    here = forecast_here(
        steps if trains else None,
        answers,
        prepare_seconds=prepared,
        machine=_name(recipe),
        memory_available=available,
        peak_bytes=training.peak_memory_bytes(),
        price_per_hour=None if gpu is not None else price_per_hour,
    )
    elsewhere = None
    if gpu is not None and steps is not None:
        elsewhere = forecast_on(gpu, steps, answers, prepare_seconds=prepared, price_per_hour=price_per_hour)
    found = Estimate(
        here=here,
        elsewhere=elsewhere,
        test_rows=rows,
        detectable_difference=None
        if recipe.training.objective == "text"
        else evaluation.detectable(rows, recipe, find_metric(task_of(recipe, dataset).metric)),
        probe_seconds=time.perf_counter() - began,
        probe={"steps": None if steps is None else steps.to_dict(), "answers": asdict(answers)},
    )
    trained = "train" in job.status()["steps"]
    job.write_json(job.estimate_file, {"key": job.asked_key(), "after_training": trained, **found.to_dict()})
    job.event("estimated", seconds=round(here.total_seconds, 1), memory_bytes=here.memory["total"])
    return found


def _answers(dataset: Dataset, recipe: Recipe, chat: Chat, rows: int, tell: Tell) -> AnswerCost:
    return evaluation.answer_costs(dataset, recipe, chat, task_of(recipe, dataset), test_rows=rows, tell=tell)


def _texts(dataset: Dataset, recipe: Recipe, chat: Chat, rows: int, steps: StepTimes) -> AnswerCost:
    tokens = [sum(len(part.input_ids) for part in tokens_of(chat, example, recipe)) for example in dataset.validation]
    seconds = steps.forward_seconds_per_token * rows * sum(tokens) / max(1, len(tokens))
    return evaluation.text_costs(recipe, load_seconds=steps.load_seconds, seconds=seconds)


def _memory_available(recipe: Recipe) -> int:
    device = torch.device(resolve_device(recipe.model.device))
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return training.free_bytes_of(device) + training.peak_memory_bytes()  # what this process holds already is its own


def _name(recipe: Recipe) -> str:
    if resolve_device(recipe.model.device).startswith("cuda"):
        return str(torch.cuda.get_device_name())
    found = machine()
    return f"this machine ({found['system']}, {found['cores']} cores)"
