"""How much of what was trained is in effect: from the base (0) over the tuned model (1) a little beyond it (1.25), without training.

    LoRA, QLoRA      W + s · scaling · B A                                         scaling = alpha ÷ rank
    rsLoRA           the same, scaling = alpha ÷ √rank
    DoRA             direction as above; each row's length ‖W‖ + s (m − ‖W‖)       at 0 the base, at 1 what was trained
    whole weights    (1 − s) W_base + s W_tuned                                     WiSE-FT, arXiv 2109.01903

`publish_scaled` writes one such point as a folder of the same kind as the trained one: an adapter whose `lora_alpha` (of DoRA its lengths, too) carries the
scale, so that plain PEFT, vLLM and llama.cpp need not know of it. Read back from the disk by plain PEFT (whole weights: transformers), it must give the logits that
the scaled model gave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.errors import ModelError
from burnish.models.chat import Chat
from burnish.models.load import load_base, read_weights, weights_hash
from burnish.models.quiet import quiet
from burnish.models.save import ADAPTER_MANIFEST, is_whole, load_adapter, trained_hash, verify_adapter, write_beside
from burnish.recipe import Recipe
from burnish.run import write_folder
from burnish.types import Tell, silent

_BESIDE = ("adapter_config.json", "adapter_model.safetensors")
# Root mean square of the logits' difference ÷ their spread that rounding alone explains: the same products in the same order give 0.
MOST_DIFFERENT = 1e-3


@dataclass(frozen=True, slots=True)
class Published:
    """What was written, and how far its logits, read back from the disk, are from the scaled model's."""

    folder: str
    scale: float
    sha256: str
    probe_tokens: int
    error: float  # root mean square over the logits
    spread: float  # standard deviation of the logits


class Scaled:
    """A trained model of which any share can be put into effect."""

    def __init__(self, recipe: Recipe, folder: Path, tell: Tell = silent) -> None:
        """Load the trained weights of a folder on their base. Raises ModelError where they are not whole, or of a kind that cannot be scaled."""
        manifest = verify_adapter(folder, weights_hash(recipe.model.name))
        base = load_base(recipe, tell, quantizer=manifest.get("quantizer"))
        self.recipe, self.folder, self.scale = recipe, folder, 1.0
        self._whole: dict[str, tuple[Tensor, Tensor]] = {}
        if is_whole(folder):
            self.model = read_weights(folder, recipe.model)
            before = dict(base.named_parameters())
            self._whole = {name: (before[name].detach(), own.detach().clone()) for name, own in self.model.named_parameters()}
            self._whole = {name: pair for name, pair in self._whole.items() if not torch.equal(*pair)}
            return
        self.model = load_adapter(base, folder, manifest["base_sha256"])
        self._scaling = {id(layer): layer.scaling[name] for layer, name in _layers(self.model)}
        self._lengths = {id(layer): _lengths(layer, name) for layer, name in _layers(self.model) if name in layer.lora_magnitude_vector}

    @torch.no_grad()
    def at(self, scale: float) -> Any:
        """The model with this share of its training, in evaluation mode. It is one model: the next call changes it. At 0 it is the base, bit for bit."""
        if not 0 <= scale <= 2:
            raise ValueError(f"a scale of {scale}: expected 0 (the base) to 2 (twice what was trained)")
        if scale not in (0, 1) and isinstance(self.model, PeftModel):
            _refuse_unscalable(self.model, self.folder)
        self.scale = scale
        if not isinstance(self.model, PeftModel):
            own = dict(self.model.named_parameters())
            for name, (base, tuned) in self._whole.items():
                own[name].copy_((1 - scale) * base.float() + scale * tuned.float())
            return self.model.eval()
        self.model.base_model.enable_adapter_layers() if scale else self.model.base_model.disable_adapter_layers()
        for layer, name in _layers(self.model):
            layer.scaling[name] = self._scaling[id(layer)] * scale
            if id(layer) in self._lengths:
                layer.lora_magnitude_vector[name].weight.copy_(_between(*self._lengths[id(layer)], scale))
        self.model.requires_grad_(False)  # switching an adapter on lets its weights want gradients
        return self.model.eval()


