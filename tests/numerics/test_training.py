"""The loss, its gradient and the loop, each against another way to compute it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from burnish.data.formats import make_example
from burnish.errors import TrainingError
from burnish.models import IGNORED, METHODS, Chat, trainable_parameters
from burnish.recipe import Recipe, build_recipe
from burnish.training import engine as engine_module
from burnish.training import tokenize_all
from burnish.training.loop import Hooks, Progress, learning_rate_at, mean_loss, planned_steps, run_loop
from burnish.training.loss import summed_loss
from burnish.training.objective import Supervised
from burnish.training.pack import Paths, epoch_order, flatten
from burnish.types import Tokens
from conftest import build_tiny, colour_rows

FAMILIES = ("llama", "gemma3")


def recipe(**training: Any) -> Recipe:
    settings = {"learning_rate": 5e-3, "micro_batch_size": 4, "epochs": 1, **training}
    return build_recipe({"model": "tiny", "data": "x.jsonl", "training": settings, "lora": {"rank": 4, "alpha": 8}})


@pytest.fixture
def sequences(chat: Chat) -> list[Tokens]:
    rows = colour_rows(24)
    examples = [
        make_example([{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}], source="x")
        for r in rows
    ]
    return tokenize_all(chat, examples)


def naive_loss(model: Any, tokens: Tokens) -> torch.Tensor:
    """One sequence alone, all logits, torch's cross-entropy."""
    logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, torch.tensor(tokens.labels[1:]), ignore_index=IGNORED, reduction="sum")


