"""A decoder layer's attention between its projections, by segments, in few passes over memory: for a CPU with compiled kernels.

    q, k, v = projections (LoRA and all)      (T, H, D), tokens first: no transpose is ever made
    q, k    = normed and turned by position   one kernel
    out     = softmax(q kᵀ · scale) v         for each block of queries two products and one kernel; on the way back five and one
    out     → output projection

The model's own attention module becomes a subclass of itself that goes this way where a call brings `segments`, and its own way elsewhere (generation,
a mask). Only classes whose forward pass was read are exchanged (KNOWN): what a family does to its queries at late positions, or to large numbers, or in
training only, no probe would show. How such a class calls attention (its scale, its window) is watched in a forward pass of the model itself, and a
module is exchanged only where the new way gives the same output for the same input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from burnish.models.attention import NOT_DONE, Block, Segment, blocks_of_row, watch_calls
from burnish.models.fused import FusedNorm, same
from burnish.models.kernels import Kernels

_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
# Projections, a norm of each head in some, rotary positions, attention, output projection, and nothing else (transformers 5.20 to 5.23).
KNOWN = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Gemma3Attention", "GraniteAttention"}


def fuse_attention(model: Any, kernels: Kernels, run: Callable[[], Any]) -> int:
    """Exchange the attention modules that can be. `run` calls the model on a few tokens, by segments. Returns how many are exchanged now.

    Call it after `fuse` (the norms of heads are looked for) and `attend_by_segment`.
    """
    candidates = [module for module in model.modules() if _has_the_parts(module) and not isinstance(module, _FusedAttention)]
    proved: list[nn.Module] = []

    def compare(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        call = calls.pop(module, None)
        if not isinstance(hidden, Tensor) or call is None or any(call.get(name) is not None for name in NOT_DONE):
            return
        module.burnish = (kernels, call["scaling"], call["sliding_window"])
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        if args[1:] or not _takes(module, hidden, rest):
            return
        found = _attend(module, hidden, rest["position_embeddings"], rest["segments"])
        if same(found.float(), output[0].float(), found.dtype):
            proved.append(module)

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in candidates]
    try:
        with watch_calls() as calls:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for module in candidates:
        if module not in proved:
            module.__dict__.pop("burnish", None)
    for module in dict.fromkeys(proved):
        module.__class__ = type(f"Fused{type(module).__name__}", (_FusedAttention, type(module)), {})
    return sum(isinstance(module, _FusedAttention) for module in model.modules())


class _FusedAttention:
    """What an attention module becomes: itself, unless a call brings segments and nothing that is not done here."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or not _takes(self, hidden_states, kwargs):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return _attend(self, hidden_states, kwargs["position_embeddings"], kwargs["segments"]), None


def _has_the_parts(module: Any) -> bool:
    if type(module).__name__ not in KNOWN or not type(module).__module__.startswith("transformers.models."):
        return False
    names = {name for name, _ in module.named_children()}
    if not names >= _PROJECTIONS or not names <= _PROJECTIONS | _NORMS or not isinstance(getattr(module, "head_dim", None), int):
        return False
    norms = [getattr(module, name) for name in sorted(_NORMS & names)]
    same_size = all(isinstance(norm, FusedNorm) and norm.weight.shape == (module.head_dim,) for norm in norms)
    return same_size and len(norms) in (0, 2) and module.head_dim % 2 == 0


