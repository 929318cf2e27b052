"""Attention by segments, through transformers' attention interface: every packed sequence for itself, common beginnings shared.

A row of T tokens holds segments (see training/pack.py). A token looks at the tokens of its own segment up to itself and at all tokens of the
segments that its own branched off; in layers with a sliding window, only at those less than a window of positions away. Work grows with the sum
of squares of sequence lengths, not with the square of the row, and no mask of the row is ever built.

On a CPU, each segment's scores are plain products over blocks of queries, kept nowhere and made again on the way back (the method of
FlashAttention, arXiv 2205.14135). On a GPU, flex attention gets the same rule as a block mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_SEGMENT = "burnish_segments"
_QUERY_BLOCK = 256  # tokens; scores of 256 queries × 4 heads × 512 keys are 2 MB
# What an attention may be asked for that the functions below do not do.
NOT_DONE = ("softcap", "s_aux", "position_bias", "sinks")


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start … stop − 1 of a row, at positions first, first + 1, … of their sequences; `parents` are the segments they branched off."""

    start: int
    stop: int
    first: int
    parents: tuple[int, ...] = ()


def attend_by_segment(model: Any) -> bool:
    """Let the model's attention follow `segments=…` where a call gives them; without them it stays SDPA. False where the model will not."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", False):
        return False
    try:
        model.set_attn_implementation(BY_SEGMENT)
    except (ValueError, AttributeError, TypeError):
        return False
    return True


def _forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, segments: tuple[Segment, ...] | None = None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query (1, H, T, D), key and value (1, H_kv, T, D) → (1, T, H, D)."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
    if asked := [name for name in NOT_DONE if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention by segments does not do {', '.join(asked)}: set engine.document_attention: false")
    if dropout:
        raise NotImplementedError("attention by segments has no dropout: set engine.document_attention: false")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if _watched is not None:
        _watched[module] = {**kwargs, "scaling": scale, "sliding_window": sliding_window}
    if query.is_cuda:
        return _flex(query, key, value, segments, sliding_window, scale).transpose(1, 2), None
    return _SegmentAttention.apply(query, key, value, segments, sliding_window, scale), None


_watched: dict[Any, dict[str, Any]] | None = None


@contextmanager
def watch_calls() -> Iterator[dict[Any, dict[str, Any]]]:
    """Keep, for each attention module, what it asked of attention by segments in its last call: `scaling`, `sliding_window` and the rest."""
    global _watched
    _watched = {}
    try:
        yield _watched
    finally:
        _watched = None


def windows_reach(config: Any, calls: dict[Any, dict[str, Any]]) -> bool:
    """Whether every sliding window of the config came with the calls of attention. Some families put it into their mask alone, which segments
    do not look at; layers of another kind (chunks, linear attention) are not for segments either."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(calls)
    if not set(kinds) <= {"full_attention", "sliding_attention"} or len(kinds) != len(calls):
        return False
    asked = [call["sliding_window"] for call in calls.values()]
    return sum(one is not None for one in asked) == kinds.count("sliding_attention") and all(one in (None, window) for one in asked)


AttentionInterface.register(BY_SEGMENT, _forward)
AttentionMaskInterface.register(BY_SEGMENT, sdpa_mask)


