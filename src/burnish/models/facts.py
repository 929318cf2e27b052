"""What a model's folder says of itself: how large its weights are, under which licence they come."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from burnish.models.embedded import EMBEDDED
from burnish.models.load import find_model

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_MOST_CHARACTERS = 60


def weights_bytes(name: str) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in Path(find_model(name)).glob("*") if file.suffix in (".safetensors", ".gguf"))


def licence_of(name: str) -> str:
    """As its model card states it (Hugging Face's README.md: `license`, `license_name`); "not stated" where there is none. Shown as text only."""
    if name in EMBEDDED:
        return "gemma"
    card = Path(find_model(name)) / "README.md"
    try:
        found = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n"))
        content = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError):
        return "not stated"
    if not isinstance(content, dict):
        return "not stated"
    stated = content.get("license_name") if content.get("license") == "other" else content.get("license")
    return str(stated)[:_MOST_CHARACTERS] if isinstance(stated, str) and stated.strip() else "not stated"
