"""What frozen lower layers make of a row never changes: compute it once, keep it on disk, and begin there in later epochs.

With `training.layers: last-4` of 18, fourteen layers give the same output for the same row in every epoch. The first pass over a row writes the
hidden states that enter the first trained layer into a memory-mapped file; later passes hand them to the model in place of embeddings, and the
frozen layers let them through untouched. Rows are independent of what they are packed with, so the cache knows single tokens of single rows.

A training that was cut off finds its file again: what it then reads is what it read or computed before, bit for bit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from burnish.models import decoder_layers
from burnish.recipe import Recipe
from burnish.run import hash_of
from burnish.training.pack import Batch, Paths, flatten
from burnish.types import Tell, Tokens, silent

_LEAST_SAVED = 1 / 3  # of the layers' work: below, `auto` leaves the disk alone
_SHARE_OF_DISK = 0.5  # of what is free


class _Skipping:
    """What a frozen layer becomes: itself, unless what all frozen layers make of the batch is known already."""

    burnish_cache: FrozenCache

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = self.burnish_cache
        if cache.batch is None:
            return super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]
        hidden = hidden_states if cache.skipping else super().__call__(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return cache.exchange(hidden) if self is cache.last else hidden


class FrozenCache:
    """Hidden states (tokens, D) that enter layer `depth`, in the compute type, by the number of the token in the training's rows.

    Raises OSError where the disk has no room: all of it is taken at once, since a write through a map that finds none ends the process.
    """

    def __init__(self, model: Any, depth: int, folder: Path, tokens: int, key: str = "") -> None:
        self.inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.depth, self.folder = depth, folder
        size = int(self.inner.config.get_text_config().hidden_size)
        dtype = next(self.inner.parameters()).dtype
        self.new = not holds(folder, key)
        if self.new:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            with (folder / "hidden.bin").open("wb") as file:
                _reserve(file.fileno(), tokens * size * dtype.itemsize)
            (folder / "known.bin").write_bytes(bytes(tokens))
            (folder / "key").write_text(key, encoding="utf-8")
        self.hidden = torch.from_file(str(folder / "hidden.bin"), shared=True, size=tokens * size, dtype=dtype).view(tokens, size)
        self.known = np.memmap(folder / "known.bin", dtype=bool, mode="r+", shape=(tokens,))
        self.batch: Batch | None = None
        self.skipping = False
        layers = _layers(self.inner)
        self.last: Any = layers[depth - 1]
        for layer in layers[:depth]:
            setattr(layer, "burnish_cache", self)  # noqa: B010 - a module would take it for a child
            layer.__class__ = type(f"Skipping{type(layer).__name__}", (_Skipping, type(layer)), {})

    def last_hidden(self, body: nn.Module, batch: Batch) -> Tensor:
        """(T, D) the body's output for a batch, from what is known where all of it is; else computed, and then known."""
        if batch.numbers is not None:
            self.batch, self.skipping = batch, bool(self.known[batch.numbers].all())
        try:
            result: Tensor = body(**batch.model_arguments()).last_hidden_state[0]
            return result
        finally:
            self.batch, self.skipping = None, False

    def exchange(self, hidden: Tensor) -> Tensor:
        """Keep what is new of the frozen layers' output (1, T, D), and give back what was kept first of each token.

        The first value stays, whatever batch a token comes in: so a step that is done again after a crash reads what it read before.
        """
        batch = self.batch
        assert batch is not None
        assert batch.numbers is not None
        assert batch.copies is not None
        if not self.skipping:
            numbers, places = batch.copies
            new = ~self.known[numbers]
            fresh = hidden.detach()[0].to("cpu", self.hidden.dtype)
            self.hidden[torch.from_numpy(numbers[new])] = fresh[torch.from_numpy(places[new])]
            self.known[numbers] = True
        return self.hidden[torch.from_numpy(batch.numbers)].to(hidden.device)[None]

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def holds(folder: Path, key: str) -> bool:
    """Whether what lies there was made under the same conditions, since this machine was last started: pages that a power cut lost read as zeros."""
    try:
        return (folder / "key").read_text(encoding="utf-8") == key
    except OSError:
        return False


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _boot() -> str:
    """Another word after each start of the machine, where the system tells one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _gives_the_same(model: Any, cache: FrozenCache, row: Tokens) -> bool:
    """Whether the body gives the same output with the cache, while it learns a row and when it knows it: proved on this model."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = inner.base_model(**flatten([row]).model_arguments()).last_hidden_state[0]
            batch = flatten([row], Paths(cache=cache))
            found = [cache.last_hidden(inner.base_model, batch) for _ in range(2)]
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)
    return all(bool((one - plain).norm() <= 1e-3 * plain.norm()) for one in found)


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
    model: Any, lengths: Sequence[int], recipe: Recipe, folder: Path, *, passes: float, row: Tokens | None = None, key: str = "", tell: Tell = silent
) -> FrozenCache | None:  # fmt: skip
    """The cache, where the recipe asks for it or (`auto`) it saves a third of the layers' work and the disk has room; else None.

    `row`: one of the training's, on which the cache is proved; `key`: what else the kept states rest on.
    """
    asked = recipe.engine.frozen_cache
    depth = first_trained_layer(model) if asked is not False else 0
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()

    def without(why: str) -> None:
        if asked is True:
            tell("frozen cache", 0, 0, f"not used: {why}")

    if not depth or getattr(config, "attention_dropout", False) or (model.device.type != "cpu" and asked == "auto"):
        without("no layer at the bottom is frozen, or its attention drops out")
        return None
    layers, tokens = int(config.num_hidden_layers), int(sum(lengths))
    dtype = next(inner.parameters()).dtype
    key = hash_of(key, _boot(), str(dtype), depth, tokens, recipe.to_dict()["engine"])
    # A frozen layer is a pass forward, a trained one as much again on the way back; the first time over the rows saves nothing.
    saved = depth / (depth + 2 * (layers - depth)) * (1 - 1 / max(1.0, passes))
    size = tokens * int(config.hidden_size) * dtype.itemsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if asked == "auto" and saved < _LEAST_SAVED:
        return None
    if not holds(folder, key) and size > _SHARE_OF_DISK * free:
        without(f"{size / 1e9:.1f} GB are needed, the disk has {free / 1e9:.1f} GB")
        return None
    try:
        cache = FrozenCache(model, depth, folder, tokens, key)
    except OSError as problem:
        shutil.rmtree(folder, ignore_errors=True)
        without(f"the disk has no room ({problem.strerror or problem})")
        return None
    if row is not None and not _gives_the_same(model, cache, row):
        cache.close()
        without("this model does not give the same with it")
        return None
    tell("frozen cache", 0, 0, f"{depth} of {layers} layers are frozen: their output is kept on disk ({size / 1e6:.0f} MB)")
    return cache
