"""Does `burnish value` find wrong labels, and is training without what it drops better? BANKING77 rows with planted wrong labels.

    python benchmarks/value.py --data ../shared/data/banking77 [--seeds 3] [--run FOLDER]

15 of the 77 labels, 40 training rows each; 20 % of the training rows get another of the 15 labels, drawn at random. Validation rows are 12 a label, right as
they stand. Nothing of the ranking knows which rows were planted. The last line is `RESULT {json}`; with --output it is also kept, with command and machine.
The folder keeps every short training: the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from burnish import pipeline
from burnish.pipeline import ValuePlan
from burnish.recipe import Recipe, build_recipe
from burnish.run import Run

LABELS, TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS = 15, 40, 12, 2
PLANTED, WORST = 0.2, 0.3


def plant(folder: Path, data: Path, *, seed: int = 0) -> dict[str, set[int]]:
    """Write train, validation and test files; returns the lines (from 1) of the training file with a wrong label."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_label[row["output"]].append(row["input"])
    draw = random.Random(seed)
    labels = draw.sample(
        sorted(label for label, texts in by_label.items() if len(texts) >= TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS), LABELS
    )
    parts: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for label in labels:
        texts = draw.sample(by_label[label], TRAIN_ROWS + VALIDATION_ROWS + TEST_ROWS)
        for name, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS), ("test", TEST_ROWS)):
            parts[name] += [{"prompt": text, "completion": label} for text in texts[:count]]
            texts = texts[count:]
    for rows in parts.values():
        draw.shuffle(rows)
    wrong = set(draw.sample(range(len(parts["train"])), round(PLANTED * len(parts["train"]))))
    for place in sorted(wrong):
        row = parts["train"][place]
        row["completion"] = draw.choice([label for label in labels if label != row["completion"]])
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": {place + 1 for place in wrong}}


def recipe_for(rows: Path, *, epochs: float) -> Recipe:
    """The usual recipe for these files, at half of LoRA's usual rate: so few rows are passed twice only."""
    return build_recipe(
        {
            "name": "bench-value",
            "model": "gemma-3-270m",
            "data": {**{name: str((rows / f"{name}.jsonl").resolve()) for name in ("train", "validation", "test")}, "overlap_ngram": 0},
            "training": {"epochs": epochs, "learning_rate": 5e-4, "micro_batch_size": 16, "validations_per_epoch": 1},
        }
    )


def found_fraction(ranked: list[dict[str, Any]], wrong: set[int], key: str | None = None) -> float:
    """Share of the planted rows among the worst 30 % of the ranking, or (`key`) of the ranking by one signal alone."""
    order = ranked if key is None else sorted(ranked, key=lambda row: -(row["signals"][key] if row["signals"][key] is not None else -1e9))
    worst = {int(row["source"].rsplit(":", 1)[1]) for row in order[: round(WORST * len(ranked))]}
    return round(len({int(row["source"].rsplit(":", 1)[1]) for row in ranked} & wrong & worst) / len(wrong), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/bench-value"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows = asked.run / "rows"
    wrong = plant(rows, asked.data)["train"]
    recipe = recipe_for(rows, epochs=asked.epochs)
    started = time.monotonic()

    def tell(what: str, done: int, total: int, detail: str) -> None:
        if total == 0 or done in (1, total):
            print(f"{time.monotonic() - started:7.0f} s  {what} {done}/{total} {detail}", file=sys.stderr, flush=True)

    with Run.working(asked.run / "run", recipe) as job:
        content = pipeline.value(job, plan=ValuePlan(drop=WORST, seeds=asked.seeds), tell=tell)
        ranked = job.read_jsonl(job.value_rows_file)
    proof = content["proof"] or {}
    result = {
        "planted_found_fraction": found_fraction(ranked, wrong),
        "by_signal": {name: found_fraction(ranked, wrong, name) for name, used in content["signals"].items() if used},
        "kept_minus_random_points": round(100 * proof["difference"], 2) if proof else None,
        "interval_points": [round(100 * proof["low"], 2), round(100 * proof["high"], 2)] if proof else None,
        "verdict": proof.get("verdict"),
        "kept_score": proof.get("kept"),
        "random_score": proof.get("random"),
        "rows": content["rows"],
        "planted": len(wrong),
        "dropped_fraction": WORST,
        "seconds": content["seconds"],
        "sentence": content["sentence"],
    }
    if asked.output is not None:
        machine = {
            "machine": platform.machine(),
            "cores": pipeline.machine()["cores"],
            "memory_gb": pipeline.machine()["memory_gb"],
            **pipeline.versions(),
        }
        command = f"python benchmarks/value.py --data DATA/banking77 --seeds {asked.seeds} --epochs {asked.epochs:g} --output benchmarks/results/value.json"
        asked.output.write_text(
            json.dumps({"command": command, "machine": machine, "result": result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print("RESULT " + json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
