"""What a training rests on. A checkpoint goes on only where all of it is the same; what may change, changes by name and is told."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from burnish.errors import Problem, RecipeError
from burnish.models import Chat, tokenizer_hash
from burnish.recipe import Recipe
from burnish.run import is_allowed
from burnish.types import Dataset

# Where the work is done, not what is done: a change is told (the result is right, but not bit-exact) and needs no leave.
_MACHINE = ("model.device", "machine.threads", "machine.instructions", "machine.kernels", "machine.gpu")
_PLACES = ("world_size", *_MACHINE)
# With `--allow-change`. What is not here has another meaning in mid-training (rows, base, shapes, what a step holds): start anew instead.
CHANGEABLE = (
    "training.learning_rate", "training.schedule", "training.warmup_fraction", "training.epochs", "training.max_steps", "training.weight_decay",
    "training.max_gradient_norm", "training.validations_per_epoch", "training.early_stopping_patience", "training.preference_beta",
    "training.kl_weight", "lora.dropout", "model.dtype", "engine", "versions",
)  # fmt: skip
_LIBRARIES = ("burnish", "torch", "transformers", "tokenizers", "peft", "numpy", "jinja2")
_QUANTIZING = ("bitsandbytes", "torchao", "gguf")  # where the base is held in fewer bits


def fingerprint_of(
    recipe: Recipe, dataset: Dataset, chat: Chat, *, base_sha256: str, initial: str, world_size: int, quantizer: str | None = None, kernels: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Field → value, flat; values are what JSON gives back. `initial`: digest of the trained weights before the first step; `quantizer`: what
    holds the base in fewer bits; `kernels`: the key of the compiled ones, which holds the processor, "" where there are none."""
    parts = recipe.to_dict()
    values: dict[str, Any] = {f"data.{name}": part.get("file_sha256", part.get("sha256")) for name, part in _read(dataset).items()}
    values |= {
        "base_model.weights": base_sha256,
        "base_model.quantizer": quantizer,
        "initial_weights": initial,
        "tokenizer": tokenizer_hash(recipe.model.name),
        "template": chat.template_hash,
    }
    values |= {f"{section}.{key}": value for section in ("lora", "training", "engine") for key, value in parts[section].items()}
    values["data.max_length"] = recipe.data.max_length  # windows of plain text
    values |= {"seed": recipe.seed, "model.dtype": recipe.model.dtype, "model.device": recipe.model.device, "world_size": world_size}
    libraries = _LIBRARIES + (_QUANTIZING if quantizer else ())
    values |= {"versions.python": platform.python_version(), **{f"versions.{name}": _version(name) for name in libraries}}
    values |= {f"machine.{name}": value for name, value in _machine(recipe.model.device, kernels).items()}
    del values["training.checkpoint_steps"]  # how often is saved changes nothing that is computed
    return values


def refuse_unchangeable(allowed: Sequence[str]) -> None:
    """Before anything is written: raises RecipeError for keys that `--allow-change` cannot allow."""
    wrong = [key for key in allowed if not is_allowed(key, CHANGEABLE) and not key.startswith("versions")]
    if wrong:
        raise RecipeError(
            f"--allow-change {wrong[0]}: this cannot change in mid-training; what can: {', '.join(CHANGEABLE)}. Train it as another run (--run)"
        )


def compare_fingerprints(old: Mapping[str, Any], new: Mapping[str, Any], *, allowed: Sequence[str], where: str) -> dict[str, list[Any]]:
    """The fields that differ and may, as [old, new]. Raises RecipeError listing every field that differs and may not."""
    changed = {key: [old.get(key), new.get(key)] for key in sorted({**old, **new}) if old.get(key) != new.get(key)}
    problems = []
    # The same seed gives other first weights in another type, place or version: the difference that was allowed says it already.
    drawn_anew = any(key == "model.dtype" or key in _MACHINE or key.startswith("versions.") for key in changed)
    for key, (before, now) in changed.items():
        if key == "initial_weights" and drawn_anew:
            continue
        if key in _PLACES or (is_allowed(key, CHANGEABLE) and is_allowed(key, allowed)):
            continue
        do = (
            f"put it back, or allow it: --allow-change {key}"
            if is_allowed(key, CHANGEABLE)
            else "put it back; it cannot change in mid-training"
        )
        problems.append(Problem(key, f"{before!r} when the training began, now {now!r}", do))
    if problems:
        raise RecipeError(
            f"{where}: these checkpoints are of another training: {len(problems)} of its conditions differ. Delete that folder to train from the start",
            problems,
        )
    return changed


def not_exact(changed: Mapping[str, Any]) -> bool:
    return any(key in _PLACES for key in changed)


def _read(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The splits that training reads."""
    return {name: part for name, part in dataset.manifest.get("splits", {}).items() if name != "test"}


def _machine(device: str, kernels: str) -> dict[str, Any]:
    """What decides in which order numbers are added up."""
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels,
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else "",
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
