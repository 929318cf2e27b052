"""Run: the folder contract. It owns every file name, the lock, the status and the event log.

    runs/NAME/
    ├── recipe.yaml            what was asked (with overrides), data paths absolute
    ├── recipe.resolved.yaml   what `auto` became
    ├── run.json               versions, machine, and for each step: state, seconds, hash of what it read
    ├── events.jsonl           what happened, in order
    ├── lock                   held by the process that works here
    ├── data/                  train.jsonl validation.jsonl test.jsonl manifest.json (replay.jsonl, where rows are replayed)
    ├── candidates/            selection.json, one predictions file per candidate (and NAME.samples.jsonl, where several answers are drawn)
    ├── endpoints/             NAME.jsonl: every answer of an endpoint by the hash of its request, and what it cost
    ├── training/              metrics.jsonl, summary.json (rate.json, where a range test found the learning rate; reference.json of preferences), tokens/
    ├── checkpoints/           while training: step-N/ to go on from, best-N/ the best weights so far; gone once the training is done
    ├── stages/NAME/           a run of its own for each stage of a chain
    ├── stages.json            what each stage brought, and its gate
    ├── adapter/               the best checkpoint, in PEFT's format, with its template and manifest
    ├── estimate.json          of `burnish estimate`: what the run will cost, foretold before it trains
    ├── comparison.json        scores, intervals, verdict
    ├── judge.json             of `burnish judge`: what a language model said of the answers, pair by pair
    ├── decision.json decision.html    of `burnish decide`: what to do, why, and everything that was weighed
    ├── probe.json probe/      how long a short training may be here; a run of its own that tries it
    ├── bases.json bases/NAME/ of `decide --bases`: a run of its own for each base model
    ├── retain.json            of `burnish retain`: what was forgotten, and the repair; retain/ has its rows, answers and trainings
    ├── adapter-repaired/      the point between task and retention that was chosen, where it is another than adapter/
    ├── sweep.json trials.jsonl best.yaml sweep.html    of `burnish sweep`: what is searched for, a line a trial, the winner, the page
    ├── model_card.md          the model's README in Hugging Face's form, with the report's numbers
    ├── curve.json curve.jsonl curve.html    of `burnish curve`: what doubled data is worth, a line a training, the page
    ├── value.json value.jsonl value.csv value.html kept.jsonl    of `burnish value`: the proof, the rows from worst to best, the rows that stay; value-work.jsonl
    └── report.html report.json

A file is written aside, fsynced and renamed, so a name either holds a whole file or does not exist. Logs and answers (.jsonl outside data/)
grow line by line; a last line that a crash cut short is not read.

    __init__.py    the life of a run: lock, recipe, steps, events    places.py    every file's name    files.py    writing that survives a crash
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from burnish.errors import BurnishError, DataError, RecipeError, Stopped, disk_errors
from burnish.recipe import Recipe, build_recipe, differences, dump_recipe, load_recipe
from burnish.run.files import (
    append_line,
    fsync_folder,
    hash_file,
    hash_of,
    is_aside,
    read_at,
    read_lines,
    recover_folder,
    write_folder,
    write_whole,
)
from burnish.run.places import Places

# Each step, and those whose results no longer hold once it begins again.
STEPS: dict[str, tuple[str, ...]] = {
    "prepare": ("baselines", "train", "evaluate", "compare", "retain", "report"),
    "baselines": ("compare", "report"),
    "train": ("evaluate", "compare", "retain", "report"),
    "evaluate": ("compare", "report"),
    "compare": ("report",),
    "retain": ("report",),
    "report": (),
}

# Keys that may change at any time: they judge what was answered, and nothing is trained or answered by them.
FREE_KEYS = ("evaluation.checks",)


class Run(Places):
    """A run's folder. Every step reads from it and writes into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    # ------------------------------------------------------------------------------------------------ life
    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, *, fresh: bool = False, allow_change: Sequence[str] = ()) -> Run:
        """Open the run for this recipe, or start it."""
        with cls.working(path, recipe, fresh=fresh, allow_change=allow_change) as run:
            return run

    @classmethod
    @contextmanager
    def working(cls, path: str | Path, recipe: Recipe, *, fresh: bool = False, allow_change: Sequence[str] = ()) -> Iterator[Run]:
        """Open or start the run for this recipe and hold its lock. A folder of another recipe is refused with the keys that differ,
        except FREE_KEYS and those that `allow_change` names (a key, or a section): they are taken over, and an event says so."""
        run = cls(path)
        if run.path.exists() and not run.path.is_dir():
            raise RecipeError(f"{run.path} is a file; a run is a folder: choose another place with --run")
        if (
            run.path.exists()
            and not run.recipe_file.exists()
            and any(child.name != "lock" for child in run.path.iterdir() if not is_aside(child))
        ):
            raise RecipeError(f"{run.path} is not empty and not a run: choose another place with --run (nothing there is deleted)")
        with run.lock():
            run._sweep()
            if fresh:
                run._clear()
            if run.recipe_file.exists():
                run._refuse_another(recipe, allow_change)
            else:
                run.write_text(run.recipe_file, dump_recipe(recipe))
            yield run

    def _refuse_another(self, recipe: Recipe, allow_change: Sequence[str]) -> None:
        changed = differences(load_recipe(self.recipe_file), recipe)
        if changed and all(is_allowed(key, (*FREE_KEYS, *allow_change)) for key in changed):
            self.write_text(self.recipe_file, dump_recipe(recipe))
            self.event("recipe_changed", changed={key: list(pair) for key, pair in sorted(changed.items())})
        elif changed:
            listed = "; ".join(f"{key}: {old!r} → {new!r}" for key, (old, new) in sorted(changed.items()))
            raise RecipeError(
                f"{self.path} holds a run of another recipe ({listed}). Choose another --run, or --fresh to start it anew and delete what is there"
            )

    @classmethod
    def open(cls, path: str | Path) -> Run:
        run = cls(path)
        if not run.recipe_file.exists():
            raise RecipeError(f"{run.path} is not a run (no recipe.yaml there). `burnish runs list` shows the runs in ./runs")
        return run

    def recipe(self) -> Recipe:
        """The resolved recipe if there is one, else the recipe as asked."""
        return load_recipe(self.resolved_file if self.resolved_file.exists() else self.recipe_file)

    def recipe_as_asked(self) -> Recipe:
        return load_recipe(self.recipe_file)

    def asked_key(self) -> str:
        """One hash over the recipe as asked and the rows that were prepared: a forecast belongs to these."""
        splits = self.read_json(self.manifest_file)["splits"]
        return hash_of(self.recipe_as_asked().to_dict(), [part.get("file_sha256") for part in splits.values()])

    def resolve(self, values: Mapping[str, Any], *, further: bool = False) -> Recipe:
        """Write down what `auto` became. `values` maps dotted keys to values; `further`: besides what is written down already."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        known = self.recipe() if further else self.recipe_as_asked()
        resolved = build_recipe(known.to_dict(), overrides=overrides, origin=str(self.resolved_file))
        self.write_text(self.resolved_file, dump_recipe(resolved))
        return resolved

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process works in a run at a time; the kernel frees the lock when the process dies."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(handle, 32).decode(errors="replace").strip() or "?"
                raise RecipeError(f"{self.path} is in use by process {owner}: wait for it, or choose another --run") from None
            with disk_errors(self.path):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
            yield
        finally:
            os.close(handle)

    # ------------------------------------------------------------------------------------------------ status and steps
    def status(self) -> dict[str, Any]:
        return self.read_json(self.status_file) if self.status_file.exists() else {"created": _now(), "steps": {}}

    def step_done(self, step: str, inputs: str) -> bool:
        """Whether the step ended well on the same inputs (a hash of what it read)."""
        entry = self.status()["steps"].get(step, {})
        return bool(entry.get("state") == "done" and entry.get("inputs") == inputs)

    @contextmanager
    def step(self, step: str, inputs: str) -> Iterator[dict[str, Any]]:
        """Record a step's start, end and failure. What the caller puts into the yielded dict is kept in the status."""
        entry: dict[str, Any] = {"state": "running", "inputs": inputs, "started": _now()}
        self._forget(STEPS[step])
        self._note_step(step, entry)
        self.event("step_started", step=step)
        start = time.monotonic()
        try:
            yield entry
        except BaseException as problem:
            entry |= {
                "state": "stopped" if isinstance(problem, Stopped) else "failed",
                "seconds": round(time.monotonic() - start, 3),
                "error": str(problem)[:2000] or type(problem).__name__,
            }
            # The failure being told must not hide the failure itself (a full disk fails here again).
            with contextlib.suppress(OSError, BurnishError):
                self._note_step(step, entry)
                self.event(f"step_{entry['state']}", step=step, error=entry["error"])
            raise
        entry |= {"state": "done", "seconds": round(time.monotonic() - start, 3)}
        self._note_step(step, entry)
        self.event("step_done", step=step, seconds=entry["seconds"])

    def amend(self, step: str, entry: dict[str, Any], **values: Any) -> None:
        """Add facts to the entry of a step that is under way, and write it down now."""
        entry |= values
        self._note_step(step, entry)

    def note(self, **values: Any) -> None:
        """Keep facts of the whole run (versions, machine) in its status."""
        self.write_json(self.status_file, self.status() | values)

    def event(self, kind: str, **values: Any) -> None:
        append_line(self.events_file, {"time": _now(), "event": kind, **values})

    def _note_step(self, step: str, entry: Mapping[str, Any]) -> None:
        status = self.status()
        status["steps"][step] = dict(entry)
        self.write_json(self.status_file, status)

    def _forget(self, steps: tuple[str, ...]) -> None:
        """Results that rest on what is about to change must not be read as if they held."""
        status = self.status()
        status["steps"] = {name: entry for name, entry in status["steps"].items() if name not in steps}
        if self.status_file.exists():
            self.write_json(self.status_file, status)
        stale = {
            "compare": (self.comparison_file, self.judge_file),
            "retain": (self.retain_file, self.repaired_folder),
            "report": (self.report_file, self.report_json_file, self.card_file),
        }
        for path in (path for step in steps for path in stale.get(step, ())):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a process that died was writing aside; the lock is held, so nobody else is writing. Stages are runs of their own."""
        for place in (self.path, *(self.path / name for name in ("data", "candidates", "training", "training/tokens", "retain"))):
            for left in filter(is_aside, place.glob(".*.tmp")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def _clear(self) -> None:
        for child in self.path.iterdir():
            if child.name == "lock":
                continue
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    # ------------------------------------------------------------------------------------------------ files
    def write_text(self, path: Path, text: str) -> None:
        write_whole(path, text.encode("utf-8"))

    def write_json(self, path: Path, content: Any) -> None:
        self.write_text(path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def write_jsonl(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        self.write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))

    def read_json(self, path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path} is not there yet: {_step_that_writes(path)}") from None
        except (OSError, ValueError) as problem:
            raise DataError(
                f"{path} cannot be read: {problem}. It was changed by hand or the disk is damaged; --fresh starts the run anew"
            ) from problem

    def read_jsonl(self, path: Path) -> list[dict[str, Any]]:
        return list(read_lines(path)) if path.exists() else []


def is_allowed(key: str, allowed: Sequence[str]) -> bool:
    """Whether a list of dotted keys names this key, or a section that it lies in; in a stage of a chain it is the key without stages.NAME."""
    names = [key, *re.findall(r"^stages\..*?\.((?:training|lora|data)\..+)$", key)]
    return any(one == name or one.startswith(f"{name}.") for one in names for name in allowed)


def _step_that_writes(path: Path) -> str:
    step = {"data": "prepare", "candidates": "evaluate", "training": "train", "adapter": "train"}.get(path.parent.name)
    step = step or {"comparison.json": "compare", "report.json": "report", "judge.json": "judge"}.get(path.name, "run")
    return f"run `burnish {step}` first"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """One row per run in a folder, the newest first; a folder that is not a run is passed over."""
    rows = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        run = Run(path)
        if not run.recipe_file.exists():
            continue
        status = run.status()
        comparison = run.read_json(run.comparison_file) if run.comparison_file.exists() else {}
        scores = {row["name"]: row["score"] for row in comparison.get("candidates", ())}
        begun = [(name, status["steps"][name]) for name in STEPS if name in status["steps"]]
        last = begun[-1] if begun else ("", {"state": "new"})
        rows.append(
            {
                "name": path.name,
                "created": status["created"],
                "state": "done" if last[0] == "report" and last[1]["state"] == "done" else f"{last[0]} {last[1]['state']}".strip(),
                "verdict": comparison.get("verdict"),
                "tuned": scores.get("tuned"),
                "best_baseline": scores.get(comparison.get("best_baseline")),
                "unit": comparison.get("unit"),
            }
        )
    return sorted(rows, key=lambda row: str(row["created"]), reverse=True)


__all__ = [
    "FREE_KEYS", "STEPS", "Places", "Run", "append_line", "fsync_folder", "hash_file", "hash_of", "is_allowed", "list_runs", "read_at", "read_lines", "recover_folder", "write_folder",
    "write_whole",
]  # fmt: skip
