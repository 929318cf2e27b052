"""Base model and tokenizer from a name: embedded, local folder, or Hugging Face id. Safetensors or GGUF, never remote code, never pickle."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from burnish.errors import ModelError, missing_extra
from burnish.models.chat import Chat, make_chat
from burnish.models.embedded import EMBEDDED, embedded_folder
from burnish.models.gguf_file import prove_file
from burnish.models.layers import is_linear
from burnish.models.quantize import BLOCK, QUANTIZERS, choose_quantizer, fitting_names, mark_quantized, quantize, quantizer_facts
from burnish.models.quiet import quiet, uncollected
from burnish.recipe import ModelSection, Recipe
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
    folder = Path(find_model(model.name, tell))
    states = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir() if file.suffix != ".safetensors")
    return make_chat(_tokenizer(model.name, folder, tuple(states)), model.chat_template)


@lru_cache(maxsize=2)
def _tokenizer(name: str, folder: Path, states: tuple[tuple[str, int, int], ...]) -> Any:
    """A tokenizer, read once for each state of its folder: with 262,144 words that takes seconds."""
    try:
        with quiet(), uncollected():
            inside = {} if (folder / "tokenizer_config.json").exists() else _gguf(folder)
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **inside)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as problem:
        raise ModelError(f"{name}: the tokenizer cannot be read: {str(problem)[:300]}") from problem


def load_model(model: ModelSection, tell: Tell = silent) -> Any:
    """The base model in evaluation mode, on its device, in its compute type; every weight frozen. Raises ModelError."""
    return read_weights(Path(find_model(model.name, tell)), model)


def load_base(recipe: Recipe, tell: Tell = silent, *, quantizer: str | None = None) -> Any:
    """The base that the recipe's method trains on: `load_model`, or for `qlora` the same weights in 4 bits.

    `quantizer` names the one an adapter was trained on; none: the first that runs here. Raises ModelError where it does not.
    """
    if recipe.training.method != "qlora":
        return load_model(recipe.model, tell)
    folder = Path(find_model(recipe.model.name, tell))
    name = quantizer or choose_quantizer(resolve_device(recipe.model.device), folder)
    if name == "gguf" and not any(folder.glob("*.gguf")):
        raise ModelError(f"{recipe.model.name}: trained on the weights of a .gguf file, and there is none in {folder}")
    tell("4-bit base", 0, 0, QUANTIZERS[name].title)
    if name == "gguf":
        loaded = mark_quantized(read_weights(folder, recipe.model, from_gguf=True), name)
    elif name == "torchao" or _gguf(folder):
        loaded = quantize(read_weights(folder, recipe.model), name)
    else:
        loaded = mark_quantized(_read_in_4_bits(folder, recipe.model), name)
    if whole := quantizer_facts(loaded).get("unquantized_layers"):
        tell("4-bit base", 0, 0, f"{whole} linear layers stay as they are: their rows do not divide into blocks of {BLOCK} weights")
    return loaded


def _read_in_4_bits(folder: Path, model: ModelSection) -> Any:
    """By bitsandbytes through transformers: each weight is quantised as it is read, so a large base never stands in memory in 16 bits."""
    device = resolve_device(model.device)
    with torch.device("meta"), quiet():
        shell = AutoModelForCausalLM.from_config(_config(folder), trust_remote_code=False)
    fitting = set(fitting_names(shell))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, resolve_dtype(model.dtype, device)),
        # Our list takes the place of transformers' own: the head is on it, too.
        llm_int8_skip_modules=[path for path, module in shell.named_modules() if is_linear(module) and path not in fitting],
    )
    return read_weights(folder, model, quantization_config=config, device_map={"": device})


def quantizer_for(recipe: Recipe) -> str | None:
    """Which of QUANTIZERS makes the base of a `qlora` recipe on this machine; None for other methods."""
    if recipe.training.method != "qlora":
        return None
    return choose_quantizer(resolve_device(recipe.model.device), Path(find_model(recipe.model.name)))


def read_weights(folder: Path, model: ModelSection, *, from_gguf: bool = False, **options: Any) -> Any:
    """A model folder's weights, frozen, in evaluation mode, on the device and in the compute type of `model`. Raises ModelError."""
    device, dtype = resolve_device(model.device), resolve_dtype(model.dtype, resolve_device(model.device))
    source = _gguf(folder, wanted=from_gguf)
    if source:
        options["quantization_config"] = GgufConfig(dequantize=True)  # its packed products would fetch a kernel, and have no gradient
    else:
        options["use_safetensors"] = True
    try:
        with quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="eager" if _caps_attention(folder) else "sdpa",
                **source,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as problem:
        raise ModelError(f"{model.name}: the weights cannot be read: {str(problem)[:400]}") from problem
    loaded.requires_grad_(False)
    if source:
        prove_file(loaded, folder / source["gguf_file"])
    return loaded.eval() if "device_map" in options else loaded.eval().to(device)


