"""Several processes, one training (data parallel): each takes its part of every step, counts and gradients are summed.

A step is the same whatever the number of processes: 1 × 8 = 8 × 1 = 2 processes × 4, up to rounding. Only rank 0 writes; it tells the others where
to begin, so they need not see its disk. Started by `burnish train --processes N` or by torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). With
one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How long a process waits for the others (a validation or a slow disk on rank 0 included) before it gives up.
_PATIENCE = timedelta(minutes=30)
_BUCKET_VALUES = 16 * 2**20  # float32 values summed at once: 64 MB
BEAT_VARIABLE = "BURNISH_BEAT"  # the pipe on which a process shows the launcher that it is alive


def size() -> int:
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def asked_size() -> int:
    """How many processes the environment tells of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: str) -> str:
    """The device of this process: with several GPUs in one machine, each process takes its own."""
    if device == "cuda" and asked_size() > 1:
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def join(*, work: bool = True) -> bool:
    """Meet the other processes, if there are any and it was not done yet. Rank 0 says whether there is work; all get its answer."""
    if asked_size() == 1 or _joined():
        return True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    return bool(share(work))


def leave() -> None:
    if _joined():
        dist.destroy_process_group()


def total(*values: float) -> list[float]:
    """Each value summed over all processes."""
    if size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers)
    return [float(number) for number in numbers]


def sum_gradients(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Float32 gradients, summed over all processes; where a process has none (it had no rows in this step), zeros stand for it."""
    if size() == 1:
        return list(gradients)
    whole = [torch.zeros_like(wanted, dtype=torch.float32) if g is None else g for g, wanted in zip(gradients, like, strict=True)]
    bucket: list[Tensor] = []
    for place, gradient in enumerate(whole):
        bucket.append(gradient)
        if place == len(whole) - 1 or sum(g.numel() for g in bucket) + whole[place + 1].numel() > _BUCKET_VALUES:
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
    return list(whole)


def share(value: Any) -> Any:
    """Rank 0's value (JSON) for everybody."""
    if size() == 1:
        return value
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0)
    if rank() != 0:
        content = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return json.loads(bytes(content.numpy()))


def share_tensors(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Rank 0's tensors for everybody, on the CPU."""
    if size() == 1:
        assert tensors is not None
        return tensors
    listed = share([[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in (tensors or {}).items()])
    result = {}
    for name, shape, dtype in listed:
        tensor = (
            tensors[name].cpu().contiguous() if rank() == 0 and tensors is not None else torch.empty(shape, dtype=getattr(torch, dtype))
        )
        dist.broadcast(tensor, 0)
        result[name] = tensor
    return result


def beat(step: bool = False) -> None:
    """Show the launcher that this process is alive: `s` for a step done, `.` for other work."""
    if handle := os.environ.get(BEAT_VARIABLE):
        with contextlib.suppress(OSError):
            os.write(int(handle), b"s" if step else b".")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
