"""Messages ↔ tokens: the one place. Training, evaluation and serving all come through here.

One rule instead of a table of templates. For each assistant turn that is trained:

    prompt = template(messages before it, add_generation_prompt)      what the model is given when it has to answer
    full   = template(messages up to and including it)                what the model should have written

`full` must start with `prompt`. The labels ignore the prompt and keep the rest up to and including the stop token:

    <bos> Input : ␣hi ⏎ Output :   ␣hello <eos>
    ─────────── ignored ────────   ─ trained ─

So training and generation agree by construction, and the stop token is always learnt. A text can never produce a control token.

Plain text (`training.objective: text`) has no turns: `text_tokens`. `tokens_of` is what everybody calls: it follows the recipe's objective.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from burnish.errors import ModelError
from burnish.recipe import Recipe
from burnish.run import hash_of
from burnish.types import Example, Message, Tokens

IGNORED = -100  # the label of a token that is not trained; torch's cross_entropy ignores it too
TEMPLATES = ("plain", "chatml")


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its template."""

    tokenizer: Any  # transformers' PreTrainedTokenizerBase
    template: str  # Jinja source
    template_name: str  # `own`, a shipped name, or a file
    stop_ids: tuple[int, ...]  # what ends an assistant turn; the first is the one the template writes

    @property
    def template_hash(self) -> str:
        return hash_of(self.template)

    @cached_property
    def _controls(self) -> tuple[set[str], re.Pattern[str]]:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special and token.content.strip()}
        special |= {token for token in self.tokenizer.all_special_tokens if token.strip()}
        longest_first = sorted(special, key=lambda token: (-len(token), token))
        return {token[0] for token in special}, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find_control(self, text: str) -> str | None:
        """The first control token that stands in the text as characters, or None."""
        firsts, pattern = self._controls
        # Thousands of names are searched only where one of their few first letters stands.
        if not any(first in text for first in firsts):
            return None
        found = pattern.search(text)
        return found.group() if found else None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation. Raises ModelError where the template refuses it (say, a system message it does not know)."""
        plain = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                plain, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as problem:  # jinja2 errors and whatever a template raises
            raise ModelError(f"the chat template ({self.template_name}) refuses this conversation: {problem}") from problem
        return str(text)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        """Token ids of a conversation. Control tokens come from the template only; in a text they are read letter by letter."""
        if all(self.find_control(m["content"]) is None for m in messages):
            return self._ids(self.render(messages, add_generation_prompt=add_generation_prompt))
        _, pattern = self._controls
        left, right = _unused_marks(messages)
        hidden: list[str] = []

        def hide(found: re.Match[str]) -> str:
            hidden.append(found.group())
            return f"{left}{len(hidden) - 1}{right}"

        masked = [{**m, "content": pattern.sub(hide, m["content"])} for m in messages]
        pieces = re.split(f"{left}(\\d+){right}", self.render(masked, add_generation_prompt=add_generation_prompt))
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            ids += self._ids(piece) if index % 2 == 0 else self._ids(hidden[int(piece)], as_text=True)
        return ids

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What the model is given to answer after these messages."""
        return self.encode(messages, add_generation_prompt=True)

    def training_tokens(self, example: Example) -> list[Tokens]:
        """The sequences that an example is trained as: one, unless the template writes a turn otherwise once others follow it.

        Raises ModelError where the template breaks the rule at the top of this file, with the first token that differs.
        """
        sequences: list[Tokens] = []
        for index, message in enumerate(example.messages):
            if message["role"] != "assistant" or message.get("weight", 1) == 0:
                continue
            prompt = self.encode(example.messages[:index], add_generation_prompt=True)
            full = self.encode(example.messages[: index + 1], add_generation_prompt=False)
            end = self._turn_end(prompt, full, f"messages[{index}]")
            before = sequences[-1] if sequences else None
            if before is not None and full[: len(before.input_ids)] == before.input_ids:
                sequences.pop()
                labels = before.labels + [IGNORED] * (len(prompt) - len(before.labels)) + full[len(prompt) : end]
            else:
                labels = [IGNORED] * len(prompt) + full[len(prompt) : end]
            sequences.append(Tokens(full[:end], labels))
        return sequences

    def text_tokens(self, text: str, max_length: int) -> list[Tokens]:
        """A document as windows of at most `max_length` tokens: every token but the first is a target, in exactly one window.

            <bos> a b c d <eos>, 4 at once →   <bos> a b c     <bos> c d <eos>
                                                     - - -           - -----     trained

        A later window begins with <bos>, where the tokenizer has one, and the last token of the window before, neither of them trained.
        (Gemma 3 270M, windows of 512 tokens of this project's design page: 4.55 nats a token so, 5.36 without the <bos>.)
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        head = [] if bos is None else [bos]
        body = self._ids(text, as_text=self.find_control(text) is not None)
        ids = [*head, *body, self.stop_ids[0] if eos is None else eos]
        windows = [Tokens(ids[:max_length], [IGNORED, *ids[1:max_length]])]
        room = max_length - len(head) - 1  # targets in a later window
        for start in range(max_length, len(ids), room):
            fresh = ids[start : start + room]
            windows.append(Tokens([*head, ids[start - 1], *fresh], [IGNORED] * (len(head) + 1) + fresh))
        return windows

    def text_ids(self, text: str) -> list[int]:
        """Plain text as tokens, after <bos> where the tokenizer has one; control tokens in it are read letter by letter."""
        bos = self.tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *self._ids(text, as_text=self.find_control(text) is not None)]

    def segments(self, tokens: Tokens) -> list[tuple[str, bool]]:
        """(text, trained) runs of a sequence, for showing the mask. Control tokens are written out."""
        runs: list[tuple[list[int], bool]] = []
        for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
            trained = label != IGNORED
            if runs and runs[-1][1] == trained:
                runs[-1][0].append(token)
            else:
                runs.append(([token], trained))
        return [(self.tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in runs]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _ids(self, text: str, *, as_text: bool = False) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"])

    def _turn_end(self, prompt: list[int], full: list[int], where: str) -> int:
        if full[: len(prompt)] != prompt:
            at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
            show = self.tokenizer.convert_ids_to_tokens
            raise ModelError(
                f"{where}: the template ({self.template_name}) writes another prompt for training than for generation. First difference at token "
                f"{at}: generation has {show(prompt[at : at + 4])}, training has {show(full[at : at + 4])}. Choose another model.chat_template"
            )
        for index in range(len(prompt), len(full)):
            if full[index] in self.stop_ids:
                return index + 1
        raise ModelError(f"{where}: the template ({self.template_name}) writes no stop token after the answer, so it could never be learnt")


def tokens_of(chat: Chat, example: Example, recipe: Recipe | None = None) -> list[Tokens]:
    """The sequences an example is trained as, by the recipe's objective (none: supervised)."""
    if recipe is not None and recipe.training.objective == "text":
        return chat.text_tokens(example.reference, recipe.data.max_length)
    return chat.training_tokens(example)


