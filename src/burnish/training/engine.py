"""A model made ready for quick steps: which paths of the engine it takes, proved on it, and how much is computed at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from burnish.errors import RecipeError
from burnish.models import (
    IGNORED,
    Kernels,
    NoKernels,
    attend_by_segment,
    find_kernels,
    fuse,
    fuse_attention,
    pack_base,
    watch_calls,
    windows_reach,
)
from burnish.recipe import Recipe
from burnish.training.loss import summed_loss
from burnish.training.pack import Paths, flatten
from burnish.types import Tell, Tokens, silent

# torch.compile of a GPU model earns its start-up in about so many steps; on a CPU the fused modules leave it too little to save (docs/performance.md).
_STEPS_WORTH_COMPILING = 200
_PROOF_TOKENS = 32


def make_ready(model: Any, sequences: Sequence[Tokens], recipe: Recipe, *, steps: int, tell: Tell = silent) -> Paths:
    """Fuse, choose attention, compile, as `engine` says and as far as this model takes it; what it does not take is told, not guessed.

    `sequences`: some of the training's, for the proofs.
    """
    engine = recipe.engine
    pair = _two_short(sequences)
    kernels = _kernels(model, recipe, tell)
    if engine.base_products == "int8":
        if not engine.fused_layers:
            raise RecipeError(
                "engine.base_products: int8 works inside fused layers: set engine.fused_layers: true, or base_products: native"
            )
        packed, looked_at = pack_base(model, lambda: _loss(model, list(pair), Paths()), kernels)
        tell("8-bit products", 0, 0, f"of {packed} of {looked_at} frozen layers, those within 2.5 % on two rows: faster, not exact")
    if engine.fused_layers and not any(fuse(model, kernels).values()):
        tell("fused layers", 0, 0, "none of this model's norms, MLPs and adapters is of a kind that is fused: slower, and as exact")
    by_segment = engine.document_attention and attend_by_segment(model) and _segments_hold(model, pair)
    if by_segment and engine.fused_layers and kernels is not None and not _attention_fused(model, kernels, pair):
        tell("attention", 0, 0, "this model's attention is not of a kind that is fused: slower, and as exact")
    if engine.document_attention and not by_segment:
        tell("attention", 0, 0, "this model's attention does not follow segments: packed sequences get a dense mask, which is slower")
    packed = by_segment or keeps_sequences_apart(model, pair)
    if not packed:
        tell("packing", 0, 0, "this model lets packed sequences see each other: each is computed alone, which is slower")
    on_gpu = next(model.parameters()).is_cuda
    wanted = engine.compile is True or (engine.compile == "auto" and on_gpu and steps >= _STEPS_WORTH_COMPILING)
    if wanted and not compile_layers(model):
        tell("compile", 0, 0, f"{type(model).__name__} has no layers of a kind that is compiled alone: nothing was compiled")
    return Paths(by_segment, by_segment and engine.shared_prefixes, engine.blocked_head, packed, kernels=kernels)


def _attention_fused(model: Any, kernels: Kernels, pair: tuple[Tokens, Tokens]) -> int:
    return fuse_attention(model, kernels, lambda: _loss(model, [pair[0], pair[1], pair[0]], Paths(by_segment=True, share=True)))


def _kernels(model: Any, recipe: Recipe, tell: Tell) -> Kernels | None:
    """Compiled kernels, on a CPU; torch.compile would have to leave its graph for each of them."""
    if not recipe.engine.compiled_kernels or recipe.engine.compile is True or next(model.parameters()).device.type != "cpu":
        return None
    try:
        return find_kernels()
    except NoKernels as problem:
        tell("kernels", 0, 0, f"{problem}: torch's own operations are used, which is slower")
        return None


def compile_layers(model: Any) -> int:
    """torch.compile for each decoder layer alone (the whole body takes minutes); returns how many."""
    layers = [module for module in model.modules() if type(module).__name__.removeprefix("Skipping").endswith("DecoderLayer")]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def keeps_sequences_apart(model: Any, sequences: Sequence[Tokens]) -> bool:
    """Whether a sequence's loss is the same whatever is packed before it: proved on this model, not assumed of its family."""
    first, second = _two_short(sequences)
    other = Tokens([first.input_ids[0]] * len(first.input_ids), first.labels)  # the same length, other words
    losses = []
    for before in (first, other):
        unscored = Tokens(before.input_ids, [IGNORED] * len(before.input_ids))
        losses.append(_loss(model, [unscored, second], Paths()))
    return math.isclose(*losses, rel_tol=1e-4, abs_tol=1e-6)


def _segments_hold(model: Any, pair: tuple[Tokens, Tokens]) -> bool:
    """Whether two sequences by segments, one of them twice so that all of it is shared, have the losses that each has alone; and whether every
    sliding window, which so few tokens do not reach, is told to the attention."""
    first, second = pair
    try:
        with watch_calls() as calls:
            together = _loss(model, [first, second, first], Paths(by_segment=True, share=True))
        if not windows_reach(model.config, calls):
            return False
    except (NotImplementedError, TypeError, ValueError, RuntimeError):
        return False
    alone = [_loss(model, [tokens], Paths()) for tokens in pair]
    # bfloat16 keeps three digits, and other shapes of a product round otherwise.
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 2e-2
    return math.isclose(together, 2 * alone[0] + alone[1], rel_tol=tolerance, abs_tol=1e-5)


def _loss(model: Any, sequences: Sequence[Tokens], paths: Paths) -> float:
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        loss = float(summed_loss(model, flatten(sequences, paths).to(model.device)))
    model.train(was_training)
    return loss


def _two_short(sequences: Sequence[Tokens]) -> tuple[Tokens, Tokens]:
    """The beginnings of the two shortest of the first hundred: the proofs need any tokens, and few cost little. Their last few are the targets."""
    ordered = sorted((sequences[index] for index in range(min(100, len(sequences)))), key=lambda tokens: len(tokens.input_ids))
    first, second = ordered[0].input_ids[:_PROOF_TOKENS], ordered[min(1, len(ordered) - 1)].input_ids[: _PROOF_TOKENS + 5]
    return _with_targets(first), _with_targets(second)


def _with_targets(ids: list[int]) -> Tokens:
    targets = min(4, len(ids) - 1)
    return Tokens(ids, [IGNORED] * (len(ids) - targets) + ids[len(ids) - targets :])
