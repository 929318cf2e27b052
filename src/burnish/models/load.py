"""Base model and tokenizer from a name: embedded, local folder, or Hugging Face id. Safetensors only, never remote code, never pickle."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from burnish.errors import ModelError, missing_extra
from burnish.models.chat import Chat, make_chat
from burnish.models.embedded import EMBEDDED, embedded_folder
from burnish.models.quiet import quiet
from burnish.recipe import ModelSection
from burnish.run import hash_file, hash_of
from burnish.types import Tell, silent


def find_model(name: str, tell: Tell = silent) -> str:
    """The local folder of a model; for a Hugging Face id, its downloaded snapshot. Everything unsafe or incomplete is refused here."""
    if name in EMBEDDED:
        return str(embedded_folder(name, tell))
    path = Path(name).expanduser()
    if path.exists():
        return str(_check_folder(path))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"model.name: {name}: no such folder, and not a Hugging Face id (OWNER/NAME). Embedded: {', '.join(EMBEDDED)}")
    with missing_extra("hub", f"the model {name}"):
        import huggingface_hub
        import huggingface_hub.errors
    tell(f"fetching {name}", 0, 0, "")
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.HFValidationError, OSError, ValueError) as problem:
        raise ModelError(
            f"model.name: {name}: cannot be fetched: {str(problem)[:300]}. Without a network, name a local folder"
        ) from problem
    return str(_check_folder(Path(folder)))


def load_chat(model: ModelSection, tell: Tell = silent) -> Chat:
    """The tokenizer with the recipe's template."""
    folder = find_model(model.name, tell)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as problem:
        raise ModelError(f"{model.name}: the tokenizer cannot be read: {str(problem)[:300]}") from problem
    return make_chat(tokenizer, model.chat_template)


def load_model(model: ModelSection, tell: Tell = silent) -> Any:
    """The base model in evaluation mode, on its device, in its compute type; every weight frozen. Raises ModelError."""
    folder = find_model(model.name, tell)
    device, dtype = resolve_device(model.device), resolve_dtype(model.dtype, resolve_device(model.device))
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                attn_implementation="sdpa",
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as problem:
        raise ModelError(f"{model.name}: the weights cannot be read: {str(problem)[:400]}") from problem
    loaded.requires_grad_(False)
    return loaded.eval().to(device)


def weights_hash(name: str) -> str:
    """One hash over the weight files' SHA-256: an adapter belongs to these weights and no others."""
    files = sorted(Path(find_model(name)).glob("*.safetensors"))
    return hash_of([_hash_of_state(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def tokenizer_hash(name: str) -> str:
    """One hash over the files that decide how text becomes tokens."""
    folder = Path(find_model(name))
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")
    files = [folder / file for file in names if (folder / file).exists()]
    return hash_of([[file.name, _hash_of_state(file, file.stat().st_size, file.stat().st_mtime_ns)] for file in files])


def context_window(name: str) -> int | None:
    """Tokens that the model can read at once; None where its config does not say."""
    config = AutoConfig.from_pretrained(find_model(name), trust_remote_code=False, local_files_only=True).get_text_config()
    return getattr(config, "max_position_embeddings", None)


@cache
def _hash_of_state(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, read once for each state it is found in (0.5 GB take half a second)."""
    return hash_file(file)


def resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("model.device: cuda: torch sees no CUDA device here. Use auto or cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ModelError("model.device: mps: not available here. Use auto or cpu")
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """bfloat16 where it is fast. On CPUs that means AVX512-BF16 or AMX; without them it is several times slower than float32."""
    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "mps":
        return "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def _check_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ModelError(f"model.name: {path} is a file; expected a model folder with config.json and *.safetensors")
    config_file = path / "config.json"
    if not config_file.exists():
        raise ModelError(f"model.name: {path}: no config.json there; expected a model folder in Hugging Face's form")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ModelError(f"{config_file}: not JSON: {problem}") from problem
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelError(f"{config_file}: the model wants to run its own code (auto_map); Burnish never runs code that comes with weights")
    if not any(path.glob("*.safetensors")):
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for file in path.glob(pattern))
        why = (
            f"; it has {', '.join(others[:3])}, but pickled weights can run code and are never read: convert them to safetensors"
            if others
            else ""
        )
        raise ModelError(f"model.name: {path}: no weights there (*.safetensors){why}")
    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"{config_file}: unknown kind of model: {str(problem)[:300]}") from problem
    return path