def publish_scaled(scaled: Scaled, scale: float, chat: Chat, output: Path, probe: Sequence[Sequence[int]]) -> Published:
    """Write the model at this scale as the folder `output`, proved on `probe` (token sequences) after it was read back from the disk.

    The folder appears whole or not at all. Raises ModelError where what was written does not answer as the scaled model does.
    """
    expected = _logits(scaled.at(scale), probe)
    manifest = json.loads((scaled.folder / ADAPTER_MANIFEST).read_text(encoding="utf-8"))
    kept = {key: value for key, value in manifest.items() if key not in ("files", "format", "template_sha256", "stop_ids")}
    with write_folder(output) as aside:
        if isinstance(scaled.model, PeftModel):
            _write_adapter(scaled, scale, aside)
        else:
            with quiet():
                scaled.model.save_pretrained(str(aside))
        write_beside(aside, chat, {**kept, "scale": scale, "scaled_from": trained_hash(manifest)})
        found = _logits(_read_back(scaled.recipe, aside, manifest), probe)
        error, spread = float((found - expected).square().mean().sqrt()), float(expected.std())
        if not error <= MOST_DIFFERENT * spread:
            raise ModelError(
                f"{output}: read back from the disk its logits are {error:.2g} away from those of the model at scale {scale:g} (their spread is {spread:.2g}): it is "
                "not the model that was measured. Nothing was written. Tell us: this should not happen"
            )
        sha256 = trained_hash(json.loads((aside / ADAPTER_MANIFEST).read_text(encoding="utf-8")))
    return Published(str(output), scale, sha256, int(expected.shape[0]), error, spread)


def _write_adapter(scaled: Scaled, scale: float, folder: Path) -> None:
    """The trained tensors as they are, with the scale in `lora_alpha`; of DoRA the lengths at this scale."""
    for name in _BESIDE:
        shutil.copyfile(scaled.folder / name, folder / name)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["lora_alpha"] = _plain(config["lora_alpha"] * scale)
    config["alpha_pattern"] = {name: _plain(alpha * scale) for name, alpha in (config.get("alpha_pattern") or {}).items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not config.get("use_dora"):
        return
    tensors = load_file(folder / "adapter_model.safetensors")
    lengths: dict[str, Tensor] = {}
    for path, layer in scaled.model.named_modules():
        if hasattr(layer, "lora_magnitude_vector"):
            lengths |= {f"{path}.lora_magnitude_vector": module.weight for module in layer.lora_magnitude_vector.values()}
    if set(lengths) != {name for name in tensors if "lora_magnitude_vector" in name}:
        raise ModelError(f"{scaled.folder}: the lengths that DoRA trained are not where they should be; this adapter cannot be scaled")
    for name, weight in lengths.items():
        tensors[name] = weight.detach().to(tensors[name].dtype).cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _read_back(recipe: Recipe, folder: Path, manifest: dict[str, Any]) -> Any:
    """As a stranger reads it: plain transformers or plain PEFT on the base."""
    if is_whole(folder):
        return read_weights(folder, recipe.model.model_copy(update={"name": str(folder)}))
    base = load_base(recipe, quantizer=manifest.get("quantizer"))
    with quiet():
        return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()


def _refuse_unscalable(model: Any, folder: Path) -> None:
    """What a factor on B A does not reach: biases, whole modules that were trained beside it."""
    config = model.peft_config[model.active_adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    further = (
        [name for name, given in (("bias", config.bias != "none"), ("modules_to_save", config.modules_to_save)) if given]
        if kind == "LORA"
        else []
    )
    if kind != "LORA" or further:
        raise ModelError(
            f"{folder}: {f'an adapter of kind {kind}' if kind != 'LORA' else f'an adapter with {further[0]}'} cannot be scaled by a factor: its change of the weights is not a "
            "multiple of B·A. Expected LoRA, rsLoRA, DoRA, QLoRA or whole weights. Try another repair: --try replay,kl,layers,rank"
        )


def _layers(model: Any) -> Iterator[tuple[Any, str]]:
    """(layer with matrices A and B, the adapter's name)."""
    name = model.active_adapter
    for module in model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            yield module, name


def _lengths(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """(of the base's rows, as trained), each (out,), float32."""
    trained = layer.lora_magnitude_vector[name].weight.detach().clone().float()
    return torch.linalg.norm(layer.get_base_layer().weight.detach().float(), dim=1).reshape(trained.shape), trained


def _between(base: Tensor, trained: Tensor, scale: float) -> Tensor:
    return (1 - scale) * base + scale * trained


def _plain(alpha: float) -> float | int:
    """A whole number where it is one: some readers of adapters take no other."""
    rounded = round(alpha, 9)
    return int(rounded) if rounded == int(rounded) else rounded


def _logits(model: Any, probe: Sequence[Sequence[int]]) -> Tensor:
    """(all tokens of the probe, V), float32."""
    with torch.inference_mode():
        parts = [model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0].float().cpu() for ids in probe]
    return torch.cat(parts)
