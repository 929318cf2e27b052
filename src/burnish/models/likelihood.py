"""How likely a model finds a text: Σ −log p over its target tokens, in nats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.models.chat import IGNORED, Chat
from burnish.types import Tokens

_BLOCK_LOGITS = 64 * 262_144  # the head's rows at once: 67 MB in float32, whatever the vocabulary
_BATCH_TOKENS = 2_048  # of short texts that are scored together


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a model takes a text that follows a context."""

    nats: float  # −log p(continuation | context)
    tokens: int
    greedy: bool  # whether each of its tokens is the likeliest in its place: what greedy generation would write


def negative_log_likelihood(model: Any, sequences: Sequence[Tokens]) -> float:
    """Σ nats over the target tokens of all sequences, each computed alone. No gradients."""
    causal = _causal(model)
    total = 0.0
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([sequence.input_ids], device=model.device)  # (1, T)
            targets = torch.tensor(sequence.labels[1:], device=model.device)  # (T − 1,)
            places = (targets != IGNORED).nonzero()[:, 0]
            for rows, logits in _logits(causal, ids, places):
                total += float(F.cross_entropy(logits.float(), targets[rows], reduction="sum").double())
    return total


def continuation_tokens(chat: Chat, context: str, continuation: str, window: int) -> Tokens:
    """Plain text, no template: <bos> context continuation, of which the continuation's tokens are targets.

    Where a token lies across the border, it belongs to the continuation. A context that is too long for `window` tokens loses its beginning.
    Raises ValueError where the continuation alone is.
    """
    ids, before = chat.text_ids(context + continuation), chat.text_ids(context)
    shared = next((at for at, (one, other) in enumerate(zip(ids, before, strict=False)) if one != other), min(len(ids), len(before)))
    shared = max(shared, 1)  # a first token has nothing before it
    targets = len(ids) - shared
    if not 0 < targets < window:
        raise ValueError(f"{targets} tokens to be scored; a context and they must fit into {window}")
    cut = max(0, len(ids) - window)
    kept = ids if cut == 0 else [ids[0], *ids[cut + 1 :]]
    return Tokens(kept, [IGNORED] * (len(kept) - targets) + kept[-targets:])


def score_continuations(model: Any, sequences: Sequence[Tokens]) -> list[Continuation]:
    """One for each sequence, in order. Short ones are computed together, padded at their ends, which nothing before can see. No gradients."""
    causal = _causal(model)
    found: dict[int, Continuation] = {}
    with torch.inference_mode():
        for batch in _batches(sequences, alone=_scaled(causal)):
            width = max(len(sequences[index].input_ids) for index in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T)
            labels = torch.full((len(batch), width), IGNORED)
            for row, index in enumerate(batch):
                ids[row, : len(sequences[index].input_ids)] = torch.tensor(sequences[index].input_ids)
                labels[row, : len(sequences[index].labels)] = torch.tensor(sequences[index].labels)
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten().to(model.device)  # (B·T,), of the token that follows
            places = (targets != IGNORED).nonzero()[:, 0]
            nats = torch.zeros(len(batch), dtype=torch.float64)
            greedy = torch.ones(len(batch), dtype=torch.bool)
            for rows, logits in _logits(causal, ids.to(model.device), places):
                owner = (rows // width).cpu()
                nats.index_add_(0, owner, F.cross_entropy(logits.float(), targets[rows], reduction="none").double().cpu())
                wrong = (logits.argmax(-1) != targets[rows]).cpu()
                greedy[owner[wrong]] = False
            for row, index in enumerate(batch):
                found[index] = Continuation(float(nats[row]), sequences[index].target_tokens, bool(greedy[row]))
    return [found[index] for index in range(len(sequences))]


def _batches(sequences: Sequence[Tokens], *, alone: bool) -> Iterator[list[int]]:
    """Indices of sequences of like length, `_BATCH_TOKENS` together with their padding."""
    batch: list[int] = []
    for index in sorted(range(len(sequences)), key=lambda index: (len(sequences[index].input_ids), index)):
        if batch and (alone or (len(batch) + 1) * len(sequences[index].input_ids) > _BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _scaled(causal: Any) -> bool:
    """Whether the model does more after its head than a soft cap, or has no head that can be called: it must compute its logits itself."""
    config = causal.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    return causal.get_output_embeddings() is None or scaled


def _logits(causal: Any, ids: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(places, logits (n, V)) in blocks; `places` count through the (B, T) tokens row by row. B is 1 where the model computes its logits itself."""
    config = causal.config.get_text_config()
    if _scaled(causal):
        yield places, causal(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        return
    head = causal.get_output_embeddings()
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)  # (B·T, D)
    cap = getattr(config, "final_logit_softcapping", None)
    for rows in places.split(max(1, _BLOCK_LOGITS // config.vocab_size)):
        logits = head(hidden[rows])
        yield rows, logits if cap is None else torch.tanh(logits / cap) * cap
