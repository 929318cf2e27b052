"""Trained weights → a folder with tokenizer, template and a manifest (models.save_trained). It appears whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from burnish.errors import TrainingError
from burnish.models import Chat, save_trained, trainable_parameters
from burnish.types import Checkpoint


def save_adapter(model: Any, chat: Chat, folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """Write the adapter (method `full`: the whole weights), the tokenizer with its template, and a manifest with sizes, SHA-256 and `facts`.

    Non-finite weights are refused.
    """
    refuse_non_finite(model)
    return save_trained(model, chat, folder, facts)


def refuse_non_finite(model: Any) -> None:
    bad = [name for name, parameter in trainable_parameters(model).items() if not torch.isfinite(parameter).all()]
    if bad:
        raise TrainingError(f"{len(bad)} trained tensors hold NaN or infinity ({bad[0]}): nothing was saved. Lower training.learning_rate")
