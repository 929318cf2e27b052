"""Continued pre-training: every token of a document is trained exactly once, and a document's bits are those of the chain rule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish import pipeline
from burnish.data import load
from burnish.errors import DataError, RecipeError
from burnish.evaluation import compare_text
from burnish.models import IGNORED, negative_log_likelihood, tokens_of
from burnish.recipe import build_recipe
from burnish.run import Run
from burnish.tasks import sign_flip_test
from burnish.types import Example
from conftest import COLOURS, THINGS, build_tiny

TEXT = "a red cat and a blue dog sat in the white house; " * 3


def document(text: str, number: int = 0) -> Example:
    return Example(f"{number:016d}", ({"role": "assistant", "content": text},), f"g{number}", f"t:{number}", {"kind": "text"})


# ------------------------------------------------------------------------------------------------------- windows


def test_windows_by_hand(chat: Any) -> None:
    bos, eos = chat.tokenizer.bos_token_id, chat.tokenizer.eos_token_id
    ids = chat.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    whole = [bos, *ids, eos]
    first, second, *rest = chat.text_tokens(TEXT, 16)
    assert first.input_ids == whole[:16]
    assert first.labels == [IGNORED, *whole[1:16]]
    assert second.input_ids == [bos, whole[15], *whole[16:30]]
    assert second.labels == [IGNORED, IGNORED, *whole[16:30]]
    assert rest[-1].input_ids[-1] == rest[-1].labels[-1] == eos
    (one,) = chat.text_tokens(TEXT, 1000)
    assert one.input_ids == whole


@given(text=st.text(max_size=200), length=st.integers(16, 40))
def test_every_token_is_trained_once_and_in_order(chat: Any, text: str, length: int) -> None:
    (whole,) = chat.text_tokens(text, 10_000)
    windows = chat.text_tokens(text, length)
    assert [label for window in windows for label in window.labels if label != IGNORED] == whole.input_ids[1:]
    assert sum(window.target_tokens for window in windows) == len(whole.input_ids) - 1
    assert all(len(window.input_ids) <= length for window in windows)
    assert all(label in (IGNORED, token) for window in windows for token, label in zip(window.input_ids, window.labels, strict=True))


def test_a_control_token_in_a_text_is_letters(chat: Any) -> None:
    (tokens,) = chat.text_tokens("a <eos> b", 100)
    assert tokens.input_ids.count(chat.tokenizer.eos_token_id) == 1
    assert chat.tokenizer.decode(tokens.input_ids[1:-1]) == "a <eos> b"


def test_a_tokenizer_without_a_first_token(chat: Any, tokenizer: Any) -> None:
    import copy

    from burnish.models import make_chat

    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    windows = make_chat(bare, "chatml").text_tokens(TEXT, 16)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert windows[0].input_ids == ids[:16]
    assert windows[1].input_ids == [ids[15], *ids[16:31]]
    assert sum(window.target_tokens for window in windows) == len(ids) - 1


def test_tokens_of_follows_the_objective(chat: Any) -> None:
    text = build_recipe({"model": "m", "data": {"train": "d", "max_length": 16}, "training": {"objective": "text"}})
    assert tokens_of(chat, document(TEXT), text) == chat.text_tokens(TEXT, 16)
    row = Example("x", ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), "g", "s")
    assert tokens_of(chat, row, build_recipe({"model": "m", "data": "d"})) == tokens_of(chat, row) == chat.training_tokens(row)


# ------------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bits_are_those_of_transformers_own_loss(family: str, tokenizer: Any, chat: Any) -> None:
    model = build_tiny(family, tokenizer)
    expected = 0.0
    windows = chat.text_tokens(TEXT, 20)
    for window in windows:
        with torch.no_grad():
            loss = model(torch.tensor([window.input_ids]), labels=torch.tensor([window.labels])).loss
        expected += float(loss) * window.target_tokens
    assert negative_log_likelihood(model, windows) == pytest.approx(expected, rel=1e-5)


def test_a_scaled_head_takes_the_models_own_way(tokenizer: Any, chat: Any) -> None:
    from transformers import AutoModelForCausalLM, CohereConfig

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, logit_scale=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    (window,) = chat.text_tokens(TEXT, 400)
    with torch.no_grad():
        loss = model(torch.tensor([window.input_ids]), labels=torch.tensor([window.labels])).loss
    assert negative_log_likelihood(model, [window]) == pytest.approx(float(loss) * window.target_tokens, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- data


def recipe_of(path: Path, **data: Any) -> Any:
    return build_recipe({"model": "m", "data": {"train": str(path), **data}, "training": {"objective": "text"}})


def test_a_file_is_a_document_and_a_folder_is_several(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\nstill first\n")
    (folder / "deep" / "b.md").write_text("# second\n")
    (folder / "c.jsonl").write_text('{"text": "third"}\n{"text": "fourth", "url": "u"}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    loaded = load(recipe_of(folder))
    found = {example.source.removeprefix(f"{folder}/"): example.reference for example in loaded.splits["train"]}
    assert found == {"a.txt:1": "first\n\nstill first\n", "deep/b.md:1": "# second\n", "c.jsonl:1": "third", "c.jsonl:2": "fourth"}
    assert loaded.sources[0]["format"] == "text"
    assert [example.reference for example in load(recipe_of(folder / "a.txt")).splits["train"]] == ["first\n\nstill first\n"]


def test_documents_that_cannot_be_read_are_problems_with_their_place(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(DataError, match="no document in this folder"):
        load(recipe_of(folder))
    (folder / "a.txt").write_text("  \n")
    (folder / "b.txt").write_text("a\x00b")
    (folder / "c.jsonl").write_text('{"txt": "third"}\n{"text": 4}\n')
    problems = "\n".join(map(str, load(recipe_of(folder)).problems))
    for told in (
        "a.txt:1:text — empty",
        "b.txt:1 — a NUL",
        "c.jsonl:1:text — missing (keys found: txt)",
        "c.jsonl:2:text — not a text: '4'",
    ):
        assert told in problems


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"data": {"train": "d", "format": "chat"}, "training": {"objective": "text"}},
            "data.format: chat does not go with training.objective: text",
        ),
        ({"data": {"train": "d", "format": "text"}}, "data.format: text does not go with training.objective: supervised"),
        ({"data": {"train": "d", "system": "s"}, "training": {"objective": "text"}}, "data.system"),
        ({"data": "d", "training": {"objective": "text"}, "task": {"metric": "bleu"}}, "bits_per_byte"),
    ],
)
def test_what_does_not_go_with_plain_text_is_refused(content: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        build_recipe({"model": "m", **content})


# ------------------------------------------------------------------------------------------------------- the whole story


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Run:
    """Documents of a language that the tiny model learns; some longer than a window, one twice."""
    folder = tmp_path_factory.mktemp("text")
    rows = [" ".join(f"a {COLOURS[(n + i) % 6]} {THINGS[(n * 3 + i) % 10]} {n * 100 + i}." for i in range(3 + n % 9)) for n in range(110)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*rows, rows[0]]))
    recipe = build_recipe(
        {
            "model": {"name": str(tiny_folder), "dtype": "float32"},
            "data": {"train": str(folder / "rows.jsonl"), "max_length": 48, "test_fraction": 0.2, "overlap_ngram": 0},
            "training": {"objective": "text", "method": "lora", "learning_rate": 2e-2, "epochs": 2, "micro_batch_size": 4},
        }
    )
    return pipeline.run_recipe(recipe, folder=folder / "run")


def test_the_verdict_on_plain_text(finished: Run) -> None:
    content = finished.read_json(finished.comparison_file)
    scores = {row["name"]: row["score"] for row in content["candidates"]}
    assert list(scores) == ["base", "tuned"]
    assert scores["tuned"] < 0.7 * scores["base"]
    assert content["verdict"] == "BETTER"
    (item,) = content["comparisons"]
    assert item["difference"] == pytest.approx(scores["tuned"] - scores["base"], abs=1e-5)
    assert item["low"] <= item["difference"] <= item["high"] < 0
    assert "better than its base" in content["sentence"]
    manifest = finished.read_json(finished.manifest_file)
    assert manifest["removed_counts"] == {"duplicate": 1}
    assert "bits per byte" in finished.report_file.read_text().lower()
    assert "Wait for an answer" not in finished.report_file.read_text()


def test_the_number_from_the_files_alone(finished: Run, chat: Any) -> None:
    """Bits of each document from plain PEFT's loss, divided by its bytes, averaged; the p-value of its own test."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, content = finished.recipe(), finished.read_json(finished.comparison_file)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name).eval()
    values: dict[str, list[float]] = {"base": [], "tuned": []}
    test = finished.read_jsonl(finished.split_file("test"))
    for name in values:
        model = base if name == "base" else PeftModel.from_pretrained(base, finished.adapter_folder).eval()
        for row in test:
            text = row["messages"][0]["content"]
            bits = 0.0
            for window in chat.text_tokens(text, 48):
                with torch.no_grad():
                    loss = model(torch.tensor([window.input_ids]), labels=torch.tensor([window.labels])).loss
                bits += float(loss) * window.target_tokens / math.log(2)
            values[name].append(bits / len(text.encode()))
    for row in content["candidates"]:
        assert row["score"] == pytest.approx(sum(values[row["name"]]) / len(test), rel=1e-4)
    assert content["comparisons"][0]["p_value"] == pytest.approx(
        sign_flip_test(values["tuned"], values["base"], resamples=10_000), abs=2e-3
    )


