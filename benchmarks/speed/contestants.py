"""Who runs, and how. CONTESTANTS is the table: name → what it is, its environment, its script and options.

`dtype` is the compute type. bfloat16 pays only where the CPU multiplies it (AVX512-BF16, AMX); elsewhere torch falls back to loops that are
many times slower. So the default field of a machine is the contestants of its fast type; `--contestants` names any others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFERENCE = (
    "plain-targets-fp32"  # whose loss curve everyone is compared with; plain-all-fp32 is there to show that it is the model's own loss
)
BURNISH = "burnish"


@dataclass(frozen=True)
class Contestant:
    title: str
    environment: str  # a lock in ../environments; "" is Burnish's own
    script: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # of the environment, where the peer documents them
    same_batches: bool = True  # false: it packs rows by itself, so that its steps are not everyone's steps
    cases: tuple[str, ...] = ("plain", "prefix")

    @property
    def product(self) -> bool:
        """A library that people install, as against our own loop over transformers and PEFT."""
        return self.environment not in ("", "plain")


def _plain(dtype: str, head: str, cases: tuple[str, ...] = ("plain", "prefix")) -> Contestant:
    what = "full logits (the model's own loss)" if head == "all" else "head on target rows only"
    return Contestant(f"transformers + PEFT loop, {what}, {dtype}", "plain", "run_plain.py", {"dtype": dtype, "head": head}, cases=cases)


def _trl(
    dtype: str, batching: str, checkpointing: bool = False, cases: tuple[str, ...] = ("plain", "prefix"), **more: Any
) -> Contestant:  # fmt: skip
    options = {"dtype": dtype, "bf16": dtype == "bfloat16", "checkpointing": checkpointing, "batching": batching, **more}
    words = {"padded": "padded batches", "padding_free": "padding-free", "packed": f"packed to {more.get('max_length')} tokens"}
    title = f"TRL, {words[batching]}, {dtype}{', checkpointing' if checkpointing else ''}"
    return Contestant(title, "trl", "run_trl.py", options, same_batches=batching != "packed", cases=cases)


def _unsloth(dtype: str, checkpointing: bool, **variables: str) -> Contestant:
    options = {"dtype": dtype, "bf16": dtype == "bfloat16", "checkpointing": checkpointing}
    title = f"Unsloth, {dtype}, checkpointing {'on' if checkpointing else 'off'}{', compiled layers' if variables else ''}"
    return Contestant(title, "unsloth", "run_unsloth.py", options, variables)


_TYPES = {"fp32": "float32", "bf16": "bfloat16"}
CONTESTANTS: dict[str, Contestant] = {
    BURNISH: Contestant("Burnish, `burnish train` on a recipe", ""),
    # Full logits take 4 copies of 8 rows × 600 tokens × 262,144 words in the prefix case: more than this benchmark's machines hold.
    **{f"plain-all-{short}": _plain(dtype, "all", ("plain",)) for short, dtype in _TYPES.items()},
    **{f"plain-targets-{short}": _plain(dtype, "targets") for short, dtype in _TYPES.items()},
    # With the long prompt a step of TRL takes minutes (0.05 examples/s were measured once): it runs in the plain case only.
    **{f"trl-{short}": _trl(dtype, "padded", cases=("plain",)) for short, dtype in _TYPES.items()},
    **{f"trl-padding-free-{short}": _trl(dtype, "padding_free", cases=("plain",)) for short, dtype in _TYPES.items()},
    **{f"trl-packed-{short}": _trl(dtype, "packed", cases=("plain",), max_length=1024) for short, dtype in _TYPES.items()},
    **{f"trl-checkpointing-{short}": _trl(dtype, "padded", checkpointing=True, cases=("plain",)) for short, dtype in _TYPES.items()},
    **{f"unsloth-{short}": _unsloth(dtype, False) for short, dtype in _TYPES.items()},
    **{f"unsloth-checkpointing-{short}": _unsloth(dtype, True) for short, dtype in _TYPES.items()},
    **{f"unsloth-compiled-{short}": _unsloth(dtype, False, UNSLOTH_CPU_COMPILE="1") for short, dtype in _TYPES.items()},
}


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


def default_field() -> list[str]:
    """Burnish, the reference, and each peer's settings that were worth running (README: what was tried)."""
    own = "bf16" if multiplies_bfloat16() else "fp32"
    kept = ["plain-targets", "trl", "trl-padding-free", "trl-packed", "unsloth", "unsloth-checkpointing", "unsloth-compiled"]
    return list(dict.fromkeys([BURNISH, REFERENCE, "plain-all-fp32", *(f"{name}-{own}" for name in kept)]))
