"""The loss mask, counted by hand, and training prompts against generation prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.errors import ModelError
from burnish.models import IGNORED, Chat, make_chat
from burnish.types import Example


def example(*turns: tuple[str, str] | tuple[str, str, int]) -> Example:
    messages = tuple({"role": t[0], "content": t[1], **({"weight": t[2]} if len(t) == 3 else {})} for t in turns)
    return Example("x", messages, "x", "here:1")


class Words:
    """A stand-in tokenizer in which one word is one token, so that a person can count. Control words stand in < >."""

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.eos_token_id = self("<eos>")["input_ids"][0]
        self.chat_template = None
        self.all_special_tokens = ["<eos>", "<user>", "<bot>", "<end>"]
        for token in self.all_special_tokens:
            self(token)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        from tokenizers import AddedToken

        return {self.words[t]: AddedToken(t, special=True) for t in self.all_special_tokens if t in self.words}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.words.setdefault(word, len(self.words)) for word in text.split()]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        names = {index: word for word, index in self.words.items()}
        return [names[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.convert_ids_to_tokens(ids))

    def apply_chat_template(self, messages: Any, *, chat_template: str, tokenize: bool, add_generation_prompt: bool) -> str:
        from jinja2 import Template

        return Template(chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt)


WORDS_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}<user> {{ m.content }} "
    "{% else %}<bot> {{ m.content }} <end> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture
def words(tmp_path: Any) -> Chat:
    path = tmp_path / "words.jinja"
    path.write_text(WORDS_TEMPLATE)
    return make_chat(Words(), str(path))


def shown(chat: Chat, row: Example) -> list[list[str]]:
    """For each sequence: its words, the trained ones in [ ]."""
    return [
        [f"[{w}]" if label != IGNORED else w for w, label in zip(chat.tokenizer.convert_ids_to_tokens(t.input_ids), t.labels, strict=True)]
        for t in chat.training_tokens(row)
    ]


# Five conversations written out, with the target tokens counted by hand.
CASES = [
    (example(("user", "hi"), ("assistant", "hello you")), ["<user> hi <bot> [hello] [you] [<end>]"], 3),
    (example(("system", "be kind"), ("user", "hi"), ("assistant", "ok")), ["be kind <user> hi <bot> [ok] [<end>]"], 2),
    (
        example(("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")),
        ["<user> a <bot> [b] [c] [<end>] <user> d <bot> [e] [<end>]"],
        5,
    ),
    (
        example(("user", "a"), ("assistant", "b c", 0), ("user", "d"), ("assistant", "e f g")),
        ["<user> a <bot> b c <end> <user> d <bot> [e] [f] [g] [<end>]"],
        4,
    ),
    (
        example(("user", "a"), ("assistant", "b", 1), ("user", "d"), ("assistant", "e", 0), ("user", "f"), ("assistant", "g")),
        ["<user> a <bot> [b] [<end>] <user> d <bot> e <end> <user> f <bot> [g] [<end>]"],
        4,
    ),
]


@pytest.mark.parametrize(("row", "expected", "targets"), CASES)
def test_five_conversations_counted_by_hand(words: Chat, row: Example, expected: list[str], targets: int) -> None:
    assert [" ".join(s) for s in shown(words, row)] == expected
    assert sum(t.target_tokens for t in words.training_tokens(row)) == targets


def test_plain_template_counts_on_a_real_tokenizer(chat: Chat) -> None:
    row = example(("user", "a red cat"), ("assistant", "cat red"))
    (tokens,) = chat.training_tokens(row)
    answer = chat.tokenizer(" cat red", add_special_tokens=False)["input_ids"]
    assert [t for t, label in zip(tokens.input_ids, tokens.labels, strict=True) if label != IGNORED] == [
        *answer,
        chat.tokenizer.eos_token_id,
    ]
    assert tokens.target_tokens == len(answer) + 1
    assert tokens.input_ids[0] == chat.tokenizer.bos_token_id
    assert tokens.input_ids.count(chat.tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_history_gives_one_sequence_per_turn(chat: Chat) -> None:
    """The plain template ends only the last answer with the stop token, so each trained turn is a sequence of its own."""
    row = example(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    sequences = chat.training_tokens(row)
    assert len(sequences) == 2
    for sequence, messages in zip(sequences, (row.messages[:1], row.messages[:3]), strict=True):
        prompt = chat.prompt_ids(messages)
        assert sequence.input_ids[: len(prompt)] == prompt
        assert sequence.labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert sequence.labels[-1] == chat.tokenizer.eos_token_id


text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda t: bool(t.strip()))


@given(question=text, answer=text, system=st.none() | text)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_training_prompt_equals_generation_prompt(chat: Chat, question: str, answer: str, system: str | None) -> None:
    turns = [("system", system)] if system is not None else []
    row = example(*turns, ("user", question), ("assistant", answer))
    (tokens,) = chat.training_tokens(row)
    prompt = chat.prompt_ids(row.prompt)
    assert tokens.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORED for label in tokens.labels[: len(prompt)])
    assert tokens.labels[len(prompt) :] == tokens.input_ids[len(prompt) :]
    assert tokens.input_ids[-1] in chat.stop_ids


@given(before=text, token=st.sampled_from(["<eos>", "<bos>", "<|im_end|>", "<|im_start|>", "<pad>"]), after=text)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_never_becomes_a_control_token(chat: Chat, before: str, token: str, after: str) -> None:
    ids = chat.prompt_ids([{"role": "user", "content": f"{before}{token}{after}"}])
    control = {i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in ids if i in control] == [chat.tokenizer.bos_token_id]  # the template's own, once
    assert token in chat.tokenizer.decode(ids, skip_special_tokens=False)


def test_chatml_trains_its_own_stop_token(tokenizer: Any) -> None:
    chatml = make_chat(tokenizer, "chatml")
    (tokens,) = chatml.training_tokens(example(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokens.input_ids[-1] == stop
    assert [label for label in tokens.labels if label == stop] == [stop, stop]


def test_a_template_without_stop_token_is_refused(tokenizer: Any, tmp_path: Any) -> None:
    path = tmp_path / "endless.jinja"
    path.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(ModelError, match="never learn to stop"):
        make_chat(tokenizer, str(path))


def test_control_tokens_before_the_answer_do_not_end_it(tokenizer: Any, tmp_path: Any) -> None:
    """gpt-oss and Cohere open the answer with a control token of its own, after the generation prompt."""
    path = tmp_path / "channels.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}bot<|im_start|>final{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}bot{% endif %}"
    )
    channels = make_chat(tokenizer, str(path))
    assert channels.stop_ids[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tokens,) = channels.training_tokens(example(("user", "a red cat"), ("assistant", "cat red")))
    trained = tokenizer.decode([label for label in tokens.labels if label != IGNORED])
    assert trained == "<|im_start|>finalcat red<|im_end|>"


def test_a_template_that_differs_between_training_and_generation_is_refused(tokenizer: Any, tmp_path: Any) -> None:
    path = tmp_path / "two-faced.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}bot says{% endif %}"
    )
    with pytest.raises(ModelError, match=r"First difference at token \d+"):
        make_chat(tokenizer, str(path))


@pytest.mark.model
def test_gemma_training_prompt_equals_generation_prompt(gemma: Any) -> None:
    chat, _ = gemma
    for question in ("turn on the light", "  spaces  ", "a\n\nb", "Output:", "<start_of_turn>user", "🙂 ünï"):
        row = example(("user", question), ("assistant", '{"intent": "HassTurnOn"}'))
        (tokens,) = chat.training_tokens(row)
        prompt = chat.prompt_ids(row.prompt)
        assert tokens.input_ids[: len(prompt)] == prompt
        assert chat.decode([t for t in tokens.labels if t != IGNORED]).strip() == '{"intent": "HassTurnOn"}'
        assert tokens.labels[-1] == chat.tokenizer.eos_token_id
