"""Writes a tiny model as a .gguf file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import build_tiny, tiny_config


def write_gguf(folder: Path, tokenizer: Any, left_out: str = "") -> Path:
    """The wide tiny Llama in 4-bit blocks (Q4_0, one layer's values in Q8_0), with its tokenizer beside it, as llama.cpp's converter leaves it."""
    gguf = pytest.importorskip("gguf", reason="needs the extra `quantized`")
    tokenizer.save_pretrained(folder)
    config, model = tiny_config("llama", len(tokenizer), hidden=64), build_tiny("llama", tokenizer, hidden=64)
    writer = gguf.GGUFWriter(folder / "tiny.Q4_0.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    writer.add_token_list([f"word {n}" for n in range(len(tokenizer))])
    writer.add_token_scores([0.0] * len(tokenizer))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        parts = name.removeprefix("model.layers.").split(".", 1)
        target = whole.get(name) or f"blk.{parts[0]}.{names[parts[1].removesuffix('.weight')]}.weight"
        if heads := {"attn_q": 8, "attn_k": 4}.get(target.split(".")[-2]):  # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, 64).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType.Q4_0 if "_proj" in name else gguf.GGMLQuantizationType.F32
        kind = gguf.GGMLQuantizationType.Q8_0 if target == "blk.1.attn_v.weight" else kind
        if target != left_out:
            writer.add_tensor(target, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