def adapted(family: str, tokenizer: Any, settings: Recipe, *, started: bool = True) -> Any:
    model = build_tiny(family, tokenizer)
    model.requires_grad_(False)
    model = METHODS["lora"](model, settings)
    if started:  # B = 0 at the start would hide half of the gradient
        torch.manual_seed(3)
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_blocked_loss_and_gradient_equal_the_naive_ones(
    family: str, tokenizer: Any, sequences: list[Tokens], monkeypatch: Any
) -> None:
    """Several sequences in one row, the head in small blocks: the same loss and gradient as each sequence alone with all its logits."""
    monkeypatch.setattr("burnish.training.loss._block_width", lambda _: 37)
    model = adapted(family, tokenizer, recipe())
    some = sequences[:6]
    packed = summed_loss(model, flatten(some))
    packed.backward()
    fast = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    naive = sum(naive_loss(model, tokens) for tokens in some)
    naive.backward()
    assert float(packed) == pytest.approx(float(naive), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_soft_capped_logits_have_the_right_loss_and_gradient(tokenizer: Any, sequences: list[Tokens]) -> None:
    model = adapted("gemma3", tokenizer, recipe())
    model.config.final_logit_softcapping = model.get_base_model().config.final_logit_softcapping = 2.0
    packed = summed_loss(model, flatten(sequences[:3]))
    packed.backward()
    fast = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    naive = sum(naive_loss(model, tokens) for tokens in sequences[:3])
    naive.backward()
    assert float(packed) == pytest.approx(float(naive), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_fresh_adapter_changes_nothing(tokenizer: Any, sequences: list[Tokens]) -> None:
    base = build_tiny("llama", tokenizer)
    model = adapted("llama", tokenizer, recipe(), started=False)
    ids = torch.tensor([sequences[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)


def test_targets_are_counted_not_guessed(sequences: list[Tokens]) -> None:
    batch = flatten(sequences[:5])
    assert len(batch.targets) == sum(label != IGNORED for t in sequences[:5] for label in t.labels[1:])
    flat = [token for t in sequences[:5] for token in t.input_ids]
    assert batch.targets.tolist() == [flat[place + 1] for place in batch.predictors.tolist()]
    assert batch.position_ids[0].tolist() == [i for t in sequences[:5] for i in range(len(t.input_ids))]


def _train(tokenizer: Any, sequences: list[Tokens], **training: Any) -> tuple[list[float], dict[str, torch.Tensor], Progress]:
    settings = recipe(**training)
    model = adapted("llama", tokenizer, settings, started=False)
    losses: list[float] = []
    hooks = Hooks(log=lambda row: losses.append(row["loss"]) if "loss" in row else None, keep_best=lambda *_: None)
    progress = run_loop(model, sequences, sequences[:4], settings=settings.training, seed=0, hooks=hooks)
    return losses, {name: p.detach().clone() for name, p in trainable_parameters(model).items()}, progress


def test_accumulation_1x8_equals_8x1(tokenizer: Any, sequences: list[Tokens]) -> None:
    """Rows have different numbers of targets, so a mean of means would differ."""
    one, weights_one, _ = _train(tokenizer, sequences, micro_batch_size=1, gradient_accumulation_steps=8)
    eight, weights_eight, _ = _train(tokenizer, sequences, micro_batch_size=8, gradient_accumulation_steps=1)
    assert len({len([x for x in t.labels if x != IGNORED]) for t in sequences}) > 1
    assert one == pytest.approx(eight, rel=1e-5)
    for name in weights_one:
        # Which unlikely words the head leaves out depends on the rows that are computed together (2⁻²⁰ of a probability).
        torch.testing.assert_close(weights_one[name], weights_eight[name], rtol=1e-3, atol=1e-4)


def test_the_loop_equals_a_loop_written_out(tokenizer: Any, sequences: list[Tokens]) -> None:
    """Losses of our loop against plain torch: AdamW, clipping, cosine, written out here."""
    ours, _, progress = _train(tokenizer, sequences, epochs=2, weight_decay=0.01, warmup_fraction=0.2)
    settings = recipe(epochs=2, weight_decay=0.01, warmup_fraction=0.2)
    model = adapted("llama", tokenizer, settings, started=False)
    parameters = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01)
    losses = []
    for step in range(progress.planned_steps):
        order = epoch_order([len(t.input_ids) for t in sequences], seed=0, epoch=step // 6, batch=4)
        chosen = [sequences[i] for i in order[4 * (step % 6) : 4 * (step % 6) + 4]]
        count = sum(t.target_tokens for t in chosen)
        loss = sum(naive_loss(model, t) for t in chosen) / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        total, warmup = progress.planned_steps, math.ceil(0.2 * progress.planned_steps)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        optimizer.param_groups[0]["lr"] = 5e-3 * ((step + 1) / warmup if step < warmup else cosine)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert ours == pytest.approx(losses, rel=2e-4, abs=1e-5)
    assert losses[-1] < 0.8 * losses[0]


def test_training_learns_and_repeats_itself(tokenizer: Any, sequences: list[Tokens]) -> None:
    first, weights, progress = _train(tokenizer, sequences, epochs=12, learning_rate=0.02)
    second, again, _ = _train(tokenizer, sequences, epochs=12, learning_rate=0.02)
    assert first == second
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert first[-1] < 0.6 * first[0]
    assert progress.examples == 12 * len(sequences)


def test_mean_loss_is_per_target_token(tokenizer: Any, sequences: list[Tokens]) -> None:
    model = build_tiny("llama", tokenizer)
    with torch.no_grad():
        expected = sum(float(naive_loss(model, t)) for t in sequences) / sum(t.target_tokens for t in sequences)
    assert mean_loss(model, sequences, 5) == pytest.approx(expected, rel=1e-5)


class Poisoned(Supervised):
    """From the given step's gradient on, the loss is NaN."""

    def __init__(self, after: int) -> None:
        self.left = after

    def backward(self, model: Any, items: Any, denominator: int) -> float:
        self.left -= 1
        return super().backward(model, items, denominator) if self.left >= 0 else math.nan


def test_non_finite_steps_are_skipped_then_refused(tokenizer: Any, sequences: list[Tokens]) -> None:
    settings = recipe(epochs=4)
    model = adapted("llama", tokenizer, settings, started=False)
    rows: list[dict[str, Any]] = []
    hooks = Hooks(log=rows.append, keep_best=lambda *_: None)
    with pytest.raises(TrainingError, match="diverged"):
        run_loop(model, sequences, sequences[:2], objective=Poisoned(6), settings=settings.training, seed=0, hooks=hooks)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] is None, "a loss that is not finite is logged as null, never as 0"
    assert losses.count(None) == 3
    assert 0.0 not in losses
    assert all(torch.isfinite(p).all() for p in trainable_parameters(model).values())


def test_early_stopping_stops(tokenizer: Any, sequences: list[Tokens]) -> None:
    kept: list[int] = []
    settings = recipe(epochs=40, learning_rate=0.05, early_stopping_patience=2, validations_per_epoch=1)
    model = adapted("llama", tokenizer, settings, started=False)
    other = [Tokens(s.input_ids, s.labels) for s in sequences[-4:]]
    for s in other:  # validation rows that training makes worse: the answer is another word
        s.labels[-2] = (s.labels[-2] + 7) % 300
    progress = run_loop(
        model,
        sequences[:16],
        other,
        settings=settings.training,
        seed=0,
        hooks=Hooks(log=lambda _: None, keep_best=lambda s, _: kept.append(s)),
    )
    assert progress.stopped_early
    assert progress.step < progress.planned_steps
    assert kept[-1] == progress.best_step


@pytest.mark.parametrize("n", [1, 7, 16, 100, 257])
def test_the_order_is_a_permutation_and_a_pure_function(n: int) -> None:
    lengths = [(i * 37) % 91 + 3 for i in range(n)]
    order = epoch_order(lengths, seed=5, epoch=2, batch=8)
    assert sorted(order) == list(range(n))
    assert order == epoch_order(lengths, seed=5, epoch=2, batch=8)
    if n > 16:
        assert order != epoch_order(lengths, seed=6, epoch=2, batch=8)
        assert order != epoch_order(lengths, seed=5, epoch=3, batch=8)


def test_schedule_by_hand() -> None:
    settings = recipe(learning_rate=1.0, warmup_fraction=0.2, schedule="cosine").training
    rates = [learning_rate_at(step, 10, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])  # two steps of warm-up, then the peak
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down the cosine
    assert rates[9] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 7 / 8)))
    linear = recipe(learning_rate=1.0, warmup_fraction=0.0, schedule="linear").training
    assert [learning_rate_at(step, 4, linear) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert planned_steps(10, recipe(micro_batch_size=4, epochs=2).training) == 6
    assert planned_steps(10, recipe(micro_batch_size=4, epochs=2, max_steps=4).training) == 4


def test_adapter_round_trip_through_plain_peft(tokenizer: Any, sequences: list[Tokens], chat: Chat, tmp_path: Any) -> None:
    """What we save is what plain PEFT loads: the same logits."""
    from peft import PeftModel

    from burnish.errors import ModelError
    from burnish.models import load_adapter, verify_adapter
    from burnish.training.checkpoint import save_adapter

    model = adapted("llama", tokenizer, recipe())
    save_adapter(model, chat, tmp_path / "adapter", {"step": 1, "base_sha256": "b", "validation_loss": 0.5})
    again = PeftModel.from_pretrained(build_tiny("llama", tokenizer), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([sequences[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, again(ids).logits, rtol=0, atol=0)
    assert verify_adapter(tmp_path / "adapter", "b")["step"] == 1
    with pytest.raises(ModelError, match="other base weights"):
        load_adapter(build_tiny("llama", tokenizer), tmp_path / "adapter", "another")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        verify_adapter(tmp_path / "adapter", "b")
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_nan_weights_are_never_saved(tokenizer: Any, chat: Chat, tmp_path: Any) -> None:
    from burnish.training.checkpoint import save_adapter

    model = adapted("llama", tokenizer, recipe())
    next(iter(trainable_parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="NaN"):
        save_adapter(model, chat, tmp_path / "adapter", {"step": 1})
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_proved_on_the_model(family: str, tokenizer: Any, sequences: list[Tokens], monkeypatch: Any) -> None:
    model = build_tiny(family, tokenizer)
    settings = recipe()
    assert engine_module.keeps_sequences_apart(model, sequences)
    assert engine_module.make_ready(model, sequences, settings, steps=1) == Paths(by_segment=True, share=True)
    real = engine_module.flatten

    def leaking(some: list[Tokens], paths: Paths) -> Any:
        """Positions that run on: transformers then builds no block mask; and segments that see all that stands before them."""
        batch = real(some, paths)
        batch.position_ids[0] = torch.arange(batch.position_ids.shape[1])
        segments = batch.segments and tuple(replace(s, parents=tuple(range(n))) for n, s in enumerate(batch.segments))
        return replace(batch, segments=segments)

    monkeypatch.setattr(engine_module, "flatten", leaking)
    told: list[str] = []
    paths = engine_module.make_ready(model, sequences, settings, steps=1, tell=lambda what, *_: told.append(what))
    assert paths == Paths(packed=False)
    assert told == ["attention", "packing"]


def test_every_path_can_be_switched_off(tokenizer: Any, sequences: list[Tokens]) -> None:
    plain = dict.fromkeys(("document_attention", "blocked_head", "shared_prefixes", "fused_layers", "length_buckets"), False)
    losses = []
    for engine in ({}, plain):
        settings = build_recipe({**recipe(epochs=1).to_dict(), "engine": engine})
        model = adapted("gemma3", tokenizer, settings, started=True)
        paths = engine_module.make_ready(model, sequences, settings, steps=6)
        assert paths == (Paths(blocked=False) if engine else Paths(by_segment=True, share=True))
        losses.append(float(summed_loss(model, flatten(sequences, paths)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_collected_types(tiny_models: Callable[[str], Any]) -> None:
    assert {type(tiny_models(family)).__name__ for family in FAMILIES} == {"LlamaForCausalLM", "Gemma3ForCausalLM"}


def test_a_process_without_rows_of_a_step_adds_nothing(tokenizer: Any, sequences: list[Tokens]) -> None:
    """The last batch of an epoch may have fewer rows than there are processes."""
    from burnish.training.objective import make_objective
    from burnish.training.step import backward, items_at_once

    objective = make_objective(recipe())
    model = adapted("llama", tokenizer, recipe())
    assert items_at_once(objective, [], 4, "cpu") == 1
    assert backward(model, objective, [], at_once=4, denominator=10) == 0.0
    assert all(parameter.grad is None for parameter in model.parameters())
