"""Batched generation (greedy, or drawn), each request answered as if it were alone.

Requests are sorted by length and taken in batches. What all of them begin with (an instruction, fixed examples) is computed once and its
keys and values are shared. A finished request leaves its batch at once. Masks are built from positions, so padding changes nothing, not
even in layers with a sliding window; tests compare with transformers' own `generate`, one request at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from burnish.models.chat import Chat
from burnish.types import Tell, silent

# Fewer shared tokens than this are not worth a pass of their own.
_LEAST_SHARED = 16
_GROWTH_TOKENS = 64
# A batch of long requests has fewer of them: 32 requests of 551 tokens took 24.7 s in batches of 8,192 tokens, 35.6 s in batches of 24,576, and
# waited 8 s instead of 35 s (Gemma 3 270M, 2 cores): the activations of the larger batch are fresh memory every time.
_BATCH_TOKENS = 8_192


@dataclass(frozen=True, slots=True)
class Generation:
    text: str
    finish_reason: str  # stop: the stop token · stop_text: one of `Limits.stop_texts` · length
    prompt_tokens: int
    completion_tokens: int  # with the stop token, without what follows a stop text
    seconds: float  # from the start of the batch to this request's last token


@dataclass(frozen=True, slots=True)
class Limits:
    max_new_tokens: int
    stop_texts: tuple[str, ...] = ()  # an answer ends before any of these (not counting white space it begins with)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Draw answers instead of taking the likeliest token."""

    temperature: float  # above 0
    seeds: Sequence[int]  # one for each prompt: a draw does not depend on what else is in its batch


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that grows by blocks: appending a token copies that token, not the whole past."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if self.length == 0:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        if self.length + new > self.keys.shape[-2]:
            self.keys, self.values = (self._grown(old, fresh) for old, fresh in ((self.keys, key_states), (self.values, value_states)))
        self.keys[..., self.length : self.length + new, :] = key_states
        self.values[..., self.length : self.length + new, :] = value_states
        self.length += new
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def _grown(self, old: Tensor, fresh: Tensor) -> Tensor:
        capacity = self.length + fresh.shape[-2] + _GROWTH_TOKENS
        grown = fresh.new_empty((*fresh.shape[:-2], capacity, fresh.shape[-1]))  # (B, H_kv, capacity, D)
        grown[..., : self.length, :] = old[..., : self.length, :]
        return grown

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def generate(
    model: Any, chat: Chat, prompts: Sequence[Sequence[int]], limits: Limits, *, batch_size: int = 32, tell: Tell = silent,
    sampling: Sampling | None = None,
) -> Iterator[list[tuple[int, Generation]]]:  # fmt: skip
    """Yield, batch by batch, (index into `prompts`, answer). Greedy unless `sampling`; deterministic for a given batch size."""
    masks = _Masks(model.config)
    shared, batches = layout(model.config, prompts, limits, batch_size=batch_size)
    shared_cache = None
    done = 0
    tell("generating", 0, len(prompts), "")
    for batch in batches:
        with torch.inference_mode():
            started = time.perf_counter()  # the first batch waits for what all share, too
            if shared and shared_cache is None:
                shared_cache = _prefill_shared(model, masks, list(prompts[batch[0]][:shared]))
            pick = _greedy if sampling is None else _Draw(sampling.temperature, [sampling.seeds[i] for i in batch])
            rows = [list(prompts[i][shared:]) for i in batch]
            answers = _generate_batch(model, chat, rows, limits, masks, shared_cache, shared, started, pick)
        done += len(batch)
        tell("generating", done, len(prompts), "")
        yield list(zip(batch, answers, strict=True))


def layout(config: Any, prompts: Sequence[Sequence[int]], limits: Limits, *, batch_size: int) -> tuple[int, list[list[int]]]:
    """How `generate` goes about these prompts: (tokens that all begin with and that are computed once, indices of each batch)."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    shared = _common_prefix(prompts) if _Masks(config).by_position else 0
    return (shared if shared >= _LEAST_SHARED else 0), list(_batches(order, prompts, limits, batch_size))


def _greedy(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits.argmax(-1)


class _Draw:
    """Draws from softmax(logits / temperature) by the race of exponentials (Gumbel-max): each row has random numbers of its own."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """logits: (B, V) of the batch's rows `rows` → tokens (B,)."""
        noise = torch.stack([torch.empty(logits.shape[-1]).exponential_(generator=self.generators[row]) for row in rows])
        return (logits.float() / self.temperature - noise.to(logits.device).log()).argmax(-1)


class _Masks:
    """Attention masks from positions. Models whose layers are of a kind we do not know get transformers' own masks and no sharing."""

    def __init__(self, config: Any) -> None:
        config = config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.named = kinds is not None  # the model takes one mask per kind of layer, by name
        self.layers = int(config.num_hidden_layers)
        self.windows: dict[str, int | None] = {}
        for kind in dict.fromkeys(kinds or ["full_attention" if window is None else "sliding_attention"]):
            self.windows[kind] = window if kind == "sliding_attention" else None
        self.by_position = set(self.windows) <= {"full_attention", "sliding_attention"} and not getattr(config, "num_kv_shared_layers", 0)

    def build(self, query: Tensor, key: Tensor) -> Any:
        """query: (B, T) positions, key: (B, S) positions with -1 where there is padding → masks (B, 1, T, S), True = may look."""
        distance = query[:, None, :, None] - key[:, None, None, :]
        causal = (distance >= 0) & (key >= 0)[:, None, None, :]
        # A padding query looks at everything, so that its softmax is finite; nothing ever looks at it.
        causal |= (query < 0)[:, None, :, None]
        masks = {
            kind: causal if window is None else causal & ((distance < window) | (query < 0)[:, None, :, None])
            for kind, window in self.windows.items()
        }
        return masks if self.named else next(iter(masks.values()))

    def cache(self) -> Cache:
        return Cache(layers=[_GrowingLayer() for _ in range(self.layers)])


