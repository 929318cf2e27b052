"""Weights on disk: the adapter that a run gives away, and the checkpoints from which a training that was cut off goes on.

    checkpoints/
    ├── step-00000120/        everything the loop needs: trained weights, optimizer, random numbers, position, MANIFEST.json
    ├── step-00000140/
    └── best-00000120/        the best weights so far, as an adapter; kept as long as a checkpoint refers to it

A folder is filled aside, every file fsynced, renamed, and its parent fsynced (`run.write_folder`): a name holds a whole folder or does not exist.
What the disk damages later is found by size and SHA-256; then the next older checkpoint serves. Tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from burnish.errors import ModelError, TrainingError, disk_errors
from burnish.models import ADAPTER_MANIFEST, Chat, save_trained, trainable_parameters, verify_adapter
from burnish.run import hash_file, recover_folder, write_folder
from burnish.training.fingerprint import compare_fingerprints, not_exact
from burnish.types import Checkpoint, Tell, silent

MANIFEST = "MANIFEST.json"
KEPT = 2
# Every manifest of a checkpoint begins with this number; another form would be read by other code.
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class State:
    """A training between two steps. `optimizer` has, for each weight, what the optimizer remembers of it."""

    progress: dict[str, Any]
    weights: dict[str, Tensor]  # float32
    optimizer: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]


class Checkpoints:
    """The folder of checkpoints of one training. `event` notes in the run what happens to them."""

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        *,
        event: Callable[..., None],
        allowed: Sequence[str] = (),
        tell: Tell = silent,
    ) -> None:
        self.folder, self.fingerprint, self.event, self.allowed, self.tell = folder, fingerprint, event, allowed, tell
        self.last_bytes = 0
        self.damaged: set[Path] = set()

    def newest(self) -> State | None:
        """The newest checkpoint that is whole and of this training; None where there is none. Damaged ones are passed over, and it is told.

        Raises RecipeError where the newest whole one belongs to another training.
        """
        self._sweep()
        found = self._steps()
        for path in reversed(found):
            try:
                manifest, state = read_checkpoint(path)
                self._verify_best(manifest)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, ModelError) as problem:
                self._damaged(path, problem)
                continue
            changed = compare_fingerprints(manifest["fingerprint"], self.fingerprint, allowed=self.allowed, where=str(self.folder))
            if changed:
                self.event("conditions_changed", at_step=state.progress["step"], changed=changed, bit_exact=False)
                how = "the result is right, but not bit-exact" if not_exact(changed) else "as allowed"
                self.tell("conditions changed", 0, 0, f"{', '.join(changed)}: {how}")
            self.last_bytes = _size(path)
            return state
        if found:
            self.event("checkpoints_all_damaged", checkpoints=len(found))
            self.tell("checkpoints damaged", 0, 0, f"none of the {len(found)} checkpoints is whole: training starts from step 0")
        return None

    def save(self, state: State) -> None:
        """Write a checkpoint whole or not at all, then remove what is older than the newest two. Raises TrainingError where the disk refuses."""
        path, best_step = self.folder / f"step-{state.progress['step']:08d}", state.progress.get("best_step", 0)
        self._room()
        with write_folder(path) as aside:
            save_file(_plain(state.weights), aside / "weights.safetensors")
            for name in sorted({name for kept in state.optimizer.values() for name in kept}):  # exp_avg, exp_avg_sq, step
                save_file(_plain({key: kept[name] for key, kept in state.optimizer.items()}), aside / f"optimizer.{name}.safetensors")
            save_file(_plain(state.random), aside / "random.safetensors")
            (aside / "state.json").write_text(json.dumps(state.progress, allow_nan=False), encoding="utf-8")
            content = {
                "format": _FORMAT,
                "step": state.progress["step"],
                "best_step": best_step,
                "best_manifest_sha256": hash_file(self.best(best_step) / ADAPTER_MANIFEST) if best_step else "",
                "fingerprint": self.fingerprint,
                "files": _sizes_and_hashes(aside),
            }
            text = json.dumps({"content": content, "sha256": _hash_of_json(content)}, indent=1, allow_nan=False)
            (aside / MANIFEST).write_text(text + "\n", encoding="utf-8")
        self.damaged.discard(path)
        self.last_bytes = _size(path)
        self.prune(best_step=best_step)

    def prune(self, keep: int = KEPT, *, best_step: int = 0) -> None:
        """Remove all but the newest whole checkpoints, and the best weights that none of those refers to."""
        steps = self._steps()
        kept = [path for path in steps if path not in self.damaged][-keep:]
        wanted = {best_step}
        for path in kept:
            try:
                wanted.add(int(_read_manifest(path)["best_step"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        for path in steps:
            # A damaged one goes only once there are others to stand on.
            if path not in kept and kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("best-*"):
            if path not in {self.best(step) for step in wanted}:
                shutil.rmtree(path, ignore_errors=True)

    def position(self) -> tuple[int, int]:
        """(step, best step) of the newest checkpoint that is not known to be damaged; (0, 0) where there is none."""
        for path in reversed(self._steps()):
            if path not in self.damaged:
                manifest = _read_manifest(path)
                return int(manifest["step"]), int(manifest["best_step"])
        return 0, 0

    def best(self, step: int) -> Path:
        return self.folder / f"best-{step:08d}"

    def _verify_best(self, manifest: dict[str, Any]) -> None:
        """The best weights that a checkpoint refers to are those it was saved with. Raises ValueError, OSError or ModelError where not."""
        if not manifest["best_step"]:
            return
        folder = self.best(manifest["best_step"])
        if hash_file(folder / ADAPTER_MANIFEST) != manifest["best_manifest_sha256"]:
            raise ValueError(f"{folder.name}/{ADAPTER_MANIFEST} is not as it was written (SHA-256 differs)")
        verify_adapter(folder, manifest["fingerprint"]["base_model.weights"])  # whether that is ours comes later

    def _sweep(self) -> None:
        """Remove what a process that died was writing; put back what it was replacing."""
        for old in self.folder.glob(".*.old"):
            recover_folder(self.folder / old.name.removeprefix(".").removesuffix(".old"))
        for left in self.folder.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def _damaged(self, path: Path, problem: Exception) -> None:
        self.damaged.add(path)
        step = int(path.name.partition("-")[2]) if path.name.partition("-")[2].isdigit() else None
        self.event("checkpoint_damaged", at_step=step, reason=str(problem)[:300])
        self.tell("checkpoint damaged", 0, 0, f"{path}: {str(problem)[:200]}; the one before it is tried")

    def _room(self) -> None:
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        if free < 2 * self.last_bytes:
            raise TrainingError(
                f"insufficient_storage: {self.folder} has {free / 1e6:.0f} MB free; a checkpoint takes {self.last_bytes / 1e6:.0f} MB and is written "
                "beside the old one. No space left on device",
                code="insufficient_storage",
            )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], State]:
    """(manifest, state), after every size and SHA-256 was found right. Raises ValueError, OSError, KeyError or SafetensorError where not."""
    manifest = _read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if file.stat().st_size != entry["bytes"] or hash_file(file) != entry["sha256"]:
            raise ValueError(f"{name} is not as it was written (size or SHA-256 differs)")
    optimizer: dict[str, dict[str, Tensor]] = {}
    for file in sorted(path.glob("optimizer.*.safetensors")):
        for key, tensor in load_file(file).items():
            optimizer.setdefault(key, {})[file.name.split(".")[1]] = tensor
    progress = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return manifest, State(progress, load_file(path / "weights.safetensors"), optimizer, load_file(path / "random.safetensors"))


def save_adapter(model: Any, chat: Chat, folder: Path, facts: dict[str, Any]) -> Checkpoint:
    """Write the adapter (method `full`: the whole weights), the tokenizer with its template, and a manifest with sizes, SHA-256 and `facts`.

    Non-finite weights are refused.
    """
    refuse_non_finite(model)
    return save_trained(model, chat, folder, facts)


def publish(source: Path, target: Path) -> None:
    """Copy a whole folder into place: the target holds the old one or the new one, never a part."""
    with write_folder(target) as aside:
        for file in sorted(source.iterdir()):
            shutil.copy2(file, aside / file.name)


def refuse_non_finite(model: Any) -> None:
    bad = [name for name, parameter in trainable_parameters(model).items() if not torch.isfinite(parameter).all()]
    if bad:
        raise TrainingError(
            f"diverged: {len(bad)} trained tensors hold NaN or infinity ({bad[0]}): nothing was saved. Lower training.learning_rate",
            code="diverged",
        )


def weights_digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 over the bytes of tensors: whether training changed anything, exactly."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    text = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    content: dict[str, Any] = text["content"]
    if text["sha256"] != _hash_of_json(content):
        raise ValueError(f"{MANIFEST} is not as it was written (SHA-256 differs)")
    if content["format"] != _FORMAT:
        raise ValueError(f"{MANIFEST}: format {content['format']}, this version reads {_FORMAT}")
    return content


def _hash_of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sizes_and_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.name: {"bytes": file.stat().st_size, "sha256": hash_file(file)} for file in sorted(folder.iterdir()) if file.is_file()}


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
