"""Products of the frozen base in 8 bits on a CPU: `engine.base_products: int8`. Not exact, and so a choice, never a default.

Weights are rounded once, each output row with its own scale; activations are rounded at each product, each token with its own scale (the scheme of
LLM.int8(), arXiv 2208.07339; layers with outliers stay as they are). The integer products are oneDNN's, through the operators that torch's own quantised
inference calls. Adapters, norms, attention, the loss and everything that is trained stay in the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import ModelError
from burnish.models.kernels import Kernels

_MOST_ERROR = 0.025  # of a layer's output, by norm, on the probe's rows
_ZERO = 128  # oneDNN multiplies unsigned activations: 128 stands for 0


class Int8Weight:
    """A frozen (D_out, D_in) weight, packed for x Wᵀ and, with `both`, for the way back, dy W."""

    def __init__(self, weight: Tensor, *, both: bool = True, kernels: Kernels | None = None) -> None:
        self.shape, self.dtype, self.kernels = weight.shape, weight.dtype, kernels
        self._onward = _packed(weight)
        self._back = _packed(weight.T) if both else None

    def times(self, rows: Tensor) -> Tensor:
        """(T, D_in) → (T, D_out), in the compute type."""
        return _product(rows, self._onward, self.kernels)

    def back(self, above: Tensor) -> Tensor:
        """(T, D_out) → (T, D_in)."""
        assert self._back is not None
        return _product(above, self._back, self.kernels)


Packed = tuple[Tensor, Tensor, Tensor]  # packed weight, scales (D_out,), zero points (D_out,)


@cache
def weight_limit() -> int:
    """The largest whole number that a weight may become: 127 where the products are exact with it (VNNI, AMX), 63 where pairs of products
    would run over 16 bits (AVX2); 0 where torch or the machine has no such products."""
    weights = torch.tensor([[1, -1, 1, 1] * 16] * 64, dtype=torch.int8)
    rows = torch.full((4, 64), 255, dtype=torch.uint8)
    for limit in (127, 63):
        try:
            packed = torch.ops.onednn.qlinear_prepack((weights * limit).contiguous(), None)
            found = _whole(rows, (packed, torch.ones(64), _zeros(64)))
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            return 0
        if torch.equal(found, torch.full_like(found, 127 * limit * 32)):
            return limit
    return 0


def pack_base(model: Any, probe: Callable[[], Any], kernels: Kernels | None = None) -> tuple[int, int]:
    """Give frozen linear layers their 8-bit form beside the weight. Returns (layers that have it, layers looked at); call it before `fuse`.

    `probe` runs the model once on typical rows: a layer whose product is off by more than _MOST_ERROR of its size on them stays as it is
    (some layers see a few activations a hundred times larger than the others). The head stays too: its error would go into every loss.
    Raises ModelError where this machine or build has no such products.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if next(inner.parameters()).device.type != "cpu" or not weight_limit():
        raise ModelError("engine.base_products: int8 needs a CPU and a torch whose oneDNN multiplies 8-bit numbers: set it to native")
    head = inner.get_output_embeddings()
    layers = [
        m for m in inner.modules() if type(m) is nn.Linear and not m.weight.requires_grad and m is not head and min(m.weight.shape) >= 32
    ]
    kept: list[nn.Module] = []

    def measure(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight: Any = layer.weight
        rows = args[0].detach().reshape(-1, weight.shape[1])
        exact = torch.mm(rows, weight.T).float()
        if (Int8Weight(weight, both=False, kernels=kernels).times(rows).float() - exact).norm() <= _MOST_ERROR * exact.norm():
            kept.append(layer)

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    for layer in dict.fromkeys(kept):
        weight: Any = layer.weight
        object.__setattr__(layer, "int8", Int8Weight(weight, kernels=kernels))
    return len(set(kept)), len(layers)


def _packed(weight: Tensor) -> Packed:
    wide = weight.detach().float()
    scales = wide.abs().amax(1).clamp_min(1e-12) / weight_limit()
    rounded = torch.round(wide / scales[:, None]).to(torch.int8).contiguous()
    return torch.ops.onednn.qlinear_prepack(rounded, None), scales, _zeros(weight.shape[0])


def _product(rows: Tensor, packed: Packed, kernels: Kernels | None) -> Tensor:
    if kernels is not None and kernels.takes(rows):
        rounded, scales = kernels.to_bytes(rows)
        return kernels.scale_rows(_whole(rounded, packed), scales, rows.dtype)
    highest = rows.abs().amax(1, keepdim=True).float().clamp_min_(1e-12).div_(127)  # (T, 1)
    rounded = torch.round(rows / highest).add_(_ZERO).to(torch.uint8)
    return _whole(rounded, packed).mul_(highest).to(rows.dtype)


def _whole(rounded: Tensor, packed: Packed) -> Tensor:
    """(T, D_in) unsigned whole numbers around 128 → (T, D_out) float32, times the weight's scales."""
    weight, scales, zeros = packed
    plain: Any = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, no scale or zero of the output, nothing after it
    result: Tensor = torch.ops.onednn.qlinear_pointwise(rounded, 1.0, _ZERO, weight, scales, zeros, *plain)
    return result


def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)
