"""The 4-bit base of QLoRA: the linear layers' weights in 4 bits, everything else (embeddings, head, norms) as it is.

QUANTIZERS is the table; the first that is installed and runs on this device is taken, and training tells which:

    bitsandbytes   nf4, scales quantised again: 4.13 bits a weight
    torchao        the same format, by torchao
    gguf           none of them there, but a .gguf file in the model's folder: its weights, read through transformers and held de-quantised

Quantised means: the layer multiplies by the matrix that its 4 bits stand for, y = x · dequantized(W)ᵀ. That is proved on every load, for one
layer of each shape, against the bits decoded here and not by the library (a .gguf file's weights: models/gguf_file.py). A layer whose rows do
not divide into blocks of 64 stays as it is: bitsandbytes 0.50.2 decodes it wrongly on CPUs with AVX512, without a word (by 16 to 26 % of the
norm for normal weights, by 1 to 2 % for uniform ones).
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
_WHOLE = "_burnish_whole_layers"  # on the model: how many linear layers stayed as they were


@dataclass(frozen=True, slots=True)
class Quantizer:
    title: str  # as it is told
    linear: Callable[[nn.Linear], nn.Module]  # a linear layer → the same layer on 4 bits, where it is
    dequantized: Callable[[nn.Module], Tensor]  # such a layer → the matrix (out, in) its bits stand for, float32, decoded here


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
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
    return module


def _bitsandbytes_dequantized(module: Any) -> Tensor:
    state = module.weight.quant_state
    scales = state.absmax
    if state.nested:  # a scale is itself a code of 8 bits times a scale, plus the mean that was taken off
        within = state.state2
        outer = within.absmax.float().repeat_interleave(within.blocksize)[: len(scales)]
        scales = within.code[scales.int()].float() * outer + state.offset
    return _decoded(module.weight.data.view(torch.uint8), state.code, scales).reshape(state.shape)


def _decoded(packed: Tensor, code: Tensor, scales: Tensor) -> Tensor:
    """Two codes a byte, the high half first, each times its block's scale: (blocks, weights of a block), float32."""
    byte = torch.arange(256, device=packed.device)
    pairs = torch.stack([code[byte >> 4], code[byte & 15]], -1).float()  # (256, 2)
    return pairs[packed.reshape(-1).int()].reshape(len(scales), -1) * scales.float()[:, None]


def _torchao_linear(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import to_nf4

    scales = linear.weight.numel() // BLOCK
    together = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if scales % size == 0)
    linear.weight = nn.Parameter(to_nf4(linear.weight.data.contiguous(), BLOCK, together), requires_grad=False)
    return linear


def _torchao_dequantized(module: Any) -> Tensor:
    weight = module.weight
    groups = weight.quantized_scalers.reshape(len(weight.quantization_factor), -1).float()
    scales = (groups / weight.quantization_factor.float()[:, None]).reshape(-1) + weight.scaler_mean.float()
    return _decoded(weight.quantized_data, weight.nf4, scales).reshape(weight.shape)


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
        prove(QUANTIZERS[name].linear(linear.requires_grad_(False)), name)
        return None
    except ImportError as problem:
        return f"{problem.name or name} is not installed"
    except (RuntimeError, NotImplementedError, AssertionError, ModelError, ValueError) as problem:
        return str(problem)[:200] or type(problem).__name__


def quantize(model: Any, name: str | None = None) -> Any:
    """Quantise the layers of `fitting_names` in place, one at a time."""
    name = name or choose_quantizer(str(model.device))
    model.requires_grad_(False)
    for path in fitting_names(model):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, QUANTIZERS[name].linear(_as_linear(model.get_submodule(path))))
    return mark_quantized(model, name)


def fitting_names(model: Any) -> list[str]:
    """Every linear layer but the head whose rows divide into blocks: elsewhere a block would reach over two rows, and kernels differ on that."""
    return [path for path in linear_names(model) if _inputs(model.get_submodule(path)) % BLOCK == 0]


def _inputs(linear: Any) -> int:
    return int(linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0])  # Conv1D holds Wᵀ


def _as_linear(linear: Any) -> nn.Linear:
    """GPT-2's Conv1D as the linear layer that it is."""
    if isinstance(linear, nn.Linear):
        return linear
    inputs, outputs = linear.weight.shape
    result = nn.Linear(inputs, outputs, bias=False, device="meta")
    result.weight = nn.Parameter(linear.weight.data.T.contiguous(), requires_grad=False)
    result.bias = linear.bias
    return result


def mark_quantized(model: Any, name: str) -> Any:
    """Prove a quantised layer of each shape and note on the model which quantizer made it, and how many layers stayed as they were.

    Raises ModelError where there is none, or one is wrong.
    """
    setattr(model, _MARK, name)
    layers = quantized_layers(model)
    setattr(model, _WHOLE, len(linear_names(model)) - len(layers))
    if not layers:
        raise ModelError(
            f"training.method: qlora: no linear layer of {type(model).__name__} could be quantised: a row of none divides into blocks of "
            f"{BLOCK} weights; choose training.method: lora"
        )
    proved = set()
    for path, layer in layers.items():
        one_layout(layer)  # before it runs for the first time
        shape = (layer.in_features, layer.out_features, layer.bias is None)
        if shape not in proved and name != "gguf":  # there the layer is a plain one, and `read_weights` has compared it with the file
            prove(layer, name, path)
            proved.add(shape)
    return model


def prove(layer: Any, name: str, path: str = "a trial layer") -> None:
    """Raises ModelError unless the layer computes x · dequantized(W)ᵀ, in training and outside, and its gradient is that matrix."""
    matrix = QUANTIZERS[name].dequantized(layer)
    dtype = layer.bias.dtype if layer.bias is not None else getattr(layer, "compute_dtype", None) or layer.weight.dtype
    noise = torch.Generator().manual_seed(0)  # of both signs: over a smooth input the roundings of one code's weights would add up
    x, slope = (torch.randn(4, size, generator=noise).to(matrix.device, dtype) for size in reversed(matrix.shape))
    with torch.no_grad():
        expected = x.float() @ matrix.T + (0 if layer.bias is None else layer.bias.float())
        errors = {"product": _distance(layer(x), expected)}
    with torch.enable_grad():
        trained = layer(x.requires_grad_(True))
        (back,) = torch.autograd.grad(trained, x, slope)
    errors |= {"product in training": _distance(trained, expected), "gradient": _distance(back, slope.float() @ matrix)}
    bound = 1e-4 if dtype == torch.float32 else 2**-7  # in bfloat16 the decoding is rounded, too: 2 to 4 × 10⁻³ measured
    if wrong := {what: error for what, error in errors.items() if not error <= bound}:
        what, error = next(iter(wrong.items()))
        raise ModelError(
            f"{name} {metadata.version(name)}: {path} ({matrix.shape[0]} × {matrix.shape[1]}): its {what} is {error:.1e} away from the matrix "
            "that its bits stand for; choose training.method: lora, or another version of the library"
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected).norm() / expected.norm().clamp(min=1e-30))


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
    whole = getattr(model, _WHOLE, 0)
    facts = {"quantizer": name, "quantizer_version": metadata.version(name), "quantized": QUANTIZERS[name].title, "bits": 4}
    return facts | ({"unquantized_layers": whole} if whole else {})
