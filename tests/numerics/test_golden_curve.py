"""Thirty losses of a tiny model, stored: whatever changes them changed the training, on purpose or not.

To store them anew (say why in the commit): BURNISH_WRITE_GOLDEN=1 python -m pytest tests/numerics/test_golden_curve.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from burnish.data.formats import make_example
from burnish.models import METHODS, Chat
from burnish.recipe import build_recipe
from burnish.training import tokenize_all
from burnish.training.loop import run_loop
from burnish.training.progress import Hooks
from conftest import build_tiny, colour_rows

GOLDEN = Path(__file__).with_name("golden_curve.json")
# float32 sums in another order (threads, another CPU) differ by 1e-7; over 30 steps of AdamW that grows to about 1e-5.
TOLERANCE = 1e-3


def test_thirty_losses_are_those_that_were_stored(tokenizer: Any, chat: Chat) -> None:
    settings = {"learning_rate": 2e-2, "micro_batch_size": 4, "epochs": 100, "max_steps": 30, "weight_decay": 0.01, "warmup_fraction": 0.1}
    recipe = build_recipe({"model": "tiny", "data": "x.jsonl", "training": settings, "lora": {"rank": 4, "alpha": 8}})
    rows = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in colour_rows(48)]
    sequences = tokenize_all(chat, [make_example(messages, source="x") for messages in rows])
    model = METHODS["lora"](build_tiny("llama", tokenizer).requires_grad_(False), recipe)
    found: list[dict[str, Any]] = []
    run_loop(
        model, sequences[:40], sequences[40:], settings=recipe.training, seed=0, hooks=Hooks(log=found.append, keep_best=lambda *_: None)
    )
    curve = {
        "loss": [row["loss"] for row in found if "loss" in row],
        "gradient_norm": [row["gradient_norm"] for row in found if "loss" in row],
        "validation_loss": [row["validation_loss"] for row in found if "validation_loss" in row],
    }
    if os.environ.get("BURNISH_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(curve, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(curve["loss"]) == 30
    assert curve["loss"][-1] < 0.7 * curve["loss"][0], "a curve that learns"
    for name, values in golden.items():
        assert curve[name] == pytest.approx(values, rel=TOLERANCE), name
