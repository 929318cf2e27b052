"""Trained weights ↔ a folder, with tokenizer, template and a manifest. It appears whole or not at all.

an adapter      adapter_config.json, adapter_model.safetensors        PEFT's format: plain PEFT, vLLM and llama.cpp read it
whole weights   config.json, model*.safetensors                       method `full`, and merged adapters: plain transformers reads it
both            tokenizer, chat_template.jinja, burnish.json (the manifest: facts, and each file's size and SHA-256)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError

from burnish.errors import ModelError
from burnish.models.chat import Chat
from burnish.models.load import load_base, read_weights, weights_hash
from burnish.models.quantize import quantizer_facts, quantizer_of
from burnish.models.quiet import quiet
from burnish.recipe import ModelSection, Recipe
from burnish.run import hash_file, hash_of, write_folder
from burnish.types import Checkpoint, Tell, silent

ADAPTER_MANIFEST = "burnish.json"


def save_trained(model: Any, chat: Chat, folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """Write what was trained: the adapter of a PEFT model, else the whole weights. `facts` go into the manifest; `step` is needed."""
    with write_folder(folder) as aside:
        with quiet():
            model.save_pretrained(str(aside), safe_serialization=True) if isinstance(model, PeftModel) else model.save_pretrained(
                str(aside)
            )
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        write_beside(aside, chat, {**facts, **quantizer_facts(model)})
    return Checkpoint(str(folder), int(facts["step"]), facts.get("validation_loss"))


def write_beside(folder: Path, chat: Chat, facts: dict[str, Any]) -> None:
    """Tokenizer, template and, last, the manifest over all files of the folder."""
    chat.tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")  # where transformers and vLLM look for it
    files = {file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in sorted(folder.iterdir()) if file.is_file()}
    manifest = {"format": 1, **facts, "template_sha256": chat.template_hash, "stop_ids": list(chat.stop_ids), "files": files}
    (folder / ADAPTER_MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_trained(recipe: Recipe, folder: Path, tell: Tell = silent) -> Any:
    """The trained model of a folder, in evaluation mode, on the base it was trained on (for `qlora` on the same 4 bits). Raises ModelError."""
    manifest = verify_adapter(folder, weights_hash(recipe.model.name))
    if is_whole(folder):
        return read_weights(folder, recipe.model)
    return load_adapter(load_base(recipe, tell, quantizer=manifest.get("quantizer")), folder, manifest["base_sha256"])


def load_adapter(model: Any, folder: Path, base_sha256: str, *, trainable: bool = False, any_base: bool = False) -> Any:
    """Put saved weights on their base, after `verify_adapter`: an adapter, or whole weights (then the given model is only their measure).

    In evaluation mode; with `trainable` the adapter's weights want gradients; `any_base` takes the same weights in more or fewer bits than they were trained on.
    Raises ModelError where the folder holds none that fits.
    """
    if not (folder / "adapter_config.json").exists() and not is_whole(folder):
        raise ModelError(f"{folder}: no adapter there; run `burnish train` first")
    manifest = verify_adapter(folder, base_sha256)
    if is_whole(folder):
        device = "mps" if model.device.type == "mps" else str(model.device)
        section = ModelSection.model_validate({"name": str(folder), "dtype": str(model.dtype).removeprefix("torch."), "device": device})
        return read_weights(folder, section)
    if manifest.get("quantizer") != quantizer_of(model) and not any_base:
        raise ModelError(
            f"{folder}: trained on a base held as {manifest.get('quantized', 'it is, in 16 or 32 bits')}, not on "
            f"{quantizer_facts(model).get('quantized', 'the unquantised base')}: its answers would not be those that were measured"
        )
    try:
        with quiet():
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False).eval()
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


def trained_hash(manifest: dict[str, Any]) -> str:
    """What identifies the trained weights: the SHA-256 of their file, or one hash over those of several."""
    found = [entry["sha256"] for name, entry in sorted(manifest["files"].items()) if name.endswith(".safetensors")]
    return str(found[0]) if len(found) == 1 else hash_of(found)


def is_whole(folder: Path) -> bool:
    """Whether the folder holds whole weights, not an adapter."""
    return (folder / "config.json").exists() and not (folder / "adapter_config.json").exists()
