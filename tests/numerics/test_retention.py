"""What suites measure, against plain transformers row by row; intervals and tests against scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from burnish.advice import Pair, change_interval, judge_retention
from burnish.evaluation import Ground, Measured, Suite, measure_suite
from burnish.evaluation.suites import Item
from burnish.models import IGNORED, continuation_tokens, score_continuations

QUESTIONS = [
    ({"query": "Question: a red cat", "choices": ["cat red", "house blue and green", "x"], "gold": 0}, "Question: a red cat\nAnswer:"),
    ({"query": "a blue dog ", "choices": ["dog blue", "dog"], "gold": 1}, "a blue dog"),
    (
        {"query": "The white house", "choices": ["is white", "is a very long text of many words that goes on", "ist weiß"], "gold": 2},
        "The white house",
    ),
    ({"query": "a", "choices": ["b", "c", "d", "e"], "gold": 3}, "a"),
]


def naive(model: Any, chat: Any, context: str, text: str) -> tuple[float, bool]:
    """(log p(text | context), greedy): one row, no batch, transformers' own forward pass and torch's own softmax."""
    tokenizer = chat.tokenizer
    whole = [tokenizer.bos_token_id, *tokenizer(context + text, add_special_tokens=False)["input_ids"]]
    before = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    assert whole[: len(before)] == before, "these rows have no token across the border"
    with torch.no_grad():
        log = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), dim=-1)
    picked = [(log[at - 1, whole[at]].item(), int(log[at - 1].argmax()) == whole[at]) for at in range(len(before), len(whole))]
    return sum(value for value, _ in picked), all(right for _, right in picked)


def suite_of(kind: str, rows: list[dict[str, Any]]) -> Suite:
    return Suite("s", kind, tuple(Item(f"{number:04d}", row, f"s.jsonl:{number + 1}") for number, row in enumerate(rows)))


def measured(tmp_path: Path, model: Any, chat: Any, suite: Suite) -> list[Measured]:
    return list(measure_suite(tmp_path / "rows.jsonl", "w", lambda: model, suite, Ground(chat, 512, 4)).values())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_choices_against_a_row_by_row_computation(family: str, tiny_models: Callable[[str], Any], chat: Any, tmp_path: Path) -> None:
    """Batched and padded, with a sliding window in gemma3, the length-normalised log-likelihoods are those of single forward passes."""
    model = tiny_models(family)
    found = measured(tmp_path, model, chat, suite_of("choice", [row for row, _ in QUESTIONS]))
    for (row, context), one in zip(QUESTIONS, found, strict=True):
        rates = [naive(model, chat, context, f" {text}")[0] / len(text.encode()) for text in row["choices"]]
        best = int(np.argmax(rates))
        assert one.facts["answer"] == row["choices"][best]
        assert one.value == float(best == row["gold"])
        assert one.facts["nats_per_byte"] == pytest.approx(-rates[row["gold"]], rel=1e-4)
    assert {one.value for one in found} == {0.0, 1.0} or len({one.facts["answer"] for one in found}) > 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_last_words_against_a_row_by_row_computation(family: str, tiny_models: Callable[[str], Any], chat: Any, tmp_path: Path) -> None:
    model = tiny_models(family)
    contexts = ["He had a red", "In the white house was a", "a", "One two three four five six seven eight nine ten, a blue"]
    # What the model itself would write after the first context is greedy by construction.
    ids = chat.text_ids(contexts[0])
    with torch.no_grad():
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    sequences = [continuation_tokens(chat, context, " cat", 512) for context in contexts]
    written = type(sequences[0])([*ids, token], [IGNORED] * len(ids) + [token])
    found = score_continuations(model, [*sequences, written])
    for context, one in zip(contexts, found, strict=False):
        expected, greedy = naive(model, chat, context, " cat")
        assert one.nats == pytest.approx(-expected, rel=1e-4)
        assert one.greedy == greedy
    assert found[-1].greedy
    rows = [{"context": context, "continuation": "cat"} for context in contexts]
    assert [one.value for one in measured(tmp_path, model, chat, suite_of("continuation", rows))] == [
        float(one.greedy) for one in found[:4]
    ]


def test_bits_per_byte_against_a_row_by_row_computation(tiny_models: Callable[[str], Any], chat: Any, tmp_path: Path) -> None:
    model, text = tiny_models("llama"), "Ein weißes Haus, a red cat."
    (one,) = measured(tmp_path, model, chat, suite_of("text", [{"text": text}]))
    log, _ = naive(model, chat, "", text)
    ids = chat.text_ids(text)
    with torch.no_grad():
        end = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), dim=-1)[chat.tokenizer.eos_token_id].item()
    assert one.value == pytest.approx(-(log + end) / math.log(2) / len(text.encode()), rel=1e-5)


def test_tokens_across_the_border_and_too_long_ones(chat: Any) -> None:
    """A token that context and continuation share is scored; what does not fit loses the beginning of its context, never of what is scored."""
    context, text = "a red c", "at"
    tokens = continuation_tokens(chat, context, text, 512)
    whole = chat.text_ids(context + text)
    assert tokens.input_ids == whole
    scored = [label for label in tokens.labels if label != IGNORED]
    assert chat.tokenizer.decode(scored).endswith("at")
    short = continuation_tokens(chat, "one two three four five six", " seven", 16)
    assert len(short.input_ids) <= 16
    assert short.input_ids[0] == chat.tokenizer.bos_token_id
    assert [label for label in short.labels if label != IGNORED] == short.input_ids[-short.target_tokens :]
    with pytest.raises(ValueError, match="must fit"):
        continuation_tokens(chat, "a", " b" * 40, 16)


def pair(name: str, before: Any, after: Any, **more: Any) -> Pair:
    return Pair(name, name, tuple(map(float, before)), tuple(map(float, after)), **more)


def test_the_interval_against_scipy() -> None:
    """One suite: scipy's percentile bootstrap of the same differences. Two: the normal interval of the mean of two independent means."""
    random = np.random.default_rng(0)
    before, after = (random.random(300) < 0.6).astype(float), (random.random(300) < 0.5).astype(float)
    one = pair("a", before, after)
    change, low, high = change_interval([one], confidence=0.95, resamples=20_000, seed=1)
    expected = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert change == pytest.approx((after - before).mean())
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.006)
    bits = random.normal(1.0, 0.1, 80)
    two = pair("b", bits, bits * 1.1 + random.normal(0, 0.02, 80), lower_is_better=True)
    parts = [np.asarray(after - before), -(np.asarray(two.after) - np.asarray(two.before)) / bits.mean()]
    mean = sum(part.mean() for part in parts) / 2
    error = math.sqrt(sum(part.var() / part.size for part in parts)) / 2
    change, low, high = change_interval([one, two], confidence=0.95, resamples=20_000, seed=1)
    assert change == pytest.approx(mean)
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.004)


