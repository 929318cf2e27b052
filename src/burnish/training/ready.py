"""What a training needs besides the loop: the model with its quick paths, how much is computed at once, the order of the items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.models import Chat, tokenizer_hash, trainable_parameters, weights_hash
from burnish.recipe import Recipe
from burnish.run import hash_of
from burnish.training import distributed
from burnish.training.checkpoint import weights_digest
from burnish.training.engine import make_ready
from burnish.training.frozen import FrozenCache, make_cache
from burnish.training.items import Items
from burnish.training.memory import Plan, keep_freed_memory, plan_memory
from burnish.training.mix import epoch_indices, replayed_per_epoch
from burnish.training.objective import Objective
from burnish.training.pack import epoch_order
from burnish.training.progress import planned_steps
from burnish.types import Dataset, Tell, silent


def equip(
    model: Any, objective: Objective, items: Items, recipe: Recipe, *, cache: tuple[Path, str] | None = None, tell: Tell = silent
) -> Plan:
    """Choose the objective's paths on this model and what is computed at once. A checkpoint's own number goes before it.

    `cache`: a folder for what frozen lower layers make of the rows, and the hash of what that rests on; none: it is computed each time.
    """
    if model.device.type == "cpu":
        keep_freed_memory()
    some = [tokens for index in range(min(100, len(items.train))) for tokens in objective.sequences(items.train[index])]
    objective.paths = make_ready(model, some, recipe, steps=planned_steps(rows_of(items, recipe), recipe.training), tell=tell)
    if cache is not None:
        objective.paths = replace(objective.paths, cache=_frozen_cache(model, objective, items, recipe, *cache, tell=tell))
    most = int(recipe.training.micro_batch_size) if objective.paths.packed else 1
    longest = items.longest(objective, most)
    sequences = [tokens for item in longest for tokens in objective.sequences(item)]
    return plan_memory(
        model, sequences, objective.paths, most=most, per_example=len(sequences) // len(longest), checkpointing=recipe.engine.gradient_checkpointing, tell=tell
    )  # fmt: skip


def _frozen_cache(
    model: Any, objective: Objective, items: Items, recipe: Recipe, folder: Path, key: str, *, tell: Tell
) -> FrozenCache | None:  # fmt: skip
    """On one process only: several would write into one file."""
    if not objective.tokens_only or not objective.paths.packed or distributed.size() > 1:
        return None
    settings = recipe.training
    lengths = items.lengths(objective)
    steps = planned_steps(len(lengths), settings)
    passes = steps * int(settings.micro_batch_size) * settings.gradient_accumulation_steps / len(lengths)
    counted = [*lengths, *(objective.length(item) for item in items.validation)]
    shortest = items.train[min(range(min(100, len(items.train))), key=lambda index: lengths[index])]
    return make_cache(model, counted, recipe, folder, passes=passes, row=shortest, key=key, tell=tell)


def start_state(model: Any, recipe: Recipe) -> str:
    """Where training starts is part of what a preference's reference is: a fresh adapter, or what the stage before made."""
    return hash_of(weights_hash(recipe.model.name), recipe.model.dtype, weights_digest(list(trainable_parameters(model).values())))


def rows_of(items: Items, recipe: Recipe) -> int:
    """Items of an epoch, the replayed ones among them."""
    return len(items.train) + replayed_per_epoch(len(items.train), len(items.replay), recipe.training.replay_fraction)


def order_of(objective: Objective, items: Items, recipe: Recipe) -> Callable[[int], Sequence[int]]:
    """Epoch → indices of `items.mixed`."""
    settings = recipe.training
    lengths = items.lengths(objective)
    batch = int(settings.micro_batch_size) * settings.gradient_accumulation_steps

    def order(epoch: int) -> list[int]:
        chosen = epoch_indices(len(items.train), len(items.replay), settings.replay_fraction, seed=recipe.seed, epoch=epoch)
        return epoch_order(lengths, seed=recipe.seed, epoch=epoch, batch=batch, indices=chosen, buckets=recipe.engine.length_buckets)

    return order


def tokens_key(recipe: Recipe, dataset: Dataset, chat: Chat) -> str:
    """What decides the tokens of the rows."""
    files = [part.get("file_sha256", part.get("sha256")) for name, part in dataset.manifest.get("splits", {}).items() if name != "test"]
    held = [example.id for example in dataset.replay]  # a gate may hold some of them back
    return hash_of(files, held, tokenizer_hash(recipe.model.name), chat.template_hash, recipe.training.objective, recipe.data.max_length)
