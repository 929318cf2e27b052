"""training/metrics.jsonl: one row for each step and each validation, each once, whatever was cut off and gone over again."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from burnish.errors import TrainingError, disk_errors
from burnish.run import append_line, read_lines, write_whole


class Metrics:
    """Rows wait in memory while the disk refuses them: a full disk does not end a training, and no row is lost."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any]) -> None:
        self.waiting.append(row)
        with contextlib.suppress(TrainingError):  # told when a checkpoint is due: `flush`
            self._write()

    def flush(self) -> None:
        """Have every row on the disk. Raises TrainingError where it refuses."""
        self._write()
        if self.path.exists():
            with disk_errors(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int, validations: int) -> int:
        """Keep the rows up to a step and so many validations, each once. Returns how many of them are missing."""
        self.waiting = []
        steps: dict[int, dict[str, Any]] = {}
        checks: dict[int, dict[str, Any]] = {}
        for row in read_lines(self.path) if self.path.exists() else ():
            kept = checks if "validation_loss" in row else steps
            if isinstance(row.get("step"), int) and row["step"] <= step:
                kept.setdefault(row["step"], row)
        chosen = dict(sorted(checks.items())[:validations])
        rows = [
            row for _, _, row in sorted([(s, 0, r) for s, r in steps.items()] + [(s, 1, r) for s, r in chosen.items()], key=lambda x: x[:2])
        ]
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode())
        return step - len(steps) + validations - len(chosen)

    def _write(self) -> None:
        while self.waiting:
            append_line(self.path, self.waiting[0])
            self.waiting.pop(0)
