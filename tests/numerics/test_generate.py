"""Batched generation with shared prefixes against transformers' own `generate`, one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.models import Chat, Limits, Sampling, generate

FAMILIES = ("llama", "gemma3")


def reference(model: Any, chat: Chat, prompt: list[int], tokens: int) -> tuple[list[int], str]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=tokens, do_sample=False,
            eos_token_id=list(chat.stop_ids), pad_token_id=0,
        )[0][len(prompt) :].tolist()  # fmt: skip
    return out, "stop" if out[-1] in chat.stop_ids else "length"


def prompts_of(chat: Chat, shared: str) -> list[list[int]]:
    questions = ["red cat", "a green dog and a blue house", "hat", "fish " * 9, "a yellow boat", "bird bird cup", "x", "a white tree 12345"]
    head = [{"role": "system", "content": shared}] if shared else []
    return [chat.prompt_ids([*head, {"role": "user", "content": q}]) for q in questions]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "shared", ["", "You are a helpful painter of small animals, houses and boats. Answer briefly. " * 2], ids=["plain", "prefix"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_equals_one_by_one(family: str, shared: str, batch_size: int, chat: Chat, tiny_models: Callable[[str], Any]) -> None:
    """Also where the whole prompt is longer than the sliding window (6) and batches hold padding."""
    model, prompts = tiny_models(family), prompts_of(chat, shared)
    found = {index: answer for batch in generate(model, chat, prompts, Limits(20), batch_size=batch_size) for index, answer in batch}
    assert sorted(found) == list(range(len(prompts)))
    texts = set()
    for index, prompt in enumerate(prompts):
        tokens, reason = reference(model, chat, prompt, 20)
        assert found[index].text == chat.decode(tokens).strip()
        assert found[index].finish_reason == reason
        assert found[index].completion_tokens == len(tokens)
        assert found[index].prompt_tokens == len(prompt)
        texts.add(found[index].text)
    assert len(texts) > 1, "the tiny model answers everything alike: this test would not see a mix-up"


def test_a_stop_token_ends_one_request_and_not_its_neighbours(chat: Chat, tiny_models: Callable[[str], Any]) -> None:
    model, prompts = tiny_models("llama"), prompts_of(chat, "")
    free = [reference(model, chat, prompt, 12)[0] for prompt in prompts]
    # Declare a token a stop token that ends one answer early and does not stand in all of them.
    token = next(t for answer in free for t in answer[1:6] if any(t not in other for other in free))
    stopping = Chat(chat.tokenizer, chat.template, chat.template_name, (*chat.stop_ids, token))
    found = {index: answer for batch in generate(model, stopping, prompts, Limits(12)) for index, answer in batch}
    assert any(answer.finish_reason == "stop" for answer in found.values())
    for index, prompt in enumerate(prompts):
        tokens, reason = reference(model, stopping, prompt, 12)
        assert (found[index].completion_tokens, found[index].finish_reason) == (len(tokens), reason)


def test_stop_texts_cut_the_answer(chat: Chat, tiny_models: Callable[[str], Any]) -> None:
    model, prompts = tiny_models("llama"), prompts_of(chat, "")[:3]
    free = {index: answer for batch in generate(model, chat, prompts, Limits(12)) for index, answer in batch}
    row = max(free, key=lambda index: len(free[index].text))
    text = free[row].text
    stop = next(char for char in text[1:] if char.strip())
    found = {index: answer for batch in generate(model, chat, prompts, Limits(12, (stop,))) for index, answer in batch}
    assert found[row].text == text[: text.find(stop, 1)].strip()
    assert found[row].finish_reason == "stop_text"
    assert found[row].completion_tokens <= free[row].completion_tokens


def test_a_fenced_answer_is_not_cut_at_its_first_line() -> None:
    from burnish.models.generate import _cut

    limits = Limits(9, ("\n",))
    assert _cut('```json\n{"a": 1}', limits) is None
    assert _cut('```json\n{"a": 1}\n```\nmore', limits) == len('```json\n{"a": 1}\n```')
    assert _cut("plain\nmore", limits) == 5


@pytest.mark.model
def test_gemma_batched_equals_one_by_one(gemma: Any) -> None:
    """In float32, so that rounding does not choose between near-equal words."""
    chat, model = gemma
    shots = [{"role": "user", "content": "the capital of France"}, {"role": "assistant", "content": "Paris"}]
    questions = ["the capital of Germany", "the capital of Italy, please", "2 + 2"]
    prompts = [chat.prompt_ids([*shots, {"role": "user", "content": q}]) for q in questions]
    exact = model.float()
    try:
        found = {index: answer for batch in generate(exact, chat, prompts, Limits(6)) for index, answer in batch}
        for index, prompt in enumerate(prompts):
            assert found[index].text == chat.decode(reference(exact, chat, prompt, 6)[0]).strip()
    finally:
        model.bfloat16()
    assert found[0].text.startswith("Berlin")


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_follow_the_distribution(family: str, chat: Chat, tiny_models: Callable[[str], Any]) -> None:
    """First tokens of 1,500 draws against softmax(logits / temperature) of one plain forward pass: chi-square over the likely tokens."""
    from scipy.stats import chisquare

    model, prompt, n = tiny_models(family), prompts_of(chat, "")[0], 1500
    sampling = Sampling(0.8, list(range(n)))
    texts = [
        answer.text for batch in generate(model, chat, [prompt] * n, Limits(1), batch_size=300, sampling=sampling) for _, answer in batch
    ]
    with torch.inference_mode():
        chances = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.8, -1)
    expected: dict[str, float] = {}
    for token, chance in enumerate(chances.tolist()):
        text = "" if token in chat.stop_ids else chat.decode([token]).strip()
        expected[text] = expected.get(text, 0.0) + chance
    likely = [text for text, chance in expected.items() if chance * n >= 8]
    assert len(likely) > 5, "the tiny model is sure of its token: this test would see nothing"
    seen = [sum(text == wanted for text in texts) for wanted in likely]
    rest = 1 - sum(expected[text] for text in likely)
    assert chisquare([*seen, n - sum(seen)], [n * expected[text] for text in likely] + [n * rest]).pvalue > 0.001


def test_a_draw_does_not_depend_on_its_neighbours(chat: Chat, tiny_models: Callable[[str], Any]) -> None:
    model, prompts = tiny_models("llama"), prompts_of(chat, "")
    sampling = Sampling(0.9, [7 * n for n in range(len(prompts))])

    def drawn(batch_size: int) -> dict[int, str]:
        return {
            i: answer.text
            for batch in generate(model, chat, prompts, Limits(12), batch_size=batch_size, sampling=sampling)
            for i, answer in batch
        }

    assert drawn(1) == drawn(3) == drawn(8)
    other = Sampling(0.9, [7 * n + 1 for n in range(len(prompts))])
    assert drawn(8) != {i: answer.text for batch in generate(model, chat, prompts, Limits(12), sampling=other) for i, answer in batch}
    cold = Sampling(1e-4, [1] * len(prompts))
    greedy = {i: answer.text for batch in generate(model, chat, prompts, Limits(12)) for i, answer in batch}
    assert {i: answer.text for batch in generate(model, chat, prompts, Limits(12), sampling=cold) for i, answer in batch} == greedy
