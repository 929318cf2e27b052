"""How likely a model finds a text: Σ −log p over its target tokens, in nats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.models.chat import IGNORED
from burnish.types import Tokens

_BLOCK_LOGITS = 64 * 262_144  # the head's rows at once: 67 MB in float32, whatever the vocabulary


def negative_log_likelihood(model: Any, sequences: Sequence[Tokens]) -> float:
    """Σ nats over the target tokens of all sequences, each computed alone. No gradients."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    total = 0.0
    with torch.inference_mode():
        for sequence in sequences:
            ids = torch.tensor([sequence.input_ids], device=model.device)  # (1, T)
            targets = torch.tensor(sequence.labels[1:], device=model.device)  # (T − 1,)
            places = (targets != IGNORED).nonzero()[:, 0]
            for rows, logits in _logits(causal, ids, places):
                total += float(F.cross_entropy(logits.float(), targets[rows], reduction="sum").double())
    return total


def _logits(causal: Any, ids: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(places, logits (n, V)) in blocks. A model that does more after its head than a soft cap computes all of them itself."""
    head, config = causal.get_output_embeddings(), causal.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    if head is None or scaled:
        yield places, causal(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        return
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]  # (T, D)
    cap = getattr(config, "final_logit_softcapping", None)
    for rows in places.split(max(1, _BLOCK_LOGITS // config.vocab_size)):
        logits = head(hidden[rows])
        yield rows, logits if cap is None else torch.tanh(logits / cap) * cap
