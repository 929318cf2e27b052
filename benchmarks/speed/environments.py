"""One virtual environment for each peer, made on demand from a lock file. CPU builds of torch only, and nothing that brings CUDA.

The locks name every package, and pip follows no dependencies: a peer that asks for xformers, triton or bitsandbytes, which its CPU path
never imports, does not pull gigabytes. An environment holds a copy of its lock; a changed lock makes it anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent.parent / "environments"
_CHECK = "import torch; raise SystemExit(0 if torch.version.cuda is None else f'torch {torch.__version__} is not a CPU build')"


class NotInstalled(Exception):
    """An environment that cannot be had here, with the reason."""


def ensure(name: str, folder: Path, torch_index: str | None = None) -> Path:
    """The Python of environment `name` under `folder`. Raises NotInstalled with pip's last lines."""
    lock, place = LOCKS / f"{name}.txt", folder / name
    made, python = place / "lock.txt", place / "bin" / "python"
    if made.exists() and made.read_text(encoding="utf-8") == lock.read_text(encoding="utf-8") and python.exists():
        return python
    print(f"making the environment {name} (once) ...", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(place)], name)
    index = ["--extra-index-url", torch_index] if torch_index else []
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *index, "-r", str(lock)], name)
    _run([str(python), "-c", _CHECK], name)
    shutil.copyfile(lock, made)
    return python


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " | ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        raise NotInstalled(f"environment {name}: {' '.join(command[1:4])} failed: {last[-600:]}")
