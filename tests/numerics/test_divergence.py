"""KL to the base beside the cross-entropy: values and gradients against torch's own with all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from burnish.data.formats import make_example
from burnish.errors import TrainingError
from burnish.models import IGNORED, Chat, trainable_parameters
from burnish.training import divergence
from burnish.training.divergence import adapter_off, held_losses
from burnish.training.objective import KeepClose, Supervised
from burnish.training.pack import flatten
from burnish.types import Tokens
from conftest import build_tiny, colour_rows, with_adapter


@pytest.fixture
def sequences(chat: Chat) -> list[Tokens]:
    conversations = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in colour_rows(8)]
    return [tokens for messages in conversations for tokens in chat.training_tokens(make_example(messages, source="x"))]


def rows_of(model: Any, tokens: Tokens) -> torch.Tensor:
    """(targets, V) logits of one sequence alone, where a target follows."""
    logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0, :-1].float()
    return logits[torch.tensor(tokens.labels[1:]) != IGNORED]


def naive(model: Any, base: Any, some: list[Tokens], weight: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Σ cross-entropy + weight · Σ KL, Σ cross-entropy, Σ KL), by torch."""
    tuned = torch.cat([rows_of(model, tokens) for tokens in some])
    with torch.no_grad():
        kept = torch.cat([rows_of(base, tokens) for tokens in some])
    targets = torch.tensor([label for tokens in some for label in tokens.labels[1:] if label != IGNORED])
    cross = F.cross_entropy(tuned, targets, reduction="sum")
    kl = F.kl_div(F.log_softmax(tuned, -1), F.log_softmax(kept, -1), reduction="sum", log_target=True)
    return cross + weight * kl, cross, kl


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("family", "softcap"), [("llama", None), ("gemma3", None), ("gemma3", 2.0)])
def test_value_and_gradient_are_torchs(
    family: str, softcap: float | None, tokenizer: Any, sequences: list[Tokens], monkeypatch: Any
) -> None:
    monkeypatch.setattr(divergence, "_BLOCK_LOGITS", 5 * len(tokenizer))  # several blocks, the last not full
    model, base, some, weight = with_adapter(family, tokenizer), build_tiny(family, tokenizer), sequences[:6], 0.8
    if softcap is not None:
        for part in (model, model.get_base_model(), base):
            part.config.final_logit_softcapping = softcap
    lowered, cross, kl = held_losses(model, flatten(some), weight)
    lowered.sum().backward()
    ours = gradients(model)
    expected, expected_cross, expected_kl = naive(model, base, some, weight)
    expected.backward()
    assert len(lowered) > 5
    assert float(lowered.detach().sum()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(cross.sum()) == pytest.approx(float(expected_cross.detach()), rel=1e-5)
    assert float(kl.sum()) == pytest.approx(float(expected_kl.detach()), rel=1e-4)
    assert float(kl.sum()) > 0.1
    assert (kl > -1e-5).all()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_large_vocabulary_is_added_up_exactly() -> None:
    """Gemma's 262,144 words: torch's log_softmax in float32 is off by 1e-4 nats here."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3, 4), torch.randn(262_144, 4), torch.tensor([5, 77_777, 262_143])
    _, cross, kl = divergence._HeldLoss.apply(hidden, hidden * 0.8, weight, targets, None, 1.0)
    tuned, base = (torch.log_softmax((rows @ weight.T).double(), -1) for rows in (hidden, hidden * 0.8))
    torch.testing.assert_close(cross.double(), -tuned.gather(1, targets[:, None])[:, 0], rtol=0, atol=5e-6)
    torch.testing.assert_close(kl.double(), (base.exp() * (base - tuned)).sum(-1), rtol=0, atol=5e-6)


def test_a_head_of_another_kind_gives_the_same(tokenizer: Any, sequences: list[Tokens], monkeypatch: Any) -> None:
    model = with_adapter("llama", tokenizer)
    blocked = held_losses(model, flatten(sequences[:4]), 0.5)
    blocked[0].sum().backward()
    ours = gradients(model)
    monkeypatch.setattr(divergence, "plain_head", lambda *_: None)
    plain = held_losses(model, flatten(sequences[:4]), 0.5)
    plain[0].sum().backward()
    for a, b in zip(blocked, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_loss_told_is_the_cross_entropy_and_the_gradient_has_both(tokenizer: Any, sequences: list[Tokens]) -> None:
    model, base, some = with_adapter("llama", tokenizer), build_tiny("llama", tokenizer), sequences[:5]
    held, free = KeepClose(Supervised(), 3.0), Supervised()
    count = held.count(some)
    assert held.backward(model, some, count) == pytest.approx(free.summed(model, some) / count, rel=1e-5)
    ours = gradients(model)
    expected, _, kl = naive(model, base, some, 3.0)
    (expected / count).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert held.figures()["kl"] == pytest.approx(float(kl.detach()), rel=1e-4)
    assert held.figures() == {}, "told once"


def test_a_fresh_adapter_has_moved_nowhere(tokenizer: Any, sequences: list[Tokens]) -> None:
    model = with_adapter("llama", tokenizer, started=False)
    held = KeepClose(Supervised(), 1.0)
    held.backward(model, sequences[:4], held.count(sequences[:4]))
    with_kl = gradients(model)
    Supervised().backward(model, sequences[:4], held.count(sequences[:4]))
    for name, gradient in gradients(model).items():  # at KL = 0 its slope is 0 too
        torch.testing.assert_close(with_kl[name], gradient, rtol=1e-4, atol=1e-6)
    assert held.figures() == {"kl": pytest.approx(0, abs=1e-5)}


def test_switching_the_adapter_off_leaves_everything_as_it_was(tokenizer: Any, sequences: list[Tokens]) -> None:
    """PEFT turns gradients on again for a whole adapter; a part of it that was frozen (layer choice) must stay so."""
    model, base = with_adapter("llama", tokenizer).train(), build_tiny("llama", tokenizer)
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.tensor([sequences[0].input_ids])
    tuned = model(ids).logits
    with adapter_off(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)
        assert not model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.training
    torch.testing.assert_close(model(ids).logits, tuned, rtol=0, atol=0)
    with pytest.raises(TrainingError, match="adapter"), adapter_off(base):
        pass
