"""How much is computed at once: counted on one forward pass of the longest row, not guessed from the model's size.

What the backward pass keeps is counted tensor by tensor as autograd saves it, so the number is the same each time; it is compared with the memory
that is free. Where a micro-batch does not fit, layers are computed again on the way back (checkpointing), then fewer examples are taken at once.
The examples of a step stay the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from burnish.models import trainable_parameters
from burnish.training.loss import head_bytes, target_rows
from burnish.training.pack import Paths, flatten
from burnish.types import Tell, Tokens, silent

# Of the free memory, so much is planned with; the rest is for what is not counted (libraries, other processes).
_SHARE_OF_FREE = 0.7
# While a layer is on its way back, its gradients and what it makes again stand beside what was kept.
_TRANSIENT_LAYERS = 3.0
_DRY_TOKENS = 256
_HEAD_BYTES = 64 << 20  # the head's blocks (training/loss.py)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_FLOAT32 = 4  # bytes
_TRAINED_BYTES = 16  # of one trained weight, in float32: the master, its gradient, AdamW's two


@dataclass(frozen=True, slots=True)
class Plan:
    at_once: int  # examples in a micro-batch
    checkpointing: bool
    kept_bytes_per_token: float  # what the backward pass keeps
    needed_bytes: int  # beyond what is already held, by this plan
    free_bytes: int
    bytes_per_token: float = 0.0  # what the backward pass keeps, and what stands beside it while a layer is on its way back


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes that a training holds, each counted by itself. `largest_tokens`: the longest row that is computed at once."""

    weights: int  # of the base, in the compute type
    adapter: int  # the trained weights in the compute type; 0 where they are the base's own (method full)
    gradients: int  # float32, of the trained weights
    optimizer: int  # float32 masters (none where the weights are float32 themselves) and AdamW's two moments
    activations: int  # what the way back needs of the longest row, and the layer under way
    head: int  # blocks of logits, the bounds of each word; never the whole matrix
    largest_tokens: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.head

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def plan_memory(
    model: Any, sequences: Sequence[Tokens], paths: Paths, *, most: int, per_example: int = 1, checkpointing: bool | str = "auto", tell: Tell = silent,
    free_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """Decide checkpointing and the examples computed at once, at most `most`.

    `sequences`: those of the training's longest examples, the longest first; an example is `per_example` of them.
    """
    free = free_bytes_of(model.device) if free_bytes is None else free_bytes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * _TRAINED_BYTES
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    lengths = [len(tokens.input_ids) for tokens in sequences]
    # By segments nothing kept grows faster than the row: its beginning tells as much. A dense mask needs the whole row.
    row = sequences[0] if not paths.by_segment else _beginning(sequences[0])
    plain = kept = kept_bytes_per_token(model, row, paths)
    on = checkpointing is True and switch_checkpointing(model)
    if checkpointing is True and not on:
        tell("memory", 0, 0, "this model cannot compute its layers again on the way back: engine.gradient_checkpointing does nothing")
    if on:
        kept = kept_bytes_per_token(model, row, paths)

    def needed(at_once: int) -> int:
        return int(trained + _HEAD_BYTES + sum(lengths[: at_once * per_example]) * (kept + _TRANSIENT_LAYERS * plain / layers))

    at_once, room = most, int(_SHARE_OF_FREE * free)
    if needed(at_once) > room and checkpointing == "auto" and switch_checkpointing(model):
        told = f"{needed(at_once) / 1e9:.1f} GB would be needed, {free / 1e9:.1f} GB are free: layers are computed again on the way back"
        tell("memory", 0, 0, told)
        on, kept = True, kept_bytes_per_token(model, sequences[0], paths)
    while at_once > 1 and needed(at_once) > room:
        at_once = (at_once + 1) // 2
    if at_once < most:
        tell("memory", 0, 0, f"{at_once} examples at once instead of {most}, as memory asks for; a step stays what it is")
    return Plan(at_once, on, round(kept, 1), needed(at_once), free, kept + _TRANSIENT_LAYERS * plain / layers)


def _beginning(tokens: Tokens) -> Tokens:
    return (
        tokens
        if len(tokens.input_ids) <= _DRY_TOKENS
        else Tokens(tokens.input_ids[:_DRY_TOKENS], [*tokens.labels[: _DRY_TOKENS - 1], tokens.input_ids[_DRY_TOKENS - 1]])
    )


def kept_bytes_per_token(model: Any, tokens: Tokens, paths: Paths) -> float:
    """Bytes that autograd keeps for the backward pass of this row, each storage once, weights not counted, divided by its tokens."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = target_rows(model, flatten([tokens], paths).to(model.device))
    del rows
    model.train(was_training)
    return sum(kept.values()) / len(tokens.input_ids)


def memory_parts(model: Any, plan: Plan, largest_tokens: int, targets: int) -> MemoryParts:
    """Bytes of a model that is ready to train, part by part; `targets`: those of the longest row that is computed at once.

    Gradients are added up in float32 and AdamW keeps two float32 numbers a weight, whatever the compute type (training/step.py).
    """
    trained = list(trainable_parameters(model).values())
    numbers = sum(parameter.numel() for parameter in trained)
    of_base = sum(storage_bytes([*model.parameters(), *model.buffers()]).values()) - sum(storage_bytes(trained).values())
    own = isinstance(model, PeftModel)
    adapter = sum(storage_bytes(trained).values())
    masters = sum(parameter.numel() * _FLOAT32 for parameter in trained if parameter.dtype != torch.float32)
    head = model.get_output_embeddings().weight
    config = model.config.get_text_config()
    return MemoryParts(
        weights=of_base + (0 if own else adapter),
        adapter=adapter if own else 0,
        gradients=numbers * _FLOAT32,
        optimizer=masters + 2 * numbers * _FLOAT32,
        activations=int(largest_tokens * plan.bytes_per_token),
        head=head_bytes(targets, int(config.vocab_size), int(config.hidden_size), dtype=head.dtype, device=head.device.type),
        largest_tokens=largest_tokens,
    )


def storage_bytes(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of each storage once: a tied head is the embedding under a second name."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def switch_checkpointing(model: Any) -> bool:
    """Compute each layer again on the way back. False where the model cannot."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return False
    inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return True


def keep_freed_memory() -> None:
    """Let glibc's allocator keep what a step freed for the next step, instead of giving it back to the system: on a CPU, fresh pages cost more than
    arithmetic (11 µs each on a virtual machine; 5 to 8 % of a step). Elsewhere nothing happens. The peak stays what it was."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - no such name: another C library
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def free_bytes_of(device: torch.device | str) -> int:
    """Memory that this process may still take: of the GPU; else of the machine, its control group and its own limit, whichever is least."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [read() for read in (_machine_free, _group_free, _limit_free)]
    return min((value for value in found if value is not None), default=4 << 30)


def _machine_free() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _from_sysconf()


def _from_sysconf() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):
        return None


def _group_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Of control group version 2, where a container's limit stands."""
    read: Callable[[str], str] = lambda name: (root / name).read_text().strip()  # noqa: E731
    try:
        most = read("memory.max")
        return None if most == "max" else max(0, int(most) - int(read("memory.current")))
    except (OSError, ValueError):
        return None


def _limit_free() -> int | None:
    """What `ulimit -v` leaves."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return None
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
    return max(0, most - used)
