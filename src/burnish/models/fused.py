"""Norms, LoRA and the gated MLP as one autograd step each, with less kept for the backward pass and fewer passes over memory.

    norm   keeps its input and one number per token; transformers' own keeps several float32 copies
    LoRA   y = x Wᵀ + (x Aᵀ) (s B)ᵀ written into one buffer; keeps x and x Aᵀ (r numbers per token)
    MLP    keeps x, gate and up; act(gate) · up is made again on the way back

What is between the products is one pass over memory each where there are compiled kernels (kernels.py), and torch's own operations elsewhere.

Modules are exchanged in our own model object only: an RMSNorm or MLP by one that holds the same parameters under the same names, a LoRA layer
by a subclass of PEFT's, so that what is saved does not change. Each exchange is proved first on random numbers: a module whose output
differs from the library's is left as it was. Classes and functions of the libraries stay untouched.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from burnish.models.int8 import Int8Weight
from burnish.models.kernels import ACTIVATIONS, Kernels

Weight = Tensor | Int8Weight

# What an RMSNorm adds to its weight before it multiplies: Gemma's weights are stored minus one.
_OFFSETS = (0.0, 1.0)
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def fuse(model: Any, kernels: Kernels | None = None) -> dict[str, int]:
    """Exchange what can be exchanged. Returns how many modules of each kind are exchanged now."""
    kinds = {"norm": FusedNorm, "lora": FusedLora, "mlp": FusedMLP}
    counts = {name: sum(isinstance(module, kind) for module in model.modules()) for name, kind in kinds.items()}
    for module in list(model.modules()):
        if type(module) is LoraLinear and _takes_plain_lora(module):
            module.__class__ = FusedLora  # as FSDP2 does with what it wraps: the same object, parameters and names
            counts["lora"] += 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and (norm := _fused_norm(child, kernels)) is not None:
                setattr(parent, name, norm)
                counts["norm"] += 1
            elif _is_gated_mlp(child) and (mlp := _fused_mlp(child, kernels)) is not None:
                setattr(parent, name, mlp)
                counts["mlp"] += 1
    return counts


# ------------------------------------------------------------------------------------------------------------------ norm


class _RMSNorm(torch.autograd.Function):
    """x · rsqrt(mean(x²) + ε) · (offset + w), Zhang and Sennrich 2019 (arXiv 1910.07467). x: (…, D)."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, kernels: Kernels | None) -> Tensor:
        context.offset = offset
        context.kernels = kernels if kernels is not None and kernels.takes(x, weight) else None
        if context.kernels is not None:
            output, scale = context.kernels.rms_norm(x, weight, epsilon, offset)
            context.save_for_backward(x, weight, scale.unsqueeze(-1))
            return output
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()  # (…, 1)
        context.save_for_backward(x, weight, scale)
        factor = weight.float() + offset if offset else weight.float()
        return (wide * scale).mul_(factor).to(x.dtype)

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = context.saved_tensors
        of_weight = None
        if context.needs_input_grad[1]:
            of_weight = (outputs[0].float() * (x.float() * scale)).flatten(0, -2).sum(0).to(weight.dtype)
        if context.kernels is not None:
            return context.kernels.rms_norm_back(outputs[0].contiguous(), x, weight, context.offset, scale), of_weight, None, None, None
        factor = weight.float() + context.offset if context.offset else weight.float()
        normed = x.float() * scale
        slope = outputs[0].float() * factor
        # d/dx: scale · (slope − normed · mean(slope · normed))
        inner = torch.linalg.vecdot(slope, normed).unsqueeze(-1).div_(x.shape[-1])
        return slope.addcmul_(normed, inner, value=-1.0).mul_(scale).to(x.dtype), of_weight, None, None, None


class FusedNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.weight, self.epsilon, self.offset, self.kernels = weight, epsilon, offset, kernels

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.epsilon, self.offset, self.kernels)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.epsilon}, offset={self.offset}"


def _fused_norm(module: nn.Module, kernels: Kernels | None) -> FusedNorm | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    parameters = list(module.parameters())
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(epsilon, float) or len(parameters) != 1:
        return None
    # Judged in float32 on weights around 0, where an offset of 1 shows: Gemma's own weights reach 300, and in bfloat16 nobody sees the 1.
    generator = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module).float().cpu()
    with torch.no_grad():
        twin.weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))  # type: ignore[operator]
    probe = 3 * torch.randn(4, weight.shape[0], generator=generator)
    for offset in _OFFSETS:
        if _same(twin, FusedNorm(twin.weight, epsilon, offset, kernels), probe):  # type: ignore[arg-type]
            return FusedNorm(weight, epsilon, offset, kernels).train(module.training)
    return None


