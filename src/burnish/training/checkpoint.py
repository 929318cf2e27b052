"""Trained weights → a folder in PEFT's format, with tokenizer, template and a manifest. It appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from burnish.errors import TrainingError
from burnish.models import Chat, trainable_parameters
from burnish.run import hash_file, write_folder
from burnish.types import Checkpoint

MANIFEST = "burnish.json"


def save_adapter(model: Any, chat: Chat, folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """Write the adapter, the tokenizer with its template, and a manifest with sizes, SHA-256 and `facts`. Non-finite weights are refused."""
    refuse_non_finite(model)
    with write_folder(folder) as aside:
        model.save_pretrained(str(aside), safe_serialization=True)
        chat.tokenizer.save_pretrained(str(aside))
        (aside / "chat_template.jinja").write_text(chat.template, encoding="utf-8")  # where transformers and vLLM look for it
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in sorted(aside.iterdir()) if file.is_file()}
        manifest = {"format": 1, **facts, "template_sha256": chat.template_hash, "stop_ids": list(chat.stop_ids), "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Checkpoint(str(folder), int(facts["step"]), facts.get("validation_loss"))


def refuse_non_finite(model: Any) -> None:
    bad = [name for name, parameter in trainable_parameters(model).items() if not torch.isfinite(parameter).all()]
    if bad:
        raise TrainingError(f"{len(bad)} trained tensors hold NaN or infinity ({bad[0]}): nothing was saved. Lower training.learning_rate")


def verify_adapter(folder: Path, base_sha256: str) -> dict[str, Any]:
    """Check every file against the manifest, and the base weights. Returns the manifest; raises TrainingError naming what differs."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise TrainingError(f"{folder}: no readable {MANIFEST}: the adapter is not whole; train again with --fresh") from problem
    for name, entry in files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != entry["bytes"] or hash_file(file) != entry["sha256"]:
            raise TrainingError(
                f"{file}: not as it was written (size or SHA-256 differs): the adapter is damaged; train again with --fresh"
            )
    if manifest.get("base_sha256") != base_sha256:
        raise TrainingError(
            f"{folder}: trained on other base weights ({manifest.get('base_sha256')}, now {base_sha256}); an adapter fits only its own base"
        )
    return manifest
