"""How candidates are asked: what they may read, how long they may answer, and on which rows their prompts are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from burnish.evaluation.candidates import Context, make_context
from burnish.models import Chat, Limits
from burnish.recipe import Recipe
from burnish.tasks import Task
from burnish.types import Example

LONGEST_CONTEXT_TOKENS = 4096  # of a baseline's prompt, even where the model could read more: it is what measuring costs


def ask(model: Any, recipe: Recipe, train: Sequence[Example], chat: Chat, task: Task) -> tuple[Context, Limits]:
    """What a model's candidates are given, from the training rows and the model's own context window."""
    limits = limits_for(train, int(recipe.evaluation.max_new_tokens))
    window = int(getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST_CONTEXT_TOKENS))
    room = max(64, min(window, LONGEST_CONTEXT_TOKENS) - limits.max_new_tokens)
    return make_context(chat, task, train, instruction=recipe.task.instruction, prompt_limit=room), limits


def selection_rows(validation: Sequence[Example], recipe: Recipe) -> list[Example]:
    """The validation rows on which prompts are chosen."""
    return sorted(validation, key=lambda example: example.id)[: recipe.evaluation.selection_rows]


def limits_for(train: Sequence[Example], max_new_tokens: int) -> Limits:
    """Where no training answer has a line break, an untrained model's answer ends at the first one; likewise with empty lines."""
    references = [example.reference.strip() for example in train]
    for stop in ("\n", "\n\n"):
        if not any(stop in text for text in references):
            return Limits(max_new_tokens, (stop,))
    return Limits(max_new_tokens)