def test_every_target_was_counted(finished: Run, chat: Any) -> None:
    """Two epochs over all training documents: twice their tokens but the first, none dropped."""
    texts = [row["messages"][0]["content"] for row in finished.read_jsonl(finished.split_file("train"))]
    targets = sum(len(chat.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert finished.read_json(finished.training_file)["target_tokens"] == 2 * targets


def test_worse_is_told_as_worse(finished: Run) -> None:
    """The signs, turned around: the base's bits given to the tuned model and the other way about."""
    base, tuned = (finished.predictions_file(name) for name in ("base", "tuned"))
    kept = base.read_bytes(), tuned.read_bytes()
    test = pipeline.dataset_of(finished).test
    try:
        base.write_bytes(kept[1])
        tuned.write_bytes(kept[0])
        content = compare_text(finished, finished.recipe(), test)
    finally:
        base.write_bytes(kept[0])
        tuned.write_bytes(kept[1])
    assert content["verdict"] == "WORSE"
    assert content["comparisons"][0]["low"] > 0


def test_taken_up_again_nothing_is_done_twice(finished: Run) -> None:
    before = [finished.predictions_file(name).stat().st_mtime_ns for name in ("base", "tuned")]
    pipeline.run_recipe(finished.recipe_as_asked(), folder=finished.path)
    assert [finished.predictions_file(name).stat().st_mtime_ns for name in ("base", "tuned")] == before


def test_init_writes_a_recipe_for_plain_text(tmp_path: Path) -> None:
    import yaml

    from burnish.data.start import suggest_recipe

    (tmp_path / "notes.txt").write_text("A note.\n")
    (tmp_path / "rows.txt").write_text('{"prompt": "q", "completion": "a"}\n')
    for name in ("notes.txt", "."):
        recipe = build_recipe(yaml.safe_load(suggest_recipe(str(tmp_path / name), name="n", model="m")))
        assert recipe.training.objective == "text"
    assert "objective" not in yaml.safe_load(suggest_recipe(str(tmp_path / "rows.txt"), name="n", model="m")).get("training", {})


def test_too_few_documents_say_what_to_do(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    recipe = build_recipe({"model": str(tiny_folder), "data": str(tmp_path / "book.txt"), "training": {"objective": "text"}})
    with pytest.raises(DataError, match="cut long ones into several"):
        pipeline.prepare(Run.create(tmp_path / "run", recipe))
