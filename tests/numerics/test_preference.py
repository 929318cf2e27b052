"""DPO against TRL's numbers, against the formula with all logits, and its reference against the base."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from make_dpo_golden import BETA, GOLDEN, PAIRS, base, policy

from burnish.data.formats import make_example
from burnish.errors import DataError, TrainingError
from burnish.models import IGNORED, Chat, trainable_parameters
from burnish.training.pack import Paths
from burnish.training.preference import Pair, Preference, answer_gaps, make_pair, with_reference
from burnish.types import Tokens
from conftest import COLOURS, build_tiny, with_adapter

FAMILIES = ("llama", "gemma3")


def sequence(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens(prompt + answer, [IGNORED] * len(prompt) + answer)


def golden_pairs() -> list[Pair]:
    return [Pair(sequence(p, c), sequence(p, r)) for p, c, r in PAIRS]


def pair_rows(chat: Chat, n: int = 6) -> list[Pair]:
    examples = [
        make_example(
            [{"role": "user", "content": f"a {c} cat {i}"}, {"role": "assistant", "content": f"cat {c}"}],
            source="x",
            rejected="dog " * (i % 3 + 1) + c,
        )
        for i, c in enumerate((COLOURS * 2)[:n])
    ]
    return [make_pair(chat, example) for example in examples]


def answer_log_probability(model: Any, tokens: Tokens) -> torch.Tensor:
    """One conversation alone, all logits, torch's cross-entropy."""
    logits = model(torch.tensor([tokens.input_ids]), use_cache=False).logits[0, :-1].float()
    return -F.cross_entropy(logits, torch.tensor(tokens.labels[1:]), ignore_index=IGNORED, reduction="sum")


def referenced(model: Any, pairs: list[Pair], folder: Path, **options: Any) -> list[Pair]:
    return with_reference(model, pairs, cache=folder / "reference.json", state="s", at_once=2, **options)


