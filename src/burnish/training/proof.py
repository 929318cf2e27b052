"""Success needs proof: what was saved is read back from the disk, as a stranger would read it, and answers.

    an adapter      a second adapter is made beside the trained one from adapter_config.json and the tensors of the folder; only that one computes
    whole weights   a second model is read from the folder

Neither takes anything from the weights in memory, so a tensor or a line of the config that was saved wrong cannot hide behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from torch import Tensor

from burnish.errors import TrainingError
from burnish.models import Chat, Limits, generate, load_adapter, trainable_parameters, verify_adapter
from burnish.training.checkpoint import weights_digest
from burnish.training.objective import Objective
from burnish.training.pack import Paths

_PROMPT = "Hello"
_NEW_TOKENS = 4
_AGAIN = "read_back"  # the name of the second adapter
# What PEFT writes about the moment of saving, not about the adapter.
_OF_THE_MOMENT = ("inference_mode", "peft_version", "auto_mapping", "revision")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


def prove(
    model: Any, chat: Chat, folder: Path, base_sha256: str, *, objective: Objective, items: Sequence[Any], digest: str
) -> dict[str, Any]:
    """Read what was saved back from the disk, compute a loss with it, and let it answer a fixed prompt. The model stays as it was.

    `digest`: of the trained weights at the moment they were saved; what comes back must be these, bit for bit. Returns the manifest.
    Raises TrainingError or ModelError where any of it fails; nothing was published then.
    """
    manifest = verify_adapter(folder, base_sha256)
    read_back = _adapter_again(model, folder) if hasattr(model, "peft_config") else _model_again(model, folder, base_sha256)
    # A few tokens are not worth compiling another adapter's layers for.
    with torch.compiler.set_stance("force_eager"), read_back as (again, tensors, paths):
        if weights_digest(tensors) != digest:
            raise TrainingError(f"{folder}: what was saved are not the trained weights. Nothing was published")
        loss = _loss(again, objective, items, paths)
        if not math.isfinite(loss):
            raise TrainingError(
                f"diverged: {folder}: read back from the disk, its loss is not finite. Nothing was published", code="diverged"
            )
        prompt = chat.prompt_ids([{"role": "user", "content": _PROMPT}])
        ((_, answer),) = next(iter(generate(again, chat, [prompt], Limits(_NEW_TOKENS))))
        if answer.completion_tokens < 1:
            raise TrainingError(f"{folder}: the trained model writes nothing at all. Nothing was published")
    return manifest


def _loss(model: Any, objective: Objective, items: Sequence[Any], paths: Paths | None) -> float:
    """The mean loss of some items, on other paths than the objective's own where they are given."""
    own = objective.paths
    objective.paths = replace(own, cache=None) if paths is None else paths
    try:
        model.eval()
        return objective.summed(model, items) / objective.count(items)
    finally:
        objective.paths = own


@contextmanager
def _adapter_again(model: Any, folder: Path) -> Iterator[tuple[Any, list[Tensor], Paths | None]]:
    """Yields the model computing with the folder's adapter, that adapter's tensors in the order of the trained ones, and no other paths."""
    name = model.active_adapter
    trained = list(trainable_parameters(model))
    _refuse_other_shape(model.peft_config[name], folder)
    try:
        result = model.load_adapter(str(folder), _AGAIN, torch_device=str(model.device), autocast_adapter_dtype=False)
    except _UNREADABLE as problem:
        raise TrainingError(
            f"{folder}: it does not fit the model it was saved from: {str(problem)[:300]}. Nothing was published"
        ) from problem
    if wrong := sorted({*result.unexpected_keys, *result.missing_keys}):
        raise TrainingError(
            f"{folder}: {len(wrong)} of {len(trained)} trained tensors are not in it, or have another name ({wrong[0]}). Nothing was published"
        )
    model.set_adapter(_AGAIN)
    try:
        found = dict(model.named_parameters())
        # A name ends in …lora_A.default.weight; a layer may be called like the adapter, so only the last one is the adapter's.
        tensors = [found[_AGAIN.join(key.rsplit(name, 1))] for key in trained]
        yield model, tensors, None
    finally:
        model.set_adapter(name)
        model.delete_adapter(_AGAIN)


def _refuse_other_shape(trained: PeftConfig, folder: Path) -> None:
    """Rank, scale, targets, base: adapter_config.json must say what was trained, else others build another adapter from it."""
    try:
        saved = _plain(PeftConfig.from_pretrained(str(folder)))
    except _UNREADABLE as problem:
        raise TrainingError(f"{folder / 'adapter_config.json'}: cannot be read: {str(problem)[:300]}. Nothing was published") from problem
    wanted = _plain(trained)
    if differ := sorted(key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)):
        listed = "; ".join(f"{key}: {wanted.get(key)!r} was trained, {saved.get(key)!r} stands there" for key in differ)
        raise TrainingError(f"{folder / 'adapter_config.json'}: not the adapter that was trained ({listed}). Nothing was published")


def _plain(config: PeftConfig) -> dict[str, Any]:
    content = {key: value for key, value in config.to_dict().items() if key not in _OF_THE_MOMENT}
    return {key: sorted(value) if isinstance(value, set | list) else value for key, value in content.items()}


@contextmanager
def _model_again(model: Any, folder: Path, base_sha256: str) -> Iterator[tuple[Any, list[Tensor], Paths | None]]:
    """Yields the folder's model, its tensors that are trained, and the paths that a fresh model takes: each row computed as transformers does."""
    again = load_adapter(model, folder, base_sha256)
    found, here, trained = dict(again.named_parameters()), dict(model.named_parameters()), trainable_parameters(model)
    # transformers makes up what a folder lacks: every frozen weight must be the one that was there in training, too.
    wrong = [
        name
        for name, value in here.items()
        if name not in found or found[name].shape != value.shape or (name not in trained and not torch.equal(found[name], value))
    ]
    if wrong:
        raise TrainingError(
            f"{folder}: {len(wrong)} of {len(here)} tensors are not in it, or not as they were in training ({wrong[0]}). Nothing was published"
        )
    yield again, [found[name] for name in trained], Paths(packed=False)
