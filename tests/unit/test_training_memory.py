"""How much is computed at once: counted, compared with what is free, and never a change of the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.models import METHODS, trainable_parameters
from burnish.recipe import build_recipe
from burnish.training import memory
from burnish.training.loss import summed_loss
from burnish.training.memory import kept_bytes_per_token, plan_memory
from burnish.training.pack import Paths, flatten
from burnish.types import Tokens
from conftest import build_tiny

GB = 1 << 30


def adapted(tokenizer: Any) -> Any:
    return METHODS["lora"](build_tiny("llama", tokenizer).requires_grad_(False), build_recipe({"model": "m", "data": "d"}))


def rows(*lengths: int) -> list[Tokens]:
    return [Tokens(list(range(5, 5 + n)), [-100, *range(6, 5 + n)]) for n in lengths]


def test_kept_bytes_are_those_of_the_tensors_autograd_saves() -> None:
    """By hand: y = relu(x · A) keeps x (once, though two products use it) and its own output; the weights are not counted."""

    class Body(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(100, 8)
            self.first, self.second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            x = self.table(input_ids)
            return type("Out", (), {"last_hidden_state": torch.relu(self.first(x)) + self.second(x)})

    class Causal(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.base_model = Body()

    ids = rows(16)[0]
    ids_bytes = 16 * 8  # the embedding keeps the ids
    places = 15 * 8  # indexing keeps the predictors
    expected = 16 * 8 * 4 * 2 + ids_bytes + places
    assert kept_bytes_per_token(Causal(), ids, Paths()) == expected / 16


def test_enough_memory_changes_nothing(tokenizer: Any) -> None:
    plan = plan_memory(adapted(tokenizer), rows(20, 10, 10, 10), Paths(), most=4, free_bytes=4 * GB)
    assert (plan.at_once, plan.checkpointing) == (4, False)
    assert plan.needed_bytes < 0.7 * plan.free_bytes


def test_little_memory_first_computes_again_then_takes_fewer(tokenizer: Any) -> None:
    model, told = adapted(tokenizer), []
    sequences = rows(*[200] * 8)
    roomy = plan_memory(model, sequences, Paths(), most=8, free_bytes=4 * GB)
    plan = plan_memory(model, sequences, Paths(), most=8, free_bytes=int(roomy.needed_bytes / 0.75), tell=lambda *told_: told.append(told_))
    assert plan.checkpointing
    assert plan.at_once == 8
    assert plan.kept_bytes_per_token < 0.5 * roomy.kept_bytes_per_token
    assert told[0][0] == "memory"
    tight = plan_memory(adapted(tokenizer), sequences, Paths(), most=8, free_bytes=int(plan.needed_bytes / 0.75))
    assert tight.checkpointing
    assert tight.at_once < 8
    never = plan_memory(adapted(tokenizer), sequences, Paths(), most=8, checkpointing=False, free_bytes=int(roomy.needed_bytes / 0.75))
    assert not never.checkpointing
    assert never.at_once == 4


@pytest.mark.parametrize("paths", [Paths(), Paths(by_segment=True, share=True)])
def test_checkpointing_gives_the_same_gradients(paths: Paths, tokenizer: Any) -> None:
    from burnish.models import attend_by_segment

    gradients = []
    for on in (False, True):
        model = adapted(tokenizer).train()
        assert attend_by_segment(model)
        assert not on or memory.switch_checkpointing(model)
        summed_loss(model, flatten(rows(30, 40, 25), paths)).backward()
        gradients.append({name: p.grad for name, p in trainable_parameters(model).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_free_memory_is_the_least_of_what_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert memory._group_free(tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_free(tmp_path) is None
    assert memory._group_free(tmp_path / "none") is None
    monkeypatch.setattr(memory, "_group_free", lambda: 5)
    assert memory.free_bytes_of("cpu") == 5