def test_loss_margins_and_gradients_are_those_of_trl(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    model = policy()
    with model.disable_adapter():
        pairs = referenced(model, golden_pairs(), tmp_path)
    objective = Preference(BETA)
    loss = objective.backward(model, pairs, len(pairs))
    figures = objective.figures()
    assert loss == pytest.approx(golden["loss"], rel=1e-5)
    assert figures["reward_margin"] / len(pairs) == pytest.approx(golden["rewards/margins"], rel=1e-4)
    assert figures["preference_accuracy"] / len(pairs) == pytest.approx(golden["rewards/accuracies"], rel=1e-6)
    parameters = trainable_parameters(model)
    assert set(parameters) == set(golden["gradients"])
    for name, expected in golden["gradients"].items():
        gradient = parameters[name].grad
        assert float(gradient.norm()) == pytest.approx(expected["norm"], rel=1e-4), name
        torch.testing.assert_close(gradient.flatten()[:6], torch.tensor(expected["first"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_the_formula(family: str, tokenizer: Any, chat: Chat, tmp_path: Path) -> None:
    fresh = with_adapter(family, tokenizer, started=False)
    pairs = referenced(fresh, pair_rows(chat), tmp_path)
    model, beta = with_adapter(family, tokenizer), 0.7
    loss = Preference(beta).backward(model, pairs, len(pairs))
    ours = {name: p.grad.clone() for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    reference = build_tiny(family, tokenizer)
    terms = []
    for pair in pairs:
        with torch.no_grad():
            start = answer_log_probability(reference, pair.chosen) - answer_log_probability(reference, pair.rejected)
        now = answer_log_probability(model, pair.chosen) - answer_log_probability(model, pair.rejected)
        terms.append(-F.logsigmoid(beta * (now - start)))
    naive = torch.stack(terms).mean()
    naive.backward()
    assert loss == pytest.approx(float(naive.detach()), rel=1e-5)
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_reference_is_the_adapter_switched_off_and_the_base(tmp_path: Path) -> None:
    """Three ways to the same number: before training, later with the adapter off, and the base model itself."""
    model = policy()
    with torch.no_grad():
        moved = answer_gaps(model, golden_pairs())
        with model.disable_adapter():
            off = answer_gaps(model, golden_pairs())
    plain = base()
    with torch.no_grad():
        expected = [float(answer_log_probability(plain, p.chosen) - answer_log_probability(plain, p.rejected)) for p in golden_pairs()]
    for parameter in trainable_parameters(model).values():  # a fresh adapter: B = 0
        parameter.data.zero_()
    fresh = [pair.reference for pair in referenced(model, golden_pairs(), tmp_path)]
    assert fresh == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert off.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert moved.tolist() != pytest.approx(expected, rel=1e-2)


def test_before_the_first_step_the_loss_is_that_of_a_coin(tokenizer: Any, chat: Chat, tmp_path: Path) -> None:
    model = with_adapter("llama", tokenizer, started=False)
    pairs = referenced(model, pair_rows(chat), tmp_path)
    assert Preference(0.1).summed(model, pairs) / len(pairs) == pytest.approx(0.693147, abs=1e-5)


def test_the_reference_is_measured_once_and_damage_is_seen(tokenizer: Any, chat: Chat, tmp_path: Path) -> None:
    model = with_adapter("llama", tokenizer, started=False)
    rows, cache = pair_rows(chat), tmp_path / "reference.json"
    first = referenced(model, rows, tmp_path)
    assert referenced(None, rows, tmp_path) == first, "read, not computed: there is no model"
    content = json.loads(cache.read_text())
    content["gaps"][0] += 0.5
    cache.write_text(json.dumps(content))
    assert referenced(model, rows, tmp_path) == first, "a changed number is measured again"
    cache.write_bytes(cache.read_bytes()[:-7])
    assert referenced(model, rows, tmp_path) == first
    with pytest.raises(AttributeError):  # another state, other rows: the model is asked
        with_reference(None, rows, cache=cache, state="other", at_once=2)
    with pytest.raises(AttributeError):
        referenced(None, rows[:-1], tmp_path)


def test_pairs_computed_apart_are_the_same(tokenizer: Any, chat: Chat, tmp_path: Path) -> None:
    """For models that let packed sequences see each other."""
    model = with_adapter("llama", tokenizer)
    pairs = referenced(model, pair_rows(chat), tmp_path)
    together, apart = Preference(0.5), Preference(0.5)
    apart.paths = Paths(packed=False)
    losses, gradients = [], []
    for objective in (together, apart):
        losses.append(objective.backward(model, pairs, len(pairs)))
        gradients.append({name: p.grad.clone() for name, p in trainable_parameters(model).items()})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_only_the_last_answer_counts(chat: Chat) -> None:
    talk = [
        {"role": "user", "content": "a red cat"},
        {"role": "assistant", "content": "cat red"},
        {"role": "user", "content": "a blue dog"},
        {"role": "assistant", "content": "dog blue"},
    ]
    pair = make_pair(chat, make_example(talk, source="x", rejected="blue"))
    for tokens, answer in ((pair.chosen, "dog blue"), (pair.rejected, "blue")):
        assert chat.decode([label for label in tokens.labels if label != IGNORED]).strip() == answer
        assert "cat red" in chat.decode(tokens.input_ids)
    assert pair.chosen.labels.count(IGNORED) == pair.rejected.labels.count(IGNORED), "they share the whole prompt"


def test_what_cannot_be_trained_is_said(tokenizer: Any, chat: Chat) -> None:
    lonely = make_example([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], source="f:3")
    with pytest.raises(DataError, match=r"f:3.*rejected"):
        make_pair(chat, lonely)
    with pytest.raises(TrainingError, match="reference"):
        Preference(0.1).summed(build_tiny("llama", tokenizer), [replace(pair_rows(chat)[0], reference=None)])


def test_a_model_that_says_nothing_is_refused(tokenizer: Any, chat: Chat, tmp_path: Path) -> None:
    model = build_tiny("llama", tokenizer)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="no finite probability"):
        referenced(model, pair_rows(chat), tmp_path)
    assert not (tmp_path / "reference.json").exists()
