"""Success needs proof: what was saved is read back from the disk, put on the model, and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
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
    """The saved tensors onto the model, an adapter's through PEFT's own reader. Raises TrainingError where a trained one is missing or unlike."""
    saved = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    trained = trainable_parameters(model)
    try:
        if hasattr(model, "peft_config"):
            result = set_peft_model_state_dict(model, saved)
        else:
            result = model.load_state_dict(saved, strict=False)
    except (RuntimeError, KeyError, ValueError) as problem:
        raise TrainingError(
            f"{folder}: it does not fit the model it was saved from: {str(problem)[:300]}. Nothing was published"
        ) from problem
    if wrong := sorted({*result.unexpected_keys, *(trained.keys() & set(result.missing_keys))}):
        raise TrainingError(
            f"{folder}: {len(wrong)} of {len(trained)} trained tensors are not in it, or have another name ({wrong[0]}). Nothing was published"
        )
