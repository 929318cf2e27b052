"""Numbers that are not finite, and memory that ends: skipped, rolled back, split smaller, or refused with names and numbers (F11, F12)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish import pipeline, training
from burnish.errors import TrainingError
from burnish.models import trainable_parameters
from burnish.run import Run
from burnish.training.objective import OBJECTIVES, Supervised
from burnish.types import Tokens


@pytest.fixture
def prepared(prepared: Callable[..., Run]) -> Callable[..., Run]:
    return lambda **training: prepared(**{"epochs": 2, "checkpoint_steps": 3, **training})


class Faulty(Supervised):
    """Rows of whose prompt `bad` says so have a loss that is NaN; more than `fits` rows at once do not fit the memory."""

    bad: Callable[[Tokens], bool] = staticmethod(lambda item: False)
    fits = 10**9
    seen: list[int]

    def __init__(self) -> None:
        self.seen = []

    def backward(self, model: Any, items: Sequence[Tokens], denominator: int) -> float:
        self.seen.append(len(items))
        loss = super().backward(model, items[: self.fits], denominator)
        if len(items) > self.fits:  # in the middle of the work: what was added to the gradients must not stay
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        if any(self.bad(item) for item in items):
            for parameter in trainable_parameters(model).values():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
            return math.nan
        return loss

    def summed(self, model: Any, items: Sequence[Tokens]) -> float:
        return (
            math.nan if any(self.bad(item) for item in items) and not model.training and len(items) == 1 else super().summed(model, items)
        )


def use(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Faulty:
    objective = Faulty()
    for name, value in values.items():
        setattr(objective, name, value)
    monkeypatch.setitem(OBJECTIVES, "supervised", lambda recipe: objective)
    return objective


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.read_jsonl(run.metrics_file) if "loss" in row]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.read_jsonl(run.events_file) if row["event"] == kind]


def test_a_row_that_is_not_finite_is_skipped_and_named(prepared: Callable[..., Run], chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    example = pipeline.dataset_of(run).train[5]
    (poison,) = chat.training_tokens(example)
    use(monkeypatch, bad=lambda item: item.input_ids == poison.input_ids)
    summary = pipeline.train(run)
    rows = steps_of(run)
    assert [row["loss"] for row in rows].count(None) == 2, "once an epoch; null, not 0"
    assert all(row["loss"] is None or row["loss"] > 0 for row in rows)
    assert all((row["gradient_norm"] is None) == (row["loss"] is None) for row in rows)
    assert (summary["skipped_steps"], summary["rollbacks"]) == (2, 0)
    assert all(example.source in event["rows"] for event in events(run, "step_skipped"))


def test_three_in_a_row_roll_back_once_and_leave_the_batches_out(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps are poisoned, whatever is computed; after the roll-back they are left out and the rest is trained."""
    run = prepared(epochs=1)
    objective = use(monkeypatch)
    objective.bad = lambda item: len(objective.seen) in (5, 6, 7)
    summary = pipeline.train(run)
    rows = steps_of(run)
    assert [row["step"] for row in rows if row["loss"] is None] == [5, 6, 7]
    assert [row["step"] for row in rows] == list(range(1, summary["steps"] + 1)), "each step once"
    assert summary["rollbacks"] == 1
    (event,) = events(run, "rolled_back")
    assert (event["from_step"], event["to_step"]) == (7, 6)


def test_what_diverges_again_is_refused_by_line(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    train = pipeline.dataset_of(run).train
    objective = use(monkeypatch)
    objective.bad = lambda item: len(objective.seen) > 4
    with pytest.raises(TrainingError, match="diverged") as caught:
        pipeline.train(run)
    assert caught.value.code == "diverged"
    assert any(example.source in str(caught.value) for example in train), "rows are named as file:line"
    assert "again" in str(caught.value)
    assert len(events(run, "rolled_back")) == 1
    assert run.status()["steps"]["train"]["state"] == "failed"
    assert not run.adapter_folder.exists()
    from safetensors.torch import load_file

    for file in run.checkpoints_folder.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values() if tensor.is_floating_point()), file
    assert all(row["loss"] is None or math.isfinite(row["loss"]) for row in steps_of(run))


