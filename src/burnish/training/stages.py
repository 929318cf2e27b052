"""A chain of stages: where each begins, what is measured between them, and what a gate says. The pipeline calls the doors in order."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data import take
from burnish.models import METHODS, load_adapter, load_base, load_trained, verify_adapter, weights_hash
from burnish.recipe import GateSection, Recipe
from burnish.run import write_folder
from burnish.training.loop import mean_loss
from burnish.types import Example, Tell, Tokens, silent

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
    if start.adapter is None:
        return METHODS[recipe.training.method](load_base(recipe, tell), recipe)
    manifest = verify_adapter(start.adapter, weights_hash(recipe.model.name))
    base = load_base(recipe, tell, quantizer=manifest.get("quantizer"))
    return load_adapter(base, start.adapter, manifest["base_sha256"], trainable=True)


def load_state(recipe: Recipe, start: Start, tell: Tell = silent) -> Any:
    """The model at this point of the chain, in evaluation mode, as the stage's method holds it."""
    return load_base(recipe, tell) if start.adapter is None else load_trained(recipe, start.adapter, tell)


def carries_on(before: Recipe, after: Recipe) -> bool:
    """Whether the adapter of one stage can be trained on in the next: the same method, shape and layers."""
    same = (before.training.method, before.training.layers, before.lora) == (after.training.method, after.training.layers, after.lora)
    return same and before.training.method != "full"


# ---------------------------------------------------------------------------------------------------- what is measured


def drawn(examples: Sequence[Example], seed: int) -> list[Example]:
    """The rows of a set that are measured: at most MEASURED_ROWS, always the same."""
    return take(examples, MEASURED_ROWS, seed)


def measure_losses(model: Any, sets: Mapping[str, Sequence[Tokens]], *, at_once: int, tell: Tell = silent) -> dict[str, float]:
    """Mean loss of each set, nats per target token: of the answers (of a pair, the chosen one), or of all tokens of plain text."""
    model.eval()
    losses = {}
    for number, (name, sequences) in enumerate(sets.items(), 1):
        tell("measuring between stages", number, len(sets), name)
        losses[name] = round(mean_loss(model, sequences, at_once), 6)
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