def make_chat(tokenizer: Any, chat_template: str) -> Chat:
    """Join a tokenizer with the template that the recipe names, and prove on a short conversation that the two work together."""
    template, name = _find_template(tokenizer, chat_template)
    end_ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    probe = Chat(tokenizer, template, name, tuple(end_ids))
    conversation: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    # What the template writes after the answer's text; some (gpt-oss, Cohere) write control tokens before it, too.
    after = probe.render(conversation, add_generation_prompt=False).rpartition("answer")[2]
    control_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(end_ids)
    written = [token for token in probe._ids(after) if token in control_ids]
    if not written:
        raise ModelError(
            f"the template ({name}) writes no control token after an answer, so the model would never learn to stop. "
            f"Choose a shipped model.chat_template ({', '.join(TEMPLATES)}) or one made for this tokenizer"
        )
    chat = Chat(tokenizer, template, name, tuple(dict.fromkeys([written[0], *end_ids])))
    (tokens,) = chat.training_tokens(Example("probe", tuple(conversation), "probe", "a short conversation"))
    if "answer" not in tokenizer.decode([label for label in tokens.labels if label != IGNORED]):
        raise ModelError(f"the template ({name}): its stop token stands before the answer too, so the answer would not be trained")
    return chat


def _find_template(tokenizer: Any, wanted: str) -> tuple[str, str]:
    if wanted == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if own:
            return str(own), "own"
        wanted = "plain"
    if wanted in TEMPLATES:
        return resources.files("burnish.models").joinpath(f"templates/{wanted}.jinja").read_text(encoding="utf-8"), wanted
    path = Path(wanted)
    if path.suffix in (".jinja", ".j2") and path.is_file():
        return path.read_text(encoding="utf-8"), path.name
    raise ModelError(
        f"model.chat_template: {wanted}: no such template; expected auto, {', '.join(TEMPLATES)}, or a .jinja file that exists"
    )


def _unused_marks(messages: Sequence[Message]) -> tuple[str, str]:
    """Two private-use characters that stand in none of the messages."""
    used = set("".join(m["content"] for m in messages))
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used)
    return next(free), next(free)
