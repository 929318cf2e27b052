"""The 4-bit base of QLoRA: the linear layers' weights in 4 bits, everything else (embeddings, head, norms) as it is.

QUANTIZERS is the table; the first that is installed and runs on this device is taken, and training tells which:

    bitsandbytes   nf4, scales quantised again: 4.13 bits a weight
    torchao        the same format, by torchao
    gguf           none of them there, but a .gguf file in the model's folder: its weights, read through transformers and held de-quantised

Quantised means: the layer multiplies by the matrix that its 4 bits stand for, y = x · dequantized(W)ᵀ. That is proved on every load.
To add one: write the two functions of `Quantizer`, add a line to QUANTIZERS; tests/contract/test_quantizers.py then runs on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.models.layers import linear_names

BLOCK = 64  # weights that share a scale
_MARK = "_burnish_quantizer"  # on the model: which of QUANTIZERS made it


@dataclass(frozen=True, slots=True)
class Quantizer:
    title: str  # as it is told
    linear: Callable[[nn.Linear], nn.Module]  # a linear layer → the same layer on 4 bits, where it is
    dequantized: Callable[[nn.Module], Tensor]  # such a layer → the matrix (out, in) its bits stand for, float32


def _bitsandbytes_linear(linear: nn.Linear) -> nn.Module:
    import bitsandbytes

    device, dtype = linear.weight.device, linear.weight.dtype
    result = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    weight = linear.weight.data
    result.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, blocksize=BLOCK, compress_statistics=True, quant_type="nf4", module=result
    )
    result.bias = linear.bias
    return one_layout(result.to(device))


def one_layout(module: Any) -> Any:
    """bitsandbytes repacks a CPU layer, with its scales in bfloat16, once it runs outside training: validation would see another base."""
    module.support_avx512bf16_for_cpu = False
    return module


def _bitsandbytes_dequantized(module: Any) -> Tensor:
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()


def _torchao_linear(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import to_nf4

    scales = linear.weight.numel() // BLOCK
    together = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if scales % size == 0)
    linear.weight = nn.Parameter(to_nf4(linear.weight.data.contiguous(), BLOCK, together), requires_grad=False)
    return linear


def _torchao_dequantized(module: Any) -> Tensor:
    return module.weight.get_original_weight().float()


def _as_it_is(linear: nn.Linear) -> nn.Module:
    return linear


def _plain_matrix(module: Any) -> Tensor:
    return module.weight.float()


QUANTIZERS: dict[str, Quantizer] = {
    "bitsandbytes": Quantizer("nf4 by bitsandbytes, 4.13 bits a weight", _bitsandbytes_linear, _bitsandbytes_dequantized),
    "torchao": Quantizer("nf4 by torchao, 4.13 bits a weight", _torchao_linear, _torchao_dequantized),
    # Nothing to convert: the file is quantised already, and the layers hold what it stands for.
    "gguf": Quantizer("GGUF blocks of the file, held de-quantised", _as_it_is, _plain_matrix),
}


def choose_quantizer(device: str, folder: Path | None = None) -> str:
    """The first of QUANTIZERS that runs here. Raises ModelError with the reason of each that does not."""
    reasons = []
    for name in ("bitsandbytes", "torchao"):
        reason = why_not(name, device)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if folder is not None and any(folder.glob("*.gguf")):
        return "gguf"
    raise ModelError(
        f"training.method: qlora needs a 4-bit base, and nothing here makes one on {device} ({'; '.join(reasons)}; no .gguf file in the model's folder). "
        "pip install 'burnish[quantized]', or choose training.method: lora"
    )


@cache
def why_not(name: str, device: str) -> str | None:
    """None where the quantizer is installed and a small layer on this device computes, forward and backward, what its bits stand for."""
    linear = nn.Linear(2 * BLOCK, BLOCK, bias=False, device=device)
    nn.init.normal_(linear.weight, generator=torch.Generator(device).manual_seed(0))
    try:
        layer = QUANTIZERS[name].linear(linear.requires_grad_(False))
        x = torch.ones(1, 2 * BLOCK, device=device, requires_grad=True)
        layer(x).sum().backward()
        prove(layer, name)
        expected = QUANTIZERS[name].dequantized(layer).sum(0)
        assert x.grad is not None
        return None if torch.allclose(x.grad[0], expected, rtol=1e-3, atol=1e-3) else "its gradient is wrong on this device"
    except ImportError as problem:
        return f"{problem.name or name} is not installed"
    except (RuntimeError, NotImplementedError, AssertionError, ModelError, ValueError) as problem:
        return str(problem)[:200] or type(problem).__name__


def quantize(model: Any, name: str | None = None) -> Any:
    """Quantise every linear layer but the head, in place, one at a time. Layers whose size does not divide into blocks stay as they are."""
    name = name or choose_quantizer(str(model.device))
    model.requires_grad_(False)
    for path in linear_names(model):
        parent, _, child = path.rpartition(".")
        linear = model.get_submodule(path)
        if linear.weight.numel() % BLOCK == 0:
            setattr(model.get_submodule(parent), child, QUANTIZERS[name].linear(linear))
    return mark_quantized(model, name)


def mark_quantized(model: Any, name: str) -> Any:
    """Prove the first quantised layer and note on the model which quantizer made it."""
    setattr(model, _MARK, name)
    layers = quantized_layers(model)
    if not layers:
        raise ModelError(f"training.method: qlora: no linear layer of {type(model).__name__} could be quantised")
    prove(next(iter(layers.values())), name)
    return model


def prove(layer: Any, name: str) -> None:
    """Raises ModelError unless the layer computes x · dequantized(W)ᵀ."""
    matrix = QUANTIZERS[name].dequantized(layer)
    dtype = layer.bias.dtype if layer.bias is not None else getattr(layer, "compute_dtype", None) or layer.weight.dtype
    x = torch.linspace(-1, 1, 4 * matrix.shape[1], device=matrix.device, dtype=dtype).reshape(4, -1)
    with torch.no_grad():
        found = layer(x).float()
        expected = x.float() @ matrix.T + (0 if layer.bias is None else layer.bias.float())
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    # The product's own rounding: 2⁻⁸ in bfloat16.
    if not error <= (2e-2 if dtype == torch.bfloat16 else 1e-4):
        raise ModelError(
            f"{name}: a quantised layer is {error:.1e} away from the matrix that its bits stand for; choose training.method: lora"
        )


def quantizer_of(model: Any) -> str | None:
    return getattr(model, _MARK, None)


def is_quantized(model: Any) -> bool:
    return quantizer_of(model) is not None


def quantized_layers(model: Any) -> dict[str, nn.Module]:
    """The layers on 4 bits, by name (without PEFT's wrapping)."""
    name = quantizer_of(model)
    if name is None:
        return {}
    kinds = {"bitsandbytes": "Params4bit", "torchao": "NF4Tensor", "gguf": "Parameter"}
    found = {path: model.get_submodule(path) for path in linear_names(model)}
    return {path: layer for path, layer in found.items() if kinds[name] in (type(layer.weight).__name__, type(layer.weight.data).__name__)}


def quantizer_facts(model: Any) -> dict[str, Any]:
    """What the summary and the manifest say of the base: empty where it is not quantised."""
    name = quantizer_of(model)
    if name is None:
        return {}
    library = metadata.version(name)
    return {"quantizer": name, "quantizer_version": library, "quantized": QUANTIZERS[name].title, "bits": 4}
