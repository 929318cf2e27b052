"""Models whose attention does more than a probe of a few tokens shows: the loss by default equals the plain one, on rows longer than any probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from burnish.models import fuse_attention
from burnish.recipe import build_recipe
from burnish.training.engine import make_ready
from burnish.training.loss import summed_loss
from burnish.training.pack import Paths, flatten
from burnish.types import Tokens

WORDS, LENGTH = 120, 200
SHARED = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
# What is odd about each: positions scale the queries; queries are clipped; a window that only the mask knows; dropout that only training has.
ODD: dict[str, dict[str, Any]] = {
    "Ministral3": {
        "head_dim": 8, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.5,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "max_position_embeddings": 512,
        },
    },
    "Olmo": {"clip_qkv": 0.6},
    "Qwen2Moe": {
        "use_sliding_window": True, "sliding_window": 48, "layer_types": ["sliding_attention"] * 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Phimoe": {"sliding_window": 48, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Starcoder2": {"residual_dropout": 0.3, "sliding_window": None},
}  # fmt: skip


def odd_model(family: str) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SHARED, **ODD[family])
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.float().eval()


def loss_of(model: Any, rows: list[Tokens], paths: Paths) -> float:
    with torch.no_grad():
        return sum(float(summed_loss(model, flatten([row], paths))) for row in rows)


@pytest.mark.parametrize("family", ODD)
def test_the_loss_is_the_plain_one(family: str) -> None:
    rows = [Tokens(ids, ids) for ids in torch.randint(3, WORDS, (2, LENGTH)).tolist()]
    plain = loss_of(odd_model(family), rows, Paths(blocked=False))
    model = odd_model(family)
    paths = make_ready(
        model, [Tokens(row.input_ids[:40], row.input_ids[:40]) for row in rows], build_recipe({"model": "m", "data": "d"}), steps=3
    )
    assert loss_of(model, rows, paths) == pytest.approx(plain, rel=1e-4)


def test_dropout_in_training_stays() -> None:
    rows = [Tokens(ids, ids) for ids in torch.randint(3, WORDS, (2, 40)).tolist()]
    model = odd_model("Starcoder2")
    paths = make_ready(model, rows, build_recipe({"model": "m", "data": "d"}), steps=3)
    model.train()
    assert loss_of(model, rows, paths) != loss_of(model, rows, paths), "random numbers differ from call to call"


def test_only_attention_that_was_read_is_exchanged() -> None:
    from burnish.models.kernels import find_kernels

    assert fuse_attention(odd_model("Olmo"), find_kernels(), lambda: None) == 0
