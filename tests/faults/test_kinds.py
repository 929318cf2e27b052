"""kill −9 and a pause in every kind of training: whatever is computed beside the plain step must be there again when the training goes on (F1, F17)."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Reference, events, finish, forked, kill_after, log_of, reference

from burnish.errors import ModelError
from burnish.models import load_base
from burnish.recipe import build_recipe
from burnish.run import Run
from conftest import colour_rows, tiny_config

SYSTEM = "Say the thing first and the colour after it; say nothing else, whatever the question is about."  # long enough to be computed once
SHARED = [
    {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in colour_rows(64)
]  # fmt: skip
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"no {row['completion']}"} for row in colour_rows(64)]
TEXTS = [{"text": f"a {row['prompt']} is called {row['completion']}, number {n} of all."} for n, row in enumerate(colour_rows(64))]
GENERAL = [{"prompt": f"what is {n}", "completion": f"number {n}"} for n in range(30)]
NO_DROPOUT = {"dropout": 0.0}  # with it, layers are fused

# What changes in the recipe, and the rows.
KINDS: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None]] = {
    "fused, shared beginnings": ({"lora": NO_DROPOUT}, SHARED),
    "accumulated": ({"training": {"gradient_accumulation_steps": 3, "micro_batch_size": 2}}, None),
    "frozen layers cached": ({"training": {"layers": "last-1"}, "engine": {"frozen_cache": True}, "lora": NO_DROPOUT}, None),
    "cached and replayed": (
        {"training": {"layers": "last-1", "replay_data": "general.jsonl", "replay_fraction": 0.2}, "engine": {"frozen_cache": True}}, SHARED,
    ),
    "preference": ({"training": {"objective": "preference"}, "lora": NO_DROPOUT}, PAIRS),
    "replay": ({"training": {"replay_data": "general.jsonl", "replay_fraction": 0.2}}, None),
    "kept close by a KL term": ({"training": {"kl_weight": 0.5}}, None),
    "plain text": ({"training": {"objective": "text"}, "task": {"metric": "auto"}}, TEXTS),
    "dora": ({"training": {"method": "dora"}}, None),
    "full": ({"training": {"method": "full", "learning_rate": 1e-3}}, None),
    "qlora": ({"training": {"method": "qlora"}}, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_of(tiny_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    made: dict[str, Reference] = {}

    def get(kind: str) -> Reference:
        model = tiny_folder
        if kind == "qlora":
            pytest.importorskip("bitsandbytes", reason="needs the extra `quantized`")
            model = wider(tmp_path_factory.mktemp("wider"), tokenizer)
            try:
                load_base(
                    build_recipe({"model": {"name": str(model), "dtype": "float32"}, "data": "x.jsonl", "training": {"method": "qlora"}})
                )
            except ModelError as problem:
                pytest.skip(f"nothing here holds a base in 4 bits: {problem}")
        if kind not in made:
            folder = tmp_path_factory.mktemp("kind")
            sections, data = KINDS[kind]
            sections = json.loads(json.dumps(sections).replace("general.jsonl", str(folder / "general.jsonl")))
            (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENERAL))
            made[kind] = reference(model, folder, data=data, sections=sections)
        return made[kind]

    return get


def wider(folder: Path, tokenizer: Any) -> Path:
    """A tiny Llama whose rows hold a block of 4-bit weights (64)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = {**tiny_config("llama", len(tokenizer)).to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_killed_paused_and_gone_on_with(kind: str, whole_of: Callable[[str], Reference], tmp_path: Path) -> None:
    """Killed in the first epoch, two steps after a checkpoint; stopped in the second; then to the end."""
    whole = whole_of(kind)
    steps = [row["step"] for row in whole.rows if "loss" in row]
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[5, "KILL"]) == -signal.SIGKILL
    assert forked().run("train", run, recipe=whole.recipe, at_step=[steps[-1] - 3, "TERM"]) == 143, log_of(run)
    finish(run, whole)
    resumed = [event["at_step"] for event in events(run, "resumed")]
    assert resumed in ([3, steps[-1] - 3], [4, steps[-1] - 3]), "of a checkpoint that was due, or came with a validation"
    summary = json.loads((run / "training" / "summary.json").read_text())
    assert summary["resumed_at_steps"] == resumed
    assert ("frozen_layers_cached" in summary) == ("cached" in kind), "it was the kind that was meant"
    assert bool(summary["replayed_per_epoch"]) == ("replay" in kind)
    assert any("kl" in row for row in whole.rows) == ("KL" in kind)


def test_a_lost_cache_of_frozen_layers_is_told(whole_of: Callable[[str], Reference], tmp_path: Path) -> None:
    """What is computed again may be rounded otherwise: nobody promises bits then."""
    whole = whole_of("frozen layers cached")
    run = whole.copy(tmp_path / "run")
    assert forked().run("train", run, recipe=whole.recipe, at_step=[5, "KILL"]) == -signal.SIGKILL
    shutil.rmtree(Run(run).frozen_folder)
    assert forked().run("train", run, recipe=whole.recipe, at_step=[8, "KILL"]) == -signal.SIGKILL
    assert [(event["at_step"], event["bit_exact"]) for event in events(run, "frozen_cache_lost")] == [(3, False)]
    assert forked().run("train", run, recipe=whole.recipe) == 0, log_of(run)
    assert len(events(run, "frozen_cache_lost")) == 1, "the second time it was there"


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_again_and_again(kind: str, whole_of: Callable[[str], Reference], tmp_path: Path) -> None:
    """Five trainings, each killed up to three times."""
    whole = whole_of(kind)
    moments = random.Random(kind)
    resumed = 0
    for number in range(5):
        run = whole.copy(tmp_path / f"run-{number}")
        for _ in range(3):
            kill_after(whole.seconds * (0.3 + 0.6 * moments.random()), run, whole)
        finish(run, whole)
        resumed += len(events(run, "resumed"))
    assert resumed >= 3, "most kills came after a checkpoint"
