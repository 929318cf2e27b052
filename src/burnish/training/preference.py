"""Direct preference optimisation: from pairs of answers, without a reward model (Rafailov et al. 2023, arXiv 2305.18290).

    margin = β · [(log π(chosen) − log π(rejected)) − (log π₀(chosen) − log π₀(rejected))]        loss = −log σ(margin)

π₀ is the model as it is before the first step: with a fresh adapter the base itself, in a later stage what the stage before made. It never
changes, so its part, one number a pair, is computed once, kept in the run, and no second model stays in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.errors import DataError, TrainingError
from burnish.models import Chat
from burnish.run import hash_of, write_whole
from burnish.training.loss import token_losses
from burnish.training.pack import Paths, flatten
from burnish.types import Example, Tell, Tokens, silent


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Tokens
    rejected: Tokens
    reference: float | None = None  # log π₀(chosen) − log π₀(rejected), nats; None until `with_reference`


class Preference:
    """−log σ(margin) of pairs, nats. A pair's two conversations are computed in one row: they share their prompt."""

    unit = "pair"
    tokens_only = False

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.paths = Paths()
        self._seen: dict[str, float] = {}

    def items(self, chat: Chat, example: Example) -> list[Pair]:
        return [make_pair(chat, example)]

    def sequences(self, item: Pair) -> list[Tokens]:
        return [item.chosen, item.rejected]

    def length(self, item: Pair) -> int:
        return len(item.chosen.input_ids) + len(item.rejected.input_ids)

    def count(self, items: Sequence[Pair]) -> int:
        return len(items)

    def backward(self, model: Any, items: Sequence[Pair], denominator: int) -> float:
        loss = self._losses(model, items).sum() / denominator
        loss.backward()
        return float(loss.detach())

    def summed(self, model: Any, items: Sequence[Pair]) -> float:
        with torch.inference_mode():
            return float(self._losses(model, items).sum())

    def figures(self) -> dict[str, float]:
        """Since the last call: Σ of the margins (TRL's rewards/margins), and the number of pairs whose chosen answer gained on the rejected one."""
        seen, self._seen = self._seen, {}
        return seen

    def _losses(self, model: Any, pairs: Sequence[Pair]) -> Tensor:
        known = [pair.reference for pair in pairs if pair.reference is not None]
        if len(known) < len(pairs):
            raise TrainingError("a preference pair came to training without its reference: `with_reference` comes first. This is our fault")
        gains = answer_gaps(model, pairs, paths=self.paths)
        margins = self.beta * (gains - torch.tensor(known, dtype=gains.dtype, device=gains.device))  # (P,)
        # One pass is exact: d loss ÷ d log π of an answer is one number, which autograd hands to the gradients that the head has kept a row each.
        for name, value in (("reward_margin", margins.detach().sum()), ("preference_accuracy", (margins.detach() > 0).sum())):
            self._seen[name] = self._seen.get(name, 0.0) + float(value)
        return -F.logsigmoid(margins)


def make_pair(chat: Chat, example: Example) -> Pair:
    """Tokens of both conversations; only the last answer counts, and earlier ones are prompt. Raises DataError where there is no rejected one."""
    if example.worse is None:
        raise DataError(f"{example.source}: no rejected answer, which training.objective preference needs")
    return Pair(_last_answer(chat, example), _last_answer(chat, example.worse))


def _last_answer(chat: Chat, example: Example) -> Tokens:
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in example.prompt]
    answer = {**example.messages[len(context)], "weight": 1}
    (tokens,) = chat.training_tokens(replace(example, messages=(*context, answer)))
    return tokens


def answer_gaps(model: Any, pairs: Sequence[Pair], *, paths: Paths | None = None) -> Tensor:
    """(P,) log π(chosen) − log π(rejected), nats, with a graph."""
    sequences = [tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]
    paths = paths or Paths()
    rows = [sequences] if paths.packed else [[tokens] for tokens in sequences]
    sums = []
    for row in rows:
        batch = flatten(row, paths).to(model.device)
        losses = token_losses(model, batch)
        sums.append(torch.zeros(len(row), dtype=losses.dtype, device=losses.device).index_add(0, batch.owners, losses))
    negative = torch.cat(sums)  # (2P,) −log π of each answer
    return negative[1::2] - negative[0::2]


def with_reference(
    model: Any, pairs: Sequence[Pair], *, cache: Path, state: str, at_once: int, paths: Paths | None = None, tell: Tell = silent
) -> list[Pair]:
    """The pairs with what the model says of them before the first step; call it before any trained weights are put back.

    `state` names all that decides the numbers but the pairs' tokens: weights, where they start, compute type. The same state and pairs are
    read from `cache`, so that a run which goes on does not compute them again.
    """
    inputs = hashlib.sha256(state.encode())
    for pair in pairs:
        inputs.update(json.dumps([part for t in (pair.chosen, pair.rejected) for part in (t.input_ids, t.labels)]).encode())
    gaps = _read(cache, inputs.hexdigest())
    if gaps is None:
        gaps = _measure(model, pairs, at_once, paths, tell)
        content = {"inputs": inputs.hexdigest(), "gaps": gaps, "sha256": hash_of(gaps)}
        write_whole(cache, json.dumps(content).encode())
    return [replace(pair, reference=gap) for pair, gap in zip(pairs, gaps, strict=True)]


def _measure(model: Any, pairs: Sequence[Pair], at_once: int, paths: Paths | None, tell: Tell) -> list[float]:
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].chosen.input_ids) + len(pairs[index].rejected.input_ids))
    gaps = [0.0] * len(pairs)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            for index, gap in zip(chosen, answer_gaps(model, [pairs[i] for i in chosen], paths=paths).tolist(), strict=True):
                gaps[index] = gap
            tell("reference", min(start + at_once, len(order)), len(order), "what the model says of each pair before training")
    model.train(was_training)
    bad = [index for index, gap in enumerate(gaps) if not math.isfinite(gap)]
    if bad:
        raise TrainingError(f"{len(bad)} pairs have no finite probability before training (the first is pair {bad[0]}, counted from 0)")
    return gaps


def _read(cache: Path, inputs: str) -> list[float] | None:
    """What an earlier call wrote for the same inputs; anything else, damage too, is computed again."""
    try:
        content = json.loads(cache.read_bytes())
        whole = content["inputs"] == inputs and content["sha256"] == hash_of(content["gaps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return list(content["gaps"]) if whole else None
