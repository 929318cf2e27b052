"""Weights and tokens. torch starts here.

in          a recipe's `model` section
out         a Chat (tokenizer + template) and a model; answers from `generate`
invariant   one function turns messages into tokens for training, evaluation and serving; nothing from a model's folder is ever run
"""

import burnish.models.quiet  # noqa: F401 - before anything that speaks when it is imported
from burnish.models.attention import Segment, attend_by_segment, watch_calls, windows_reach
from burnish.models.chat import IGNORED, Chat, make_chat, tokens_of
from burnish.models.embed import can_embed, embed
from burnish.models.facts import licence_of, weights_bytes
from burnish.models.fused import fuse
from burnish.models.fused_attention import fuse_attention
from burnish.models.generate import Generation, Limits, Sampling, end_at_stop, generate, layout
from burnish.models.int8 import pack_base
from burnish.models.kernels import Kernels, NoKernels, find_kernels
from burnish.models.layers import choose_layers, decoder_layers
from burnish.models.likelihood import Continuation, continuation_tokens, negative_log_likelihood, score_continuations
from burnish.models.load import (
    base_state,
    context_window,
    find_model,
    layer_count,
    load_base,
    load_chat,
    load_model,
    quantizer_for,
    resolve_device,
    resolve_dtype,
    tokenizer_hash,
    weights_hash,
)
from burnish.models.merge import Merged, merge_adapter
from burnish.models.methods import LEARNING_RATES, METHODS, trainable_parameters
from burnish.models.quantize import QUANTIZERS, is_quantized, quantizer_facts
from burnish.models.save import ADAPTER_MANIFEST, load_adapter, load_trained, save_trained, trained_hash, verify_adapter
from burnish.models.scale import Published, Scaled, publish_scaled

__all__ = [
    "ADAPTER_MANIFEST", "IGNORED", "LEARNING_RATES", "METHODS", "QUANTIZERS", "Chat", "Continuation", "Generation", "Kernels", "Limits",
    "Merged", "NoKernels", "Published", "Sampling", "Scaled", "Segment", "attend_by_segment", "base_state", "can_embed", "choose_layers",
    "context_window", "continuation_tokens", "decoder_layers", "embed", "end_at_stop", "find_kernels", "find_model", "fuse",
    "fuse_attention", "generate", "is_quantized", "layer_count", "layout", "licence_of", "load_adapter", "load_base", "load_chat",
    "load_model", "load_trained", "make_chat", "merge_adapter", "negative_log_likelihood", "pack_base", "publish_scaled",
    "quantizer_facts", "quantizer_for", "resolve_device", "resolve_dtype", "save_trained", "score_continuations", "tokenizer_hash",
    "tokens_of", "trainable_parameters", "trained_hash", "verify_adapter", "watch_calls", "weights_bytes", "weights_hash",
    "windows_reach",
]  # fmt: skip