# ------------------------------------------------------------------------------------------------------------------ LoRA


class _LoraProduct(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ for a frozen W. x: (…, D_in), W: (D_out, D_in), A: (r, D_in), B: (D_out, r)."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output, low = _lora_forward(rows, weight, a, b, scale)
        if bias is not None:
            output += bias
        context.save_for_backward(rows, a, b, low)
        context.weight, context.scale, context.shape = weight, scale, x.shape
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, low = context.saved_tensors
        above = outputs[0].reshape(-1, outputs[0].shape[-1])
        of_x, of_a, of_b = _lora_backward(above, rows, context.weight, a, b, low, context.scale, context.needs_input_grad[0])
        return None if of_x is None else of_x.view(context.shape), None, None, of_a, of_b, None


def _times(rows: Tensor, weight: Weight) -> Tensor:
    return weight.times(rows) if isinstance(weight, Int8Weight) else torch.mm(rows, weight.T)


def _back(above: Tensor, weight: Weight) -> Tensor:
    return weight.back(above) if isinstance(weight, Int8Weight) else torch.mm(above, weight)


def _lora_forward(rows: Tensor, weight: Weight, a: Tensor | None, b: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """(T, D_out) output and (T, r) what A made of the input."""
    output = _times(rows, weight)
    if a is None or b is None:
        return output, None
    low = torch.mm(rows, a.T)
    return output.addmm_(low, b.T, alpha=scale), low


def _lora_backward(
    above: Tensor, rows: Tensor, weight: Weight, a: Tensor | None, b: Tensor | None, low: Tensor | None, scale: float, wants_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B from that of the output."""
    if wants_x:
        of_x, low_above = _lora_back(above, weight, a, b, scale)
        return of_x, *_lora_gradients(above, rows, low, low_above, scale)
    return None, *_lora_gradients(above, rows, low, None if b is None else torch.mm(above, b).mul_(scale), scale)


def _lora_back(above: Tensor, weight: Weight, a: Tensor | None, b: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """(T, D_in) gradient of x, and (T, r) that of x Aᵀ."""
    of_x = _back(above, weight)
    if a is None or b is None:
        return of_x, None
    low_above = torch.mm(above, b).mul_(scale)
    return of_x.addmm_(low_above, a), low_above


def _lora_gradients(
    above: Tensor, rows: Tensor, low: Tensor | None, low_above: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A (r, D_in) and B (D_out, r)."""
    if low is None or low_above is None:
        return None, None
    return torch.mm(low_above.T, rows), torch.mm(above.T, low).mul_(scale)


class FusedLora(LoraLinear):
    """PEFT's LoRA layer, its usual case in one autograd step. Everything unusual (switched off, merged, several adapters) is PEFT's own."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = lora_parts(self)
        if parts is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        weight, bias, a, b, scale = parts
        return _LoraProduct.apply(x, weight, bias, a, b, scale)


Parts = tuple[Weight, Tensor | None, Tensor | None, Tensor | None, float]


def lora_parts(layer: nn.Module) -> Parts | None:
    """(W, bias, A, B, scale) of a frozen linear layer with one plain adapter, or without one; None where it is anything else."""
    if type(layer) is nn.Linear:
        return None if layer.weight.requires_grad else (_weight(layer), layer.bias, None, None, 1.0)
    if not isinstance(layer, FusedLora) or layer.merged or layer.base_layer.weight.requires_grad:
        return None
    base = layer.base_layer
    if layer.disable_adapters:
        return _weight(base), base.bias, None, None, 1.0
    if len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return _weight(base), base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _weight(layer: nn.Module) -> Weight:
    """The frozen weight, or its 8-bit form where models.int8 gave it one."""
    packed: Weight | None = getattr(layer, "int8", None)
    weight: Any = layer.weight
    return weight if packed is None else packed


def _takes_plain_lora(layer: LoraLinear) -> bool:
    """One adapter of A and B without bias, dropout, DoRA or another variant, in the type of its base."""
    if type(layer.base_layer) is not nn.Linear or len(layer.lora_A) != 1 or getattr(layer, "lora_variant", None):
        return False
    (name,) = layer.lora_A
    a, b = layer.lora_A[name], layer.lora_B[name]
    if type(layer.base_layer.weight.data) is not Tensor:  # a quantised weight that calls itself bfloat16
        return False
    plain = all(type(part) is nn.Linear and part.bias is None for part in (a, b)) and isinstance(layer.lora_dropout[name], nn.Identity)
    return plain and not layer.fan_in_fan_out and a.weight.dtype == layer.base_layer.weight.dtype


# ------------------------------------------------------------------------------------------------------------------ MLP


Kinds = tuple[str, tuple[Weight, ...], tuple[float, ...]]


class _GatedMLP(torch.autograd.Function):
    """down(act(gate(x)) · up(x)), each product with its own LoRA; `kinds` holds the activation, the three frozen weights and the three scales."""

    @staticmethod
    def forward(context: Any, x: Tensor, kinds: Kinds, kernels: Kernels | None, *adapters: Tensor | None) -> Tensor:
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        rows = x.reshape(-1, x.shape[-1])
        name, (w_gate, w_up, w_down), (s_gate, s_up, s_down) = kinds
        gate, low_gate = _lora_forward(rows, w_gate, a_gate, b_gate, s_gate)
        up, low_up = _lora_forward(rows, w_up, a_up, b_up, s_up)
        context.kernels = kernels if kernels is not None and name in ACTIVATIONS and kernels.takes(gate, up) else None
        inner = _act(name, gate).mul_(up) if context.kernels is None else context.kernels.gated(name, gate, up)
        output, low_down = _lora_forward(inner, w_down, a_down, b_down, s_down)
        context.save_for_backward(rows, gate, up, low_gate, low_up, low_down, *adapters)
        context.kinds, context.shape = kinds, x.shape
        return output.view(x.shape)

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, low_gate, low_up, low_down, *adapters = context.saved_tensors
        a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
        name, (w_gate, w_up, w_down), (s_gate, s_up, s_down) = context.kinds
        above = outputs[0].reshape(-1, outputs[0].shape[-1])
        of_inner, low_above = _lora_back(above, w_down, a_down, b_down, s_down)
        if context.kernels is not None:
            inner, of_gate, of_up = context.kernels.gated_back(name, gate, up, of_inner)
        else:
            active = _act(name, gate)
            inner = active * up
            of_up = active.mul_(of_inner)
            of_gate = _act_backward(name, of_inner.mul_(up), gate)
        of_a_down, of_b_down = _lora_gradients(above, inner, low_down, low_above, s_down)
        of_x, of_a_gate, of_b_gate = _lora_backward(of_gate, rows, w_gate, a_gate, b_gate, low_gate, s_gate, context.needs_input_grad[0])
        other, of_a_up, of_b_up = _lora_backward(of_up, rows, w_up, a_up, b_up, low_up, s_up, context.needs_input_grad[0])
        of_x = None if of_x is None or other is None else of_x.add_(other).view(context.shape)
        return of_x, None, None, of_a_gate, of_b_gate, of_a_up, of_b_up, of_a_down, of_b_down


def _act(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _act_backward(name: str, above: Tensor, x: Tensor) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(above, x)
    return torch.ops.aten.gelu_backward(above, x, approximate="tanh" if name == "gelu_tanh" else "none")


class FusedMLP(nn.Module):
    """A gated MLP with the same children under the same names; where one of them is not plain any more, they are called one by one."""

    def __init__(self, module: Any, activation: str, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = module.gate_proj, module.up_proj, module.down_proj, module.act_fn
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        parts = [lora_parts(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj)]
        plain = [part for part in parts if part is not None and part[1] is None]
        if len(plain) < 3:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        kinds = (self.activation, tuple(part[0] for part in plain), tuple(part[4] for part in plain))
        return _GatedMLP.apply(x, kinds, self.kernels, *(tensor for part in plain for tensor in part[2:4]))


def _is_gated_mlp(module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    return children == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not isinstance(module, FusedMLP)


def _fused_mlp(module: Any, kernels: Kernels | None) -> FusedMLP | None:
    weight = getattr(module.gate_proj, "weight", None)
    if weight is None or not weight.is_floating_point():
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, weight.shape[1], generator=generator).to(weight)
    for activation in ("silu", "gelu_tanh", "gelu"):
        fused = FusedMLP(module, activation, kernels).train(module.training)
        # The activation in float32: exact and approximate GELU are one in bfloat16.
        if _same(module.act_fn, lambda x, name=activation: _act(name, x), probe.float()) and _same(module, fused, probe):
            return fused
    return None


def _same(a: Any, b: Any, probe: Tensor) -> bool:
    """In training mode, with the same random numbers: a dropout that only training has must not go unseen."""
    found: list[Tensor] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for one in (a, b):
            was = [(part, part.training) for part in one.modules()] if isinstance(one, nn.Module) else []
            torch.manual_seed(0)
            for part, _ in was:
                part.training = True
            try:
                found.append(one(probe).float())
            finally:
                for part, training in was:
                    part.training = training
    return same(found[0], found[1], probe.dtype)


def same(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two float32 results, computed in `dtype`, differ by no more than rounding."""
    return bool((found - expected).norm() <= _TOLERANCE.get(dtype, 0.0) * expected.norm().clamp_min(1e-30))