def _takes(module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
    """A row with segments, without a cache; heads turned as a whole; norms that are not trained (their gradient is torch's to make)."""
    turns = kwargs.get("position_embeddings")
    if kwargs.get("segments") is None or kwargs.get("past_key_values") is not None or turns is None or hidden.shape[0] != 1:
        return False
    if any(turn.shape != (1, hidden.shape[1], module.head_dim) for turn in turns):
        return False
    norms = [getattr(module, name) for name in _NORMS if hasattr(module, name)]
    kernels: Kernels = module.burnish[0]
    return not any(norm.weight.requires_grad for norm in norms) and kernels.takes(hidden, *turns, *(norm.weight for norm in norms))


def _attend(module: Any, hidden: Tensor, turns: tuple[Tensor, Tensor], segments: tuple[Segment, ...]) -> Tensor:
    """(1, T, hidden) → (1, T, hidden)."""
    kernels, scale, window = module.burnish
    cos, sin = turns[0][0], turns[1][0]  # (T, D)
    query, key, value = (
        getattr(module, name)(hidden)[0].unflatten(-1, (-1, module.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
    )  # (T, H, D), (T, K, D), (T, K, D)
    query = _NormAndTurn.apply(query, cos, sin, getattr(module, "q_norm", None), kernels)
    key = _NormAndTurn.apply(key, cos, sin, getattr(module, "k_norm", None), kernels)
    output = _RowAttention.apply(query, key, value, segments, window, scale, kernels)
    result: Tensor = module.o_proj(output.flatten(1)[None])
    return result


class _NormAndTurn(torch.autograd.Function):
    """RMSNorm over each head (none: as it is), then rotary positions (RoFormer, arXiv 2104.09864) in the form of halves. x: (T, H, D)."""

    @staticmethod
    def forward(context: Any, x: Tensor, cos: Tensor, sin: Tensor, norm: FusedNorm | None, kernels: Kernels) -> Tensor:
        weight, epsilon, offset = (None, 0.0, 0.0) if norm is None else (norm.weight, norm.epsilon, norm.offset)
        output, scale = kernels.norm_and_turn(x, weight, epsilon, offset, cos, sin)
        context.save_for_backward(None if norm is None else x, cos, sin, scale)
        context.weight, context.offset, context.kernels = weight, offset, kernels
        return output

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, scale = context.saved_tensors
        above = outputs[0].contiguous()
        of_x = context.kernels.norm_and_turn_back(above, above if x is None else x, context.weight, context.offset, scale, cos, sin)
        return of_x, None, None, None, None


class _RowAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v by segments. query: (T, H, D), key and value: (T, K, D), H = K · G → (T, H, D).

    Probabilities are kept nowhere and made again on the way back (FlashAttention, arXiv 2205.14135). With one key head, a block of queries is the rows
    (token, head) of one plain product as they lie in memory.
    """

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], window: int | None, scale: float,
        kernels: Kernels,
    ) -> Tensor:  # fmt: skip
        length, heads, _ = query.shape
        output = torch.empty_like(query)
        log_sums = torch.empty(length * heads)  # in the order of the blocks, each (K, B, G)
        for block in blocks_of_row(segments, window):
            scores = torch.bmm(_by_key_head(query, block, key), _spans(key, block).transpose(1, 2))  # (K, B · G, S)
            kernels.softmax(scores, scale, _part(log_sums, block, heads), block.stop - block.start, block.first, window)
            _put(output, block, torch.bmm(scores, _spans(value, block)))
        context.save_for_backward(query, key, value, log_sums)
        context.segments, context.window, context.scale, context.kernels = segments, window, scale, kernels
        return output

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_sums = context.saved_tensors
        heads, slope = query.shape[1], outputs[0].contiguous()
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(key.shape) for _ in range(2))  # float32: several blocks add up
        for block in blocks_of_row(context.segments, context.window):
            tokens, sums = block.stop - block.start, _part(log_sums, block, heads)
            queries, above = _by_key_head(query, block, key), _by_key_head(slope, block, key)
            keys, values = _spans(key, block), _spans(value, block)
            shares, of_scores = torch.bmm(queries, keys.transpose(1, 2)), torch.bmm(above, values.transpose(1, 2))
            context.kernels.softmax_back(shares, of_scores, context.scale, sums, tokens, block.first, context.window)
            _put(of_query, block, torch.bmm(of_scores, keys))
            block.add(of_value.transpose(0, 1), torch.bmm(shares.transpose(1, 2), above))
            block.add(of_key.transpose(0, 1), torch.bmm(of_scores.transpose(1, 2), queries))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None, None


def _by_key_head(rows: Tensor, block: Block, key: Tensor) -> Tensor:
    """The block's part of (T, H, D) as (K, B · G, D): rows of one product for each key head."""
    part, key_heads = rows[block.start : block.stop], key.shape[1]
    return part.view(-1, key_heads, part.shape[1] // key_heads, part.shape[2]).transpose(0, 1).reshape(key_heads, -1, part.shape[2])


def _spans(rows: Tensor, block: Block) -> Tensor:
    """What the block looks at of (T, K, D): (K, S, D)."""
    return block.of(rows.transpose(0, 1))


def _put(rows: Tensor, block: Block, values: Tensor) -> None:
    """values: (K, B · G, D) into (T, H, D)."""
    part, key_heads = rows[block.start : block.stop], values.shape[0]
    part.view(-1, key_heads, part.shape[1] // key_heads, part.shape[2]).copy_(
        values.view(key_heads, part.shape[0], -1, part.shape[2]).transpose(0, 1)
    )


def _part(log_sums: Tensor, block: Block, heads: int) -> Tensor:
    return log_sums[block.start * heads : block.stop * heads]
