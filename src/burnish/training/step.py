"""One optimizer step in parts: gradients of a batch, however it is split; their norm; the update of the float32 masters; what is saved of it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.training import distributed
from burnish.training.checkpoint import State
from burnish.training.objective import Objective
from burnish.training.pack import Paths, row_length
from burnish.types import Tokens

# Gemma 3 270M keeps 0.42 MB a token in bfloat16 until the way back; its products gain nothing from longer rows.
_CPU_TOKENS = 1536
_MOST_REPEATED = 0.1  # of a step's tokens may be computed again because a shared beginning stands in several parts
_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory", "std::bad_alloc")


def seed_step(seed: int, step: int) -> None:
    """Random numbers (dropout, noise) of a step depend on (seed, step, rank) only: not on what a validation drew, nor on where a run was cut off."""
    digest = hashlib.sha256(f"{seed}:{step}:{distributed.rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def backward(model: Any, objective: Objective, items: Sequence[Any], *, at_once: int, denominator: int) -> float:
    """Add up gradients of Σ loss ÷ denominator over micro-batches of `at_once` items. Returns Σ loss ÷ denominator of these items.

    On a CPU, rows of more than _CPU_TOKENS are split further: products gain nothing from longer ones, and what is kept for the way back grows.
    """
    model.train()
    loss = 0.0
    at_once = items_at_once(objective, items, at_once, model.device.type)
    for start in range(0, len(items), at_once):
        loss += objective.backward(model, items[start : start + at_once], denominator)
    return loss


def items_at_once(objective: Objective, items: Sequence[Any], at_once: int, device: str) -> int:
    """How many of a step's items `backward` computes in one row."""
    if device != "cpu":
        return at_once
    return max(
        1, min(at_once, -(-len(items) // _parts([tokens for item in items for tokens in objective.sequences(item)], objective.paths)))
    )


def _parts(sequences: Sequence[Tokens], paths: Paths) -> int:
    """Into how many rows a CPU splits a step: what all share stands in each of them."""
    tokens = row_length(sequences, paths)
    parts = max(1, -(-tokens // _CPU_TOKENS))
    if (shared := sum(len(s.input_ids) for s in sequences) - tokens) > 0:
        parts = min(parts, 1 + int(_MOST_REPEATED * tokens * (len(sequences) - 1) / shared))
    return parts


def take_gradients(parameters: Sequence[torch.nn.Parameter], masters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients in float32, summed over all processes; the parameters hold none afterwards."""
    gradients: list[Tensor | None] = []
    for parameter in parameters:
        gradients.append(None if parameter.grad is None else parameter.grad.float())
        parameter.grad = None
    return distributed.sum_gradients(gradients, masters)


def norm_of(gradients: Sequence[Tensor | None]) -> float:
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    *,
    rate: float,
    scale: float,
) -> None:
    """One step of the optimizer on the masters, with gradients × scale; the parameters follow in their own type."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = None if gradient is None else gradient.mul_(scale)
    optimizer.step()
    follow(parameters, masters)
    for master in masters:
        master.grad = None


def make_masters(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Float32 weights for the optimizer: an update of a thousandth of a bfloat16 weight would be rounded away. A float32 parameter is its own.

    From here on autograd adds up the parameters' gradients in float32, too: a step's micro-batches would lose to bfloat16's three digits otherwise.
    """
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    return [parameter.detach().float() for parameter in parameters]


def make_optimizer(masters: Sequence[Tensor], *, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, all of a weight's arithmetic in one pass."""
    return torch.optim.AdamW(masters, lr=rate, weight_decay=weight_decay, fused=True)


def follow(parameters: Sequence[torch.nn.Parameter], masters: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.copy_(master)


def is_out_of_memory(problem: Exception) -> bool:
    """A GPU's allocator, Python, or (as RuntimeError) torch's CPU allocator has no more memory."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(problem, RuntimeError) and any(text in str(problem) for text in _MEMORY_TEXTS)


def free_memory(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def state_of(progress: Mapping[str, Any], masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> State:
    """What a checkpoint holds. The tensors are the live ones: write them before the next step."""
    remembered = {name: dict(optimizer.state[master]) for name, master in masters.items() if optimizer.state.get(master)}
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        random |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return State(dict(progress), dict(masters), remembered, random)


def load_tensors(state: State, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a state's tensors where they belong. Raises ValueError where names or shapes are not those of this model."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (state.weights, masters)]
    if shapes[0] != shapes[1]:
        differ = sorted({name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)})
        raise ValueError(f"{len(differ)} trained tensors have other names or shapes than in the checkpoint ({', '.join(differ[:3])})")
    optimizer.state.clear()
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(state.weights[name])
            if remembered := state.optimizer.get(name):
                # A fused AdamW counts `step` where the weight is, as torch's own load_state_dict has it.
                optimizer.state[master] = {key: t.to(master.device, copy=True) for key, t in remembered.items()}
    torch.set_rng_state(state.random["torch"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state.random:
                torch.cuda.set_rng_state(state.random[f"cuda.{index}"], index)


def share_state(state: State | None) -> State | None:
    """Rank 0's state for every process: the others need not see its disk."""
    if distributed.size() == 1:
        return state
    progress = distributed.share(None if state is None else state.progress)
    if progress is None:
        return None
    flat = None
    if state is not None:
        flat = {f"weights|{name}": tensor for name, tensor in state.weights.items()}
        flat |= {f"random|{name}": tensor for name, tensor in state.random.items()}
        flat |= {f"optimizer|{key}|{name}": tensor for name, kept in state.optimizer.items() for key, tensor in kept.items()}
    shared = State(progress, {}, {}, {})
    for name, tensor in distributed.share_tensors(flat).items():
        kind, _, rest = name.partition("|")
        if kind == "optimizer":
            key, _, rest = rest.partition("|")
            shared.optimizer.setdefault(rest, {})[key] = tensor
        else:
            getattr(shared, kind)[rest] = tensor
    return shared
