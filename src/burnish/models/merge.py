"""Adapter + base → one model that plain transformers loads, proved to be the adapter it was made from.

Each layer is merged in float32 and cast once, to the type that the base's weights are stored in. Then the merged model is read back from the disk
and answers the same tokens as base + adapter, all three in float32:

    error    how far merged is from base + adapter      (root mean square over the logits)
    effect   how far base + adapter is from the base

A merge whose error is above what casting explains, or half of the adapter's whole effect, is refused: a rounded-away adapter is not that adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from burnish.errors import ModelError
from burnish.models.chat import Chat
from burnish.models.load import find_model, load_base, read_weights, stored_dtype, weights_hash
from burnish.models.quiet import quiet
from burnish.models.save import is_whole, load_adapter, trained_hash, verify_adapter, write_beside
from burnish.recipe import Recipe
from burnish.run import write_folder
from burnish.types import Tell, silent

# Error ÷ spread of the logits that a cast explains. Gemma 3 270M with an adapter of rank 16: 0.009 in bfloat16 (8 bits), so a third of these is usual.
CAST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
MOST_LOST = 0.5  # of the adapter's effect


@dataclass(frozen=True, slots=True)
class Merged:
    """What the merge measured on the probe, in float32."""

    folder: str
    dtype: str  # of the merged weights
    probe_tokens: int
    spread: float  # standard deviation of the base's logits: what error and effect are small or large against
    effect: float
    error: float
    # Only where the adapter was trained on a 4-bit base: the model as trained against the merged one.
    quantized: str | None = None
    difference_to_trained: float | None = None
    agreement_with_trained: float | None = None  # share of places whose likeliest token is the same


def merge_adapter(recipe: Recipe, adapter: Path, chat: Chat, output: Path, probe: Sequence[Sequence[int]], tell: Tell = silent) -> Merged:
    """Merge a saved adapter into its base and write the folder `output`. `probe`: token sequences on which merged and unmerged are compared.

    An adapter trained on a 4-bit base goes into the original weights; how far that model is from the one that was trained is measured.
    Raises ModelError where the merged model is not the adapter's, and then writes nothing.
    """
    base_sha256 = weights_hash(recipe.model.name)
    manifest = verify_adapter(adapter, base_sha256)
    if is_whole(adapter):
        raise ModelError(
            f"{adapter}: method `{manifest.get('method')}` trained whole weights: this folder is the model; there is nothing to merge"
        )
    folder = Path(find_model(recipe.model.name, tell))
    dtype = stored_dtype(folder)
    wide = recipe.model.model_copy(update={"dtype": "float32"})
    trained = None
    if manifest.get("quantizer"):
        tell(
            "merging",
            0,
            0,
            "trained on a 4-bit base: merged into the original weights, it is not the same model; how far it is from it is measured",
        )
        tell("merging", 0, 4, "the model as it was trained")
        trained = _logits(load_adapter(load_base(recipe, tell, quantizer=manifest["quantizer"]), adapter, base_sha256), probe)
    tell("merging", 1, 4, "base + adapter in float32")
    with torch.no_grad(), write_folder(output) as aside:
        model = load_adapter(read_weights(folder, wide), adapter, base_sha256, any_base=True).float()
        tuned = _logits(model, probe)
        with model.disable_adapter():
            base = _logits(model, probe)
        tell("merging", 2, 4, f"in float32, cast once to {dtype}")
        merged = _merged(model, getattr(torch, dtype))
        del model
        with quiet():
            merged.save_pretrained(aside)
        del merged
        facts = {"method": "merged", "base_model": recipe.model.name, "base_sha256": base_sha256, "adapter_sha256": trained_hash(manifest)}
        write_beside(aside, chat, {**facts, "step": manifest.get("step"), **_quantizer(manifest)})
        tell("merging", 3, 4, "reading it back and comparing")
        found = _logits(read_weights(aside, wide.model_copy(update={"name": str(aside)})), probe)
        result = _compare(found, tuned, base, dtype=dtype, folder=output)
        if trained is not None:
            agreement = float((found.argmax(-1) == trained.argmax(-1)).float().mean())
            result = replace(
                result, quantized=manifest["quantized"], difference_to_trained=_rms(found - trained), agreement_with_trained=agreement
            )
    tell("merging", 4, 4, str(output))
    return result


def _merged(model: Any, dtype: torch.dtype) -> Any:
    """The base with each layer's W + ΔW, made in float32 by PEFT, and everything cast once."""
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)  # refuses a NaN
    with quiet():  # PEFT warns that there is nothing left to merge
        return model.merge_and_unload().to(dtype)


def _compare(found: Tensor, tuned: Tensor, base: Tensor, *, dtype: str, folder: Path) -> Merged:
    result = Merged(str(folder), dtype, found.shape[0], float(base.std()), _rms(tuned - base), _rms(found - tuned))
    limit = CAST_ERROR[dtype] * result.spread
    if not result.error <= limit:
        raise ModelError(
            f"the merged model is not base + adapter: its logits are {result.error:.2g} away (root mean square), casting to {dtype} explains "
            f"{limit:.2g}. Nothing was written. Use the adapter itself, or tell us: this should not happen"
        )
    if result.effect > 0 and result.error > MOST_LOST * result.effect:
        raise ModelError(
            f"the adapter changes the logits by {result.effect:.2g}, and rounding the merged weights to {dtype} by {result.error:.2g}: too much of it would be lost. "
            "Nothing was written. Serve the adapter itself, or train it longer"
        )
    return result


def _quantizer(manifest: dict[str, Any]) -> dict[str, Any]:
    return {"trained_on": manifest["quantized"]} if manifest.get("quantizer") else {}


def _logits(model: Any, probe: Sequence[Sequence[int]]) -> Tensor:
    """(all tokens of the probe, V), float32."""
    with torch.inference_mode():
        parts = [model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float().cpu() for ids in probe]
    return torch.cat(parts)


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())