class _SegmentAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v by segments, grouped queries (H a multiple of H_kv) as rows of one product for each key head."""

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], window: int | None, scale: float
    ) -> Tensor:
        heads, length, size = query.shape[1:]
        key_heads = key.shape[1]
        q = query[0].reshape(key_heads, heads // key_heads, length, size)  # (K, G, T, D)
        k, v = key[0], value[0]  # (K, T, D)
        output = query.new_empty(1, length, heads, size)
        result = output[0].view(length, key_heads, heads // key_heads, size).permute(1, 2, 0, 3)  # the same shape as q
        log_sums = torch.empty(key_heads, heads // key_heads, length, dtype=torch.float32, device=query.device)
        for block in blocks_of_row(segments, window):
            queries = q[:, :, block.start : block.stop].reshape(key_heads, -1, size)  # (K, G·B, D)
            scores = torch.bmm(queries, block.of(k).transpose(1, 2)).float().mul_(scale)  # (K, G·B, S)
            block.hide(scores)
            sums = torch.logsumexp(scores, -1, keepdim=True)
            weights = scores.sub_(sums).exp_().to(v.dtype)
            shape = (key_heads, -1, block.stop - block.start)
            result[:, :, block.start : block.stop] = torch.bmm(weights, block.of(v)).view(*shape, size)
            log_sums[:, :, block.start : block.stop] = sums.view(*shape)
        context.save_for_backward(query, key, value, output, log_sums)
        context.segments, context.window, context.scale = segments, window, scale
        return output

    @staticmethod
    def backward(context: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = context.saved_tensors
        heads, length, size = query.shape[1:]
        key_heads = key.shape[1]
        grouped = (key_heads, heads // key_heads, length, size)
        q, k, v = query[0].reshape(grouped), key[0], value[0]
        slope = outputs[0][0].view(length, key_heads, heads // key_heads, size).permute(1, 2, 0, 3)
        answer = output[0].view(length, key_heads, heads // key_heads, size).permute(1, 2, 0, 3)
        of_q = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        of_q_grouped = of_q[0].view(grouped)
        of_k, of_v = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        for block in blocks_of_row(context.segments, context.window):
            here = slice(block.start, block.stop)
            queries, above = q[:, :, here].reshape(key_heads, -1, size), slope[:, :, here].reshape(key_heads, -1, size)
            keys, values = block.of(k), block.of(v)
            scores = torch.bmm(queries, keys.transpose(1, 2)).float().mul_(context.scale)
            block.hide(scores)
            weights = scores.sub_(log_sums[:, :, here].reshape(key_heads, -1, 1)).exp_()  # (K, G·B, S)
            block.add(of_v, torch.bmm(weights.to(above.dtype).transpose(1, 2), above))
            inner = (above.float() * answer[:, :, here].reshape(key_heads, -1, size).float()).sum(-1, keepdim=True)
            of_scores = torch.bmm(above, values.transpose(1, 2)).float().sub_(inner).mul_(weights).mul_(context.scale).to(q.dtype)
            of_q_grouped[:, :, here] = torch.bmm(of_scores, keys).view(key_heads, -1, block.stop - block.start, size)
            block.add(of_k, torch.bmm(of_scores.transpose(1, 2), queries))
        return of_q, of_k.to(key.dtype)[None], of_v.to(value.dtype)[None], None, None, None


@dataclass(frozen=True, slots=True)
class Block:
    """Queries start … stop − 1 of a segment and the spans of the row that they look at, the last of which ends with them."""

    start: int
    stop: int
    first: int  # how many of the keys lie before the first query: query i's own key is number first + i
    spans: tuple[tuple[int, int], ...]
    hidden: Tensor | None  # (B, S) True where a query must not look; None: only the future of the block itself is hidden

    def of(self, rows: Tensor) -> Tensor:
        """(K, T, D) → (K, S, D)."""
        if len(self.spans) == 1:
            return rows[:, self.spans[0][0] : self.spans[0][1]]
        return torch.cat([rows[:, start:stop] for start, stop in self.spans], 1)

    def add(self, rows: Tensor, change: Tensor) -> None:
        done = 0
        for start, stop in self.spans:
            rows[:, start:stop] += change[:, done : done + stop - start]
            done += stop - start

    def hide(self, scores: Tensor) -> None:
        """scores: (K, G·B, S), in place."""
        if self.hidden is None:
            return
        queries = self.stop - self.start
        scores.view(scores.shape[0], -1, queries, scores.shape[-1]).masked_fill_(self.hidden.to(scores.device), -torch.inf)


@lru_cache(maxsize=8)
def blocks_of_row(segments: tuple[Segment, ...], window: int | None) -> tuple[Block, ...]:
    """The blocks of a row; the same for every layer with the same window."""
    return tuple(block for segment in segments for block in _blocks_of(segment, segments, window))


def _blocks_of(segment: Segment, segments: tuple[Segment, ...], window: int | None) -> Iterator[Block]:
    for start in range(segment.start, segment.stop, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, segment.stop)
        first = segment.first + start - segment.start  # position of the first query
        lowest = 0 if window is None else max(0, first - window + 1)  # position of the first key that any query sees
        spans: list[tuple[int, int]] = []
        positions: list[Tensor] = []
        for part in (*(segments[parent] for parent in segment.parents), Segment(segment.start, stop, segment.first)):
            begin = part.start + max(0, lowest - part.first)
            if begin < part.stop:
                spans.append((begin, part.stop))
                positions.append(torch.arange(part.first + begin - part.start, part.first + part.stop - part.start))
        keys = torch.cat(positions)
        distance = torch.arange(first, first + stop - start)[:, None] - keys[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        yield Block(start, stop, len(keys) - (stop - start), tuple(spans), hidden if bool(hidden.any()) else None)


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: tuple[Segment, ...], window: int | None, scale: float) -> Tensor:
    """The same by torch's flex attention: (1, H, T, D)."""
    from torch.nn.attention.flex_attention import flex_attention

    call = _compiled_flex() if query.is_cuda else flex_attention
    mask = _flex_mask(segments, window, query.device)
    return call(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


@lru_cache(maxsize=8)
def _flex_mask(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    length = max(segment.stop for segment in segments)
    owner, position = (torch.empty(length, dtype=torch.long, device=device) for _ in range(2))
    sees = torch.eye(len(segments), dtype=torch.bool, device=device)  # (segment of the query, segment of the key)
    for number, segment in enumerate(segments):
        owner[segment.start : segment.stop] = number
        position[segment.start : segment.stop] = torch.arange(segment.first, segment.first + segment.stop - segment.start, device=device)
        sees[number, list(segment.parents)] = True

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        seen = sees[owner[query], owner[key]] & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    return create_block_mask(rule, None, None, length, length, device=device)