def _caps_attention(folder: Path) -> bool:
    """Gemma 2 and its kin cap attention's scores, which SDPA would leave out without a word."""
    return bool(getattr(_config(folder).get_text_config(), "attn_logit_softcapping", None))


def base_state(recipe: Recipe) -> str:
    """What an answer or a training rests on: the base's weights, and for `qlora` what holds them in 4 bits."""
    weights, quantizer = weights_hash(recipe.model.name), quantizer_for(recipe)
    return weights if quantizer is None else hash_of(weights, quantizer)


def stored_dtype(folder: Path) -> str:
    """The type of a model folder's weights: what a merged model is written in."""
    named = getattr(_config(folder), "dtype", None) or "bfloat16"
    return str(named).removeprefix("torch.")


def weights_hash(name: str) -> str:
    """One hash over the weight files' SHA-256: an adapter belongs to these weights and no others."""
    folder = Path(find_model(name))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
    return hash_of([_hash_of_state(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def tokenizer_hash(name: str) -> str:
    """One hash over the files that decide how text becomes tokens."""
    folder = Path(find_model(name))
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")
    files = [folder / file for file in names if (folder / file).exists()] or sorted(folder.glob("*.gguf"))
    return hash_of([[file.name, _hash_of_state(file, file.stat().st_size, file.stat().st_mtime_ns)] for file in files])


def context_window(name: str) -> int | None:
    """Tokens that the model can read at once; None where its config does not say."""
    config = _config(Path(find_model(name))).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def layer_count(name: str) -> int:
    """How many decoder layers the model has, by its config."""
    return int(_config(Path(find_model(name))).get_text_config().num_hidden_layers)


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
    if not config_file.exists() and _gguf(path):
        return _checked_gguf(path)
    if not config_file.exists():
        raise ModelError(f"model.name: {path}: no config.json there; expected a model folder in Hugging Face's form")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ModelError(f"{config_file}: not JSON: {problem}") from problem
    if not isinstance(config, dict) or "auto_map" in config:
        raise ModelError(f"{config_file}: the model wants to run its own code (auto_map); Burnish never runs code that comes with weights")
    if not any(path.glob("*.safetensors")):
        if _gguf(path):
            return _checked_gguf(path)
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for file in path.glob(pattern))
        why = (
            f"; it has {', '.join(others[:3])}, but pickled weights can run code and are never read: convert them to safetensors"
            if others
            else ""
        )
        raise ModelError(f"model.name: {path}: no weights there (*.safetensors){why}")
    try:
        _config(path)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(f"{config_file}: unknown kind of model: {str(problem)[:300]}") from problem
    return path


def _gguf(folder: Path, *, wanted: bool = False) -> dict[str, str]:
    """{"gguf_file": NAME} where the folder's weights are a .gguf file (`wanted`: also where safetensors lie beside it), else {}."""
    if not wanted and any(folder.glob("*.safetensors")):
        return {}
    files = sorted(folder.glob("*.gguf"))
    return {"gguf_file": files[0].name} if files else {}


def _checked_gguf(path: Path) -> Path:
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"model.name: {path}: {len(files)} .gguf files ({', '.join(files[:3])}); expected one: put the one you want into a folder of its own"
        )
    with missing_extra("quantized", f"reading {path / files[0]}"):
        import gguf  # noqa: F401 - transformers reads GGUF through it
    try:
        _config(path)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as problem:
        raise ModelError(f"{path / files[0]}: unknown kind of model: {str(problem)[:300]}") from problem
    return path


def _config(folder: Path) -> Any:
    inside = {} if (folder / "config.json").exists() else _gguf(folder)
    with quiet():
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **inside)
