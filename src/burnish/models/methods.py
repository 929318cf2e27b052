"""How a base model becomes trainable. METHODS is the table; today it has one row, and each row is a function of the same form.

To add a method: write base model, recipe → trainable model, and add a line to METHODS; tests/contract/test_methods.py then runs on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError

from burnish.errors import ModelError
from burnish.models.quiet import quiet
from burnish.recipe import Recipe
from burnish.run import hash_file

ADAPTER_MANIFEST = "burnish.json"

# Peak learning rates that `auto` becomes. 1e-3 suits LoRA of rank 16 on all linear layers of Gemma 3 270M on both golden recipes: the validation
# loss fell at every validation (docs/results.md). It is not the outcome of a sweep.
LEARNING_RATES = {"lora": 1e-3}


def lora(model: Any, recipe: Recipe) -> Any:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT: y = W x + alpha/r · B A x, B = 0 at the start, so a fresh adapter changes nothing.

    The adapter lives in the base's compute type; the loop keeps float32 masters of it. Raises ModelError where no module has the name asked for.
    """
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(recipe.seed)
    try:
        with quiet():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as problem:
        raise ModelError(f"lora.target_modules: {recipe.lora.target_modules}: {str(problem)[:300]}") from problem


METHODS: dict[str, Callable[[Any, Recipe], Any]] = {"lora": lora}


def load_adapter(model: Any, folder: Path, base_sha256: str) -> Any:
    """Put a saved adapter on its base, in evaluation mode, after `verify_adapter`. Raises ModelError where the folder holds none that fits."""
    if not (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder}: no adapter there; run `burnish train` first")
    verify_adapter(folder, base_sha256)
    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=False, autocast_adapter_dtype=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as problem:
        raise ModelError(f"{folder}: the adapter does not fit the base model: {str(problem)[:400]}") from problem


def verify_adapter(folder: Path, base_sha256: str) -> dict[str, Any]:
    """Check every file against the manifest, and the base weights. Returns the manifest; raises ModelError naming what differs."""
    try:
        manifest: dict[str, Any] = json.loads((folder / ADAPTER_MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise ModelError(f"{folder}: no readable {ADAPTER_MANIFEST}: the adapter is not whole; train again with --fresh") from problem
    for name, entry in files.items():
        file = folder / name
        if not file.exists() or file.stat().st_size != entry["bytes"] or hash_file(file) != entry["sha256"]:
            raise ModelError(f"{file}: not as it was written (size or SHA-256 differs): the adapter is damaged; train again with --fresh")
    if manifest.get("base_sha256") != base_sha256:
        raise ModelError(
            f"{folder}: trained on other base weights ({manifest.get('base_sha256')}, now {base_sha256}); an adapter fits only its own base"
        )
    return manifest


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
