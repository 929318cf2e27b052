"""What frozen lower layers make of a row never changes: compute it once, keep it on disk, and begin there in later epochs.

With `training.layers: last-4` of 18, fourteen layers give the same output for the same row in every epoch. The first pass over a row writes the
hidden states that enter the first trained layer into a memory-mapped file; later passes hand them to the model in place of embeddings, and the
frozen layers let them through untouched. Rows are independent of what they are packed with, so the cache knows single tokens of single rows.

A training that was cut off finds its file again: what it then reads is what it read or computed before, bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.models import decoder_layers
from burnish.recipe import Recipe
from burnish.training.pack import Batch
from burnish.types import Tell, silent

_LEAST_SAVED = 1 / 3  # of the layers' work: below, `auto` leaves the disk alone
_SHARE_OF_DISK = 0.5  # of what is free


class _Skipping:
    """What a frozen layer becomes: itself, unless the hidden states of above are known already."""

    burnish_cache: FrozenCache

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.burnish_cache.skipping:
            return hidden_states
        return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]


class FrozenCache:
    """Hidden states (tokens, D) that enter layer `depth`, in the compute type, by the number of the token in the training's rows."""

    def __init__(self, model: Any, depth: int, folder: Path, tokens: int, key: str = "") -> None:
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.depth, self.folder = depth, folder
        size = int(self.inner.config.get_text_config().hidden_size)
        dtype = next(self.inner.parameters()).dtype
        if not (folder / "key").exists() or (folder / "key").read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "known.bin").write_bytes(bytes(tokens))
            (folder / "key").write_text(key, encoding="utf-8")
        self.hidden = torch.from_file(str(folder / "hidden.bin"), shared=True, size=tokens * size, dtype=dtype).view(tokens, size)
        self.known = np.memmap(folder / "known.bin", dtype=bool, mode="r+", shape=(tokens,))
        self.skipping = False
        layers = _layers(self.inner)
        for layer in layers[:depth]:
            setattr(layer, "burnish_cache", self)  # noqa: B010 - a module would take it for a child
            layer.__class__ = type(f"Skipping{type(layer).__name__}", (_Skipping, type(layer)), {})
        self._entered: Tensor | None = None
        layers[depth].register_forward_pre_hook(self._note, with_kwargs=True)

    def hidden_rows(self, batch: Batch) -> dict[str, Any] | None:
        """Arguments that begin above the frozen layers, where every token of the batch is known; else None."""
        if batch.numbers is None or not bool(self.known[batch.numbers].all()):
            return None
        rows = self.hidden[torch.from_numpy(batch.numbers)].to(batch.input_ids.device)  # (T, D)
        arguments = batch.model_arguments()
        del arguments["input_ids"]
        return arguments | {"inputs_embeds": rows[None]}

    def last_hidden(self, body: nn.Module, batch: Batch) -> Tensor:
        """(T, D) the body's output for a batch, from what is known where all of it is; else computed, and then known."""
        if (arguments := self.hidden_rows(batch)) is not None:
            with self._skip():
                return body(**arguments).last_hidden_state[0]
        result = body(**batch.model_arguments()).last_hidden_state[0]
        if batch.numbers is not None and batch.copies is not None and self._entered is not None:
            numbers, places = batch.copies
            self.hidden[torch.from_numpy(numbers)] = self._entered.detach()[0].to("cpu", self.hidden.dtype)[torch.from_numpy(places)]
            self.known[numbers] = True
        self._entered = None
        return result

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _skip(self) -> Iterator[None]:
        self.skipping = True
        try:
            yield
        finally:
            self.skipping = False

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = args[0] if args else kwargs["hidden_states"]


def _layers(inner: Any) -> list[nn.Module]:
    return list(inner.get_submodule(decoder_layers(inner)[0]))


def first_trained_layer(model: Any) -> int:
    """How many decoder layers at the bottom are frozen, with all that comes before them; 0 where anything below is trained."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if any(parameter.requires_grad for parameter in inner.get_input_embeddings().parameters()):
        return 0
    layers = _layers(inner)
    return next((n for n, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), 0)


def make_cache(
    model: Any, lengths: Sequence[int], recipe: Recipe, folder: Path, *, passes: float, key: str = "", tell: Tell = silent
) -> FrozenCache | None:
    """The cache, where the recipe asks for it or (`auto`) it saves a third of the layers' work and the disk has room; else None."""
    asked = recipe.engine.frozen_cache
    depth = first_trained_layer(model)
    if asked is False or not depth or getattr(model.config.get_text_config(), "attention_dropout", False):
        return None
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    layers, tokens = int(config.num_hidden_layers), int(sum(lengths))
    size = tokens * int(config.hidden_size) * next(inner.parameters()).element_size()
    # A frozen layer is a pass forward, a trained one as much again on the way back; the first time over the rows saves nothing.
    saved = depth / (depth + 2 * (layers - depth)) * (1 - 1 / max(1.0, passes))
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = _SHARE_OF_DISK * shutil.disk_usage(folder.parent).free
    if size > room:
        if asked is True:
            tell(
                "frozen cache",
                0,
                0,
                f"{size / 1e9:.1f} GB are needed, the disk has {2 * room / 1e9:.1f} GB: frozen layers are computed each time",
            )
        return None
    if asked == "auto" and saved < _LEAST_SAVED:
        return None
    tell("frozen cache", 0, 0, f"{depth} of {layers} layers are frozen: their output is kept on disk ({size / 1e6:.0f} MB)")
    return FrozenCache(model, depth, folder, tokens, key)
