"""Trained weights → a folder in PEFT's format, with tokenizer, template and a manifest. It appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from burnish.errors import TrainingError
from burnish.models import ADAPTER_MANIFEST, Chat, trainable_parameters
from burnish.run import hash_file, write_folder
from burnish.types import Checkpoint


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
        (aside / ADAPTER_MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Checkpoint(str(folder), int(facts["step"]), facts.get("validation_loss"))


def refuse_non_finite(model: Any) -> None:
    bad = [name for name, parameter in trainable_parameters(model).items() if not torch.isfinite(parameter).all()]
    if bad:
        raise TrainingError(f"{len(bad)} trained tensors hold NaN or infinity ({bad[0]}): nothing was saved. Lower training.learning_rate")