def test_only_the_rows_that_are_to_blame_are_named(prepared: Callable[..., Run], chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch holds one poisoned row: the message names these, not all rows of the batches."""
    run = prepared(micro_batch_size=16, epochs=4)
    train = pipeline.dataset_of(run).train
    poisoned = {tuple(chat.training_tokens(example)[0].input_ids): example.source for example in train[::2]}
    use(monkeypatch, bad=lambda item: tuple(item.input_ids) in poisoned)
    with pytest.raises(TrainingError, match="diverged") as caught:
        pipeline.train(run)
    innocent = [example.source for example in train if example.source not in poisoned.values()]
    message = [*str(caught.value).replace(",", " ").split(), ""]
    assert set(message) & set(poisoned.values())
    assert not set(message) & set(innocent)


def test_an_exploding_loss_is_written_down_and_is_no_error(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate far too high, and a loss of 10¹²: as it is, neither hidden nor refused."""
    run = prepared(learning_rate=0.5, warmup_fraction=0)
    use(monkeypatch)
    real = Supervised.backward
    monkeypatch.setattr(Faulty, "backward", lambda self, model, items, denominator: 1e12 * real(self, model, items, denominator))
    assert pipeline.train(run)["skipped_steps"] == 0
    assert all(row["loss"] > 1e11 for row in steps_of(run))


@pytest.mark.parametrize(("rate", "diverges"), [(1e4, False), (1e30, True)])
def test_a_rate_a_million_times_too_high(
    rate: float, diverges: bool, prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made up here: the weights explode by themselves. Whatever comes of it, no 0 is logged and nothing that is not finite is kept."""
    run = prepared()
    monkeypatch.setattr("burnish.training.loop.learning_rate_at", lambda *_: rate)  # a recipe refuses more than 10
    if diverges:
        with pytest.raises(TrainingError, match="diverged") as caught:
            pipeline.train(run)
        assert caught.value.code == "diverged"
        assert not run.adapter_folder.exists()
    else:
        pipeline.train(run)
    rows = steps_of(run)
    assert all(row["loss"] is None or (math.isfinite(row["loss"]) and row["loss"] > 0) for row in rows)
    from safetensors.torch import load_file

    for file in [*run.checkpoints_folder.rglob("*.safetensors"), *run.adapter_folder.rglob("*.safetensors")]:
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values() if tensor.is_floating_point()), file


def test_a_validation_that_is_not_finite_is_refused(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    objective = use(monkeypatch)
    real = Supervised.summed
    monkeypatch.setattr(Faulty, "summed", lambda self, model, items: math.nan if objective.seen else real(self, model, items))
    with pytest.raises(TrainingError, match="diverged: the validation loss after step"):
        pipeline.train(run)


def test_memory_that_ends_splits_the_step_and_changes_nothing_else(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 × (half of 4): the same losses as with 4 at once, up to rounding, from the first step that did not fit."""
    plain = prepared()
    pipeline.train(plain)
    expected = [row["loss"] for row in steps_of(plain)]
    run = prepared()
    objective = use(monkeypatch, fits=2)
    told: list[str] = []
    summary = pipeline.train(run, tell=lambda what, done, total, detail: told.append(f"{what}: {detail}"))
    assert [row["loss"] for row in steps_of(run)] == pytest.approx(expected, rel=1e-4)
    assert objective.seen[:3] == [4, 2, 2], "the step was done again from its beginning"
    assert summary["examples_at_once"] == 2
    (event,) = events(run, "out_of_memory")
    assert (event["at_once_before"], event["at_once"]) == (4, 2)
    assert any("out of memory: 4 examples at once did not fit: 2" in line for line in told)


def test_one_example_that_does_not_fit_is_refused_with_numbers(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    use(monkeypatch, fits=0)
    monkeypatch.setattr(Faulty, "summed", lambda self, model, items: Supervised.summed(self, model, items))
    monkeypatch.setattr(Faulty, "backward", lambda self, model, items, denominator: _raise(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(TrainingError, match=r"out_of_memory: step 1 does not fit .*the longest has \d+ tokens.*GB were in use") as caught:
        pipeline.train(run)
    assert caught.value.code == "out_of_memory"
    assert [event["at_once"] for event in events(run, "out_of_memory")] == [2, 1]


def test_another_runtime_error_is_not_taken_for_it(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    use(monkeypatch)
    monkeypatch.setattr(Faulty, "backward", lambda self, model, items, denominator: _raise(RuntimeError("shapes do not fit")))
    with pytest.raises(RuntimeError, match="shapes"):
        pipeline.train(run)


def test_a_validation_that_does_not_fit_is_split_too(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared()
    use(monkeypatch)
    real = Supervised.summed
    monkeypatch.setattr(Faulty, "summed", lambda self, model, items: _raise(MemoryError()) if len(items) > 1 else real(self, model, items))
    assert pipeline.train(run)["examples_at_once"] == 1


def _raise(problem: Exception) -> Any:
    raise problem


def test_success_needs_a_change(prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step was done, and none of them did anything."""
    run = prepared()
    use(monkeypatch)
    monkeypatch.setattr(Faulty, "backward", lambda self, model, items, denominator: 1.0)
    with pytest.raises(TrainingError, match="changed no weight"):
        pipeline.train(run)
    assert not run.adapter_folder.exists()


@pytest.mark.parametrize("what", ["another", "torn", "missing tensor"])
def test_success_needs_an_adapter_that_reads_back(what: str, prepared: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk is proved, not what is in memory."""
    from burnish.errors import BurnishError

    run = prepared()
    real = training.save_adapter

    def broken(model: Any, chat: Any, folder: Path, facts: dict[str, Any]) -> Any:
        parameter = next(iter(trainable_parameters(model).values()))
        kept = parameter.detach().clone()
        if what == "another":
            parameter.data += 1
        elif what == "missing tensor":
            parameter.requires_grad_(False)
        done = real(model, chat, folder, facts)
        parameter.data.copy_(kept)
        if what == "missing tensor":
            from safetensors.torch import load_file, save_file

            parameter.requires_grad_(True)
            file = folder / "adapter_model.safetensors"
            tensors = load_file(file)
            tensors.pop(sorted(tensors)[0])
            save_file(tensors, file)
            manifest = json.loads((folder / "burnish.json").read_text())
            from burnish.run import hash_file

            manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
            (folder / "burnish.json").write_text(json.dumps(manifest))
        elif what == "torn":
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-8])
        return done

    monkeypatch.setattr(training, "save_adapter", broken)
    expected = {"another": "not the trained weights", "torn": "SHA-256 differs", "missing tensor": "are not in it"}[what]
    with pytest.raises(BurnishError, match=expected):
        pipeline.train(run)
    assert not run.adapter_folder.exists()
    assert run.status()["steps"]["train"]["state"] == "failed"
