"""Success needs proof: what was saved is read back from the disk, put on the model, and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from burnish.errors import TrainingError
from burnish.models import Chat, Limits, generate, trainable_parameters, verify_adapter
from burnish.training.checkpoint import weights_digest
from burnish.training.objective import Objective

_PROMPT = "Hello"
_NEW_TOKENS = 4
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def prove(
    model: Any, chat: Chat, folder: Path, base_sha256: str, *, objective: Objective, items: Sequence[Any], unchanged: bool
) -> dict[str, Any]:
    """Read a saved adapter back onto the model (which keeps it), compute a loss with it, and let it answer a fixed prompt.

    `unchanged`: the model has not been trained since it was saved, so what comes back must be what it holds, bit for bit. Returns the adapter's
    manifest. Raises TrainingError or ModelError where any of it fails; nothing was published then.
    """
    manifest = verify_adapter(folder, base_sha256)
    before = weights_digest(list(trainable_parameters(model).values()))
    _put_on(model, folder)
    if unchanged and weights_digest(list(trainable_parameters(model).values())) != before:
        raise TrainingError(f"{folder}: what was saved are not the trained weights. Nothing was published")
    model.eval()
    loss = objective.summed(model, items) / objective.count(items)
    if not math.isfinite(loss):
        raise TrainingError(f"diverged: {folder}: read back from the disk, its loss is not finite. Nothing was published", code="diverged")
    ((_, answer),) = next(iter(generate(model, chat, [chat.prompt_ids([{"role": "user", "content": _PROMPT}])], Limits(_NEW_TOKENS))))
    if answer.completion_tokens < 1:
        raise TrainingError(f"{folder}: the trained model writes nothing at all. Nothing was published")
    return manifest


def weights_entry(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest's line of the trained weights."""
    files = manifest["files"]
    name = next((name for name in _WEIGHTS if name in files), None) or min(name for name in files if name.endswith(".safetensors"))
    entry: dict[str, Any] = files[name]
    return entry


def _put_on(model: Any, folder: Path) -> None:
    saved = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    parameters = trainable_parameters(model)
    # PEFT leaves the adapter's name out of what it saves: `…lora_A.default.weight` is `…lora_A.weight` on the disk.
    places = {name.replace(".default", ""): parameter for name, parameter in parameters.items()}
    missing = sorted(places.keys() - saved.keys())
    if missing:
        raise TrainingError(
            f"{folder}: {len(missing)} of {len(places)} trained tensors are not in it ({missing[0]}). Nothing was published"
        )
    with torch.no_grad():
        for name, parameter in places.items():
            if saved[name].shape != parameter.shape:
                raise TrainingError(f"{folder}: {name} has the shape {list(saved[name].shape)}, the model {list(parameter.shape)}")
            parameter.copy_(saved[name])
