"""Makes a case: GSM8K rows as Burnish's own `prepare` and template see them, the order of the batches, and a fresh adapter.

Runs in Burnish's environment, before anything is timed. Everyone trains on these token ids in these batches, from these weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from burnish import pipeline
from burnish.models import METHODS, Chat, find_model, load_chat, load_model
from burnish.recipe import Recipe, load_recipe
from burnish.run import Run
from burnish.training import tokenize_all
from burnish.training.pack import epoch_order

TRAIN_ROWS, HELD_OUT_ROWS, TEST_ROWS, BATCH = 256, 64, 16, 8
CASES = ("plain", "prefix")
SYSTEM_PROMPT = Path(__file__).with_name("system_prompt.txt")
# The settings of every contestant. One epoch of the 256 rows is 32 steps; validation once, at the end, so that the last weights are kept.
TRAINING = {
    "method": "lora", "learning_rate": 2e-4, "schedule": "constant", "warmup_fraction": 0.0, "epochs": 1, "micro_batch_size": BATCH,
    "gradient_accumulation_steps": 1, "weight_decay": 0.0, "max_gradient_norm": 1.0, "validations_per_epoch": 1,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--shuffled", action="store_true", help="batches of any lengths together, in place of like lengths")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    recipe_file = write_recipe(asked.case, asked.data, asked.folder, length_buckets=not asked.shuffled)
    recipe = load_recipe(recipe_file)
    chat = load_chat(recipe.model)
    dataset = pipeline.prepare(Run.create(asked.folder / "prepared", recipe, fresh=True), chat=chat)
    train, held_out = as_rows(chat, dataset.train), as_rows(chat, dataset.validation)
    if (len(train), len(held_out)) != (TRAIN_ROWS, HELD_OUT_ROWS):
        raise SystemExit(f"`prepare` kept {len(train)} and {len(held_out)} rows, expected {TRAIN_ROWS} and {HELD_OUT_ROWS}: other data?")
    order = epoch_order([len(row["input_ids"]) for row in train], seed=recipe.seed, epoch=0, batch=BATCH, buckets=not asked.shuffled)
    case = {
        "case": asked.case,
        "recipe": str(recipe_file),
        "model": find_model(recipe.model.name),
        "adapter": save_fresh_adapter(recipe, asked.folder / "adapter"),
        "train": train,
        "held_out": held_out,
        "batches": [order[start : start + BATCH] for start in range(0, len(order), BATCH)],
        "shared_prefix_tokens": shared_prefix(train),
    }
    (asked.folder / "case.json").write_text(json.dumps(case), encoding="utf-8")


def write_recipe(case: str, data: Path, folder: Path, *, length_buckets: bool) -> Path:
    """Three files cut from the head of GSM8K's training rows, and the recipe that a user would write for them."""
    lines = data.read_text(encoding="utf-8").splitlines()
    start = 0
    for split, count in (("train", TRAIN_ROWS), ("validation", HELD_OUT_ROWS), ("test", TEST_ROWS)):
        (folder / f"{split}.jsonl").write_text("\n".join(lines[start : start + count]) + "\n", encoding="utf-8")
        start += count
    content: dict[str, Any] = {
        "name": f"speed-{case}",
        "model": {"name": "gemma-3-270m", "chat_template": "plain"},
        "data": {
            **{split: f"{split}.jsonl" for split in ("train", "validation", "test")},
            "prompt_column": "question", "completion_column": "answer", "max_length": 2048,
            "overlap_ngram": 0,  # all 256 rows, though some of their questions look alike
        },
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
        "training": TRAINING, "engine": {"length_buckets": length_buckets},
    }  # fmt: skip
    if case == "prefix":
        content["data"]["system"] = SYSTEM_PROMPT.read_text(encoding="utf-8").strip()
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def as_rows(chat: Chat, examples: Any) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(tokens.input_ids), "labels": list(tokens.labels)} for tokens in tokenize_all(chat, examples)]


def save_fresh_adapter(recipe: Recipe, folder: Path) -> str:
    """The adapter that Burnish starts from (PEFT, seeded by the recipe), so that everyone else starts from it too."""
    base = load_model(recipe.model.model_copy(update={"dtype": "float32"}))
    model = METHODS["lora"](base, recipe)
    model.peft_config["default"].base_model_name_or_path = find_model(recipe.model.name)
    model.save_pretrained(str(folder), safe_serialization=True)
    return str(folder)


def shared_prefix(rows: list[dict[str, list[int]]]) -> int:
    """Tokens that all rows begin with."""
    ids = [row["input_ids"] for row in rows]
    shortest = min(map(len, ids))
    return next((place for place in range(shortest) if len({row[place] for row in ids}) > 1), shortest)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