def test_the_tests_against_scipy() -> None:
    """McNemar as the binomial test of the rows that changed; Holm over both suites and the whole."""
    before, after = [1.0] * 40 + [0.0] * 20, [1.0] * 22 + [0.0] * 18 + [1.0] * 4 + [0.0] * 16
    found = judge_retention([pair("a", before, after), pair("b", [0.5, 0.7, 0.9], [0.5, 0.7, 0.9])])
    expected = stats.binomtest(18, 22, 0.5).pvalue
    assert found["suites"][0]["p_value"] == pytest.approx(expected)
    ordered = sorted([expected, found["suites"][1]["p_value"], found["whole"]["p_value"]])
    assert found["suites"][1]["p_value"] == 1.0
    assert min(row["p_adjusted"] for row in (*found["suites"], found["whole"])) == pytest.approx(3 * ordered[0])


def test_false_alarms_are_rare() -> None:
    """400 pairs of models that differ by chance alone, in three suites of different sizes: LOST at most in 5 % (and a little for chance)."""
    random = np.random.default_rng(7)
    alarms = 0
    for seed in range(400):
        pairs = []
        for name, n in (("a", 60), ("b", 30), ("c", 25)):
            rate = random.random(n)
            pairs.append(pair(name, random.random(n) < rate, random.random(n) < rate))
        alarms += judge_retention(pairs, resamples=400, seed=seed)["verdict"] == "LOST"
    assert alarms <= 0.05 * 400 + 9, "two standard errors above 5 %"
