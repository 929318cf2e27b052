"""A chain of stages: where each begins, what is measured between them, and what a gate says. The pipeline calls the doors in order."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data import take
from burnish.models import METHODS, Chat, load_adapter, load_chat, load_model, weights_hash
from burnish.recipe import GateSection, ModelSection, Recipe
from burnish.run import hash_file, write_folder
from burnish.training.loop import mean_loss
from burnish.types import Example, Tell, silent

MEASURED_ROWS = 200  # of each set, drawn by hash: what is measured after every stage must not cost more than the stage
TITLES = {"validation_loss": "validation loss", "validation_score": "validation score", "retention_loss": "loss on the rows to be retained"}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training begins. The default: the recipe's own base model with a fresh adapter."""

    base: str | None = None  # a model folder in the place of recipe.model.name: what stages before left, merged
    adapter: Path | None = None  # an adapter on that base which is trained on
    sha256: str = ""  # of what the stage before left; empty where there is none


BASE = Start()


def start_model(recipe: Recipe, start: Start = BASE, tell: Tell = silent) -> Any:
    """The model that training begins with, its trained weights marked. `recipe.model` names the base that `start` belongs to."""
    model = load_model(recipe.model, tell)
    if start.adapter is None:
        return METHODS[recipe.training.method](model, recipe)
    tuned = load_adapter(model, start.adapter, weights_hash(recipe.model.name))
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return tuned


def carries_on(before: Recipe, after: Recipe) -> bool:
    """Whether the adapter of one stage can be trained on in the next: the same method, shape and layers."""
    same = (before.training.method, before.training.layers, before.lora) == (after.training.method, after.training.layers, after.lora)
    return same and before.training.method != "full"


def merge(model: ModelSection, adapter: Path, folder: Path, tell: Tell = silent) -> None:
    """Write base and adapter as one model folder; nothing is done where it is there already, for this adapter."""
    mark = hash_file(adapter / "adapter_model.safetensors")
    note = folder / "merged_from.txt"
    if note.exists() and note.read_text(encoding="utf-8") == mark:
        return
    tell("merging", 0, 0, f"what the stages before left → {folder}")
    tuned = load_adapter(load_model(model, tell), adapter, weights_hash(model.name))
    with write_folder(folder) as aside:
        tuned.merge_and_unload().save_pretrained(str(aside), safe_serialization=True)
        load_chat(model).tokenizer.save_pretrained(str(aside))
        (aside / note.name).write_text(mark, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- what is measured


def drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    """The rows of a set that are measured: at most MEASURED_ROWS, always the same."""
    return take(examples, MEASURED_ROWS, seed)


def measure_losses(model: Any, sets: Mapping[str, Sequence[Example]], chat: Chat, *, at_once: int, tell: Tell = silent) -> dict[str, float]:
    """Mean loss of each set of rows, nats per target token."""
    model.eval()
    losses = {}
    for number, (name, examples) in enumerate(sets.items(), 1):
        tell("measuring between stages", number, len(sets), name)
        losses[name] = round(mean_loss(model, [tokens for example in examples for tokens in chat.training_tokens(example)], at_once), 6)
    return losses


def judge_gate(gate: GateSection, before: float, after: float) -> dict[str, Any]:
    """What the gate says, with the numbers and a sentence. A gain is a loss that fell or a score that rose."""
    loss = gate.measure != "validation_score"
    gain = before - after if loss else after - before
    unit = " nats" if loss else ""
    asked, missed = [], []
    if gate.min_gain is not None:
        asked.append(f"a gain of {gate.min_gain:g}{unit} at least")
        missed += [f"it gained {gain:.4f}{unit}"] if gain < gate.min_gain else []
    if gate.max_increase is not None:
        asked.append(f"a rise of {gate.max_increase:g}{unit} at most")
        missed += [f"it rose by {-gain:.4f}{unit}"] if -gain > gate.max_increase else []
    numbers = f"{TITLES[gate.measure]} {before:.4f} → {after:.4f}"
    sentence = f"{numbers}; asked: {' and '.join(asked)}" + (f"; {' and '.join(missed)}" if missed else "")
    return {"measure": gate.measure, "before": before, "after": after, "gain": round(gain, 6), "passed": not missed, "sentence": sentence}


def adopt(folder: Path, adapter: Path) -> None:
    """The last stage's adapter becomes the run's: a copy, whole or not at all."""
    with write_folder(folder) as aside:
        shutil.copytree(adapter, aside, dirs_exist_ok=True)
