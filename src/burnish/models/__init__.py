"""Weights and tokens. torch starts here.

in          a recipe's `model` section
out         a Chat (tokenizer + template) and a model; answers from `generate`
invariant   one function turns messages into tokens for training, evaluation and serving; nothing from a model's folder is ever run
"""

from burnish.models.attention import Segment, attend_by_segment
from burnish.models.chat import IGNORED, Chat, make_chat
from burnish.models.generate import Generation, Limits, generate
from burnish.models.load import (
    context_window,
    find_model,
    load_chat,
    load_model,
    resolve_device,
    resolve_dtype,
    tokenizer_hash,
    weights_hash,
)
from burnish.models.methods import ADAPTER_MANIFEST, LEARNING_RATES, METHODS, load_adapter, trainable_parameters, verify_adapter

__all__ = [
    "ADAPTER_MANIFEST", "IGNORED", "LEARNING_RATES", "METHODS", "Chat", "Generation", "Limits", "Segment", "attend_by_segment", "context_window", "find_model", "generate",
    "load_adapter", "load_chat", "load_model", "make_chat", "resolve_device", "resolve_dtype", "tokenizer_hash", "trainable_parameters",
    "verify_adapter", "weights_hash",
]  # fmt: skip