def _batches(order: list[int], prompts: Sequence[Sequence[int]], limits: Limits, batch_size: int) -> Iterator[list[int]]:
    """At most `batch_size` requests, of at most _BATCH_TOKENS together, each as long as the longest; `order` goes from short to long."""
    batch: list[int] = []
    for index in order:
        longest = len(prompts[index]) + limits.max_new_tokens
        if batch and (len(batch) == batch_size or (len(batch) + 1) * longest > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share; at least one token of each is left over."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(list, prompts)), max(map(list, prompts))  # what the extremes of an ordering share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(shared, min(map(len, prompts)) - 1)


def _prefill_shared(model: Any, masks: _Masks, prefix: list[int]) -> Cache:
    cache = masks.cache()
    ids = torch.tensor([prefix], device=model.device)  # (1, P)
    positions = torch.arange(len(prefix), device=model.device)[None]
    model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=masks.build(positions, positions),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return cache


def _repeated(shared: Cache, masks: _Masks, rows: int) -> Cache:
    cache = masks.cache()
    for layer, source in zip(cache.layers, shared.layers, strict=True):
        layer.update(
            source.keys[..., : source.length, :].expand(rows, -1, -1, -1), source.values[..., : source.length, :].expand(rows, -1, -1, -1)
        )
    return cache


def _generate_batch(
    model: Any, chat: Chat, prompts: list[list[int]], limits: Limits, masks: _Masks, shared: Cache | None, skip: int, started: float,
    pick: Callable[[Tensor, Sequence[int]], Tensor],
) -> list[Generation]:  # fmt: skip
    """Prompts without their shared first `skip` tokens → answers, in order."""
    rows, width, device = len(prompts), max(map(len, prompts)), model.device
    ids = torch.full((rows, width), chat.stop_ids[-1], device=device)  # (B, T), padded on the left
    positions = torch.full((rows, width), -1, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        positions[row, width - len(prompt) :] = torch.arange(skip, skip + len(prompt), device=device)
    prefix = torch.arange(skip, device=device).expand(rows, -1)
    key_positions = torch.cat([prefix, positions], dim=1)  # (B, S)
    cache = (
        _repeated(shared, masks, rows) if shared is not None else masks.cache() if masks.by_position else DynamicCache(config=model.config)
    )
    written: list[list[int]] = [[] for _ in range(rows)]
    result: list[Generation | None] = [None] * rows
    active = list(range(rows))
    step_ids, step_positions = ids, positions
    for _ in range(limits.max_new_tokens):
        mask = masks.build(step_positions, key_positions) if masks.by_position else (key_positions >= 0).long()
        # The last place as an index, not as the number 1: a slice reaches the head strided, and torch 2.13 then copies the head's
        # whole matrix once per row (0.3 GB each).
        last = torch.tensor([step_ids.shape[1] - 1], device=device)
        output = model(
            input_ids=step_ids,
            position_ids=step_positions.clamp(min=0),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        tokens = pick(output.logits[:, -1], active)  # (B,)
        going = []
        for place, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            written[row].append(token)
            reason = _finished(chat, written[row], limits)
            if reason is None:
                going.append(place)
            else:
                tokens_in = skip + len(prompts[row])
                result[row] = Generation(
                    _text(chat, written[row], limits), reason, tokens_in, len(written[row]), time.perf_counter() - started
                )
        if not going:
            break
        if len(going) < len(active):
            keep = torch.tensor(going, device=device)
            _select(cache, keep)
            tokens, step_positions, key_positions = tokens[keep], step_positions[keep], key_positions[keep]
            active = [active[place] for place in going]
        step_ids, step_positions = tokens[:, None], step_positions[:, -1:] + 1
        key_positions = torch.cat([key_positions, step_positions], dim=1)
    return [answer for answer in result if answer is not None]


def _select(cache: Cache, keep: Tensor) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[keep], layer.values[keep]


def _finished(chat: Chat, written: list[int], limits: Limits) -> str | None:
    if written[-1] in chat.stop_ids:
        return "stop"
    if limits.stop_texts and _cut(chat.decode(written).lstrip(), limits) is not None:
        return "stop_text"
    return "length" if len(written) >= limits.max_new_tokens else None


def _text(chat: Chat, written: list[int], limits: Limits) -> str:
    return end_at_stop(chat.decode(written), limits)


def end_at_stop(text: str, limits: Limits) -> str:
    """An answer as it ends before the first of the stop texts."""
    text = text.strip()
    cut = _cut(text, limits)
    return (text if cut is None else text[:cut]).strip()


def _cut(text: str, limits: Limits) -> int | None:
    """Where the first stop text begins, after at least one character of an answer."""
    # An answer in a Markdown fence ends where the fence is closed; its first line is not the answer.
    start = 1
    if text.startswith("```"):
        closed = text.find("```", 3)
        if closed < 0:
            return None
        start = closed + 3
    places = [place for stop in limits.stop_texts if (place := text.find(stop, start)) >= 0]
    return min(places) if places else None
