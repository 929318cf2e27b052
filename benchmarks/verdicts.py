"""Does `burnish decide` say the right thing? Six data sets, each with the whole way: prompts, examples, look-up, a short training, the rules.

    python benchmarks/verdicts.py                           about 1½ hours on 2 cores; goes on where it was cut off
    python benchmarks/verdicts.py --only viggo icd10
    make verdicts

Expected, from earlier measurements with other tools: fine-tune for viggo, home_assistant and wikisql; retrieve for icd10 (codes of the test are in no
training row) and banking77; no for gsm8k on this base. The numbers decide, and what they say is printed, expected or not. The last line is
`RESULT {…}`; results/verdicts.json holds it with the tables.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from speed.summary import machine

HERE = Path(__file__).resolve().parent
COLUMNS = {"prompt_column": "input", "completion_column": "output"}
SETS: dict[str, dict[str, Any]] = {
    "viggo": {
        "data": {"train": "viggo/train.jsonl", "validation": "viggo/valid.jsonl", "test": "viggo/test.jsonl", **COLUMNS, "train_rows": 1500},
        "training": {"epochs": 2},
    },
    "home_assistant": {"data": {"train": "demo:home-assistant/en", "train_rows": 1600}, "training": {"epochs": 1, "validations_per_epoch": 4}},
    "wikisql": {
        "data": {
            "train": "wikisql/train.jsonl", "validation": "wikisql/valid.jsonl", "test": "wikisql/test.jsonl", **COLUMNS, "context_column": "context",
            "group_column": "table", "train_rows": 2500,
        },
        "training": {"epochs": 2},
    },
    "icd10": {
        "data": {
            "train": "icd10_terms/train.jsonl", "test": "icd10_terms/test.jsonl", **COLUMNS, "group_column": "output", "documents": "icd10_terms/corpus.jsonl",
            "train_rows": 4000,
        },
        "training": {"epochs": 2},
    },
    "banking77": {
        "data": {"train": "banking77/train.jsonl", "test": "banking77/test.jsonl", **COLUMNS},
        "training": {"epochs": 2},
        "evaluation": {"shots": [4]},
    },
    "gsm8k": {
        "data": {
            "train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl", "prompt_column": "question", "completion_column": "answer", "train_rows": 1000,
            "test_rows": 100,
        },
        "training": {"epochs": 1},
        "evaluation": {"shots": [4], "selection_rows": 12, "max_new_tokens": 200},
    },
}  # fmt: skip
EXPECTED = {"viggo": "fine-tune", "home_assistant": "fine-tune", "wikisql": "fine-tune", "icd10": "retrieve", "banking77": "retrieve", "gsm8k": "no"}


def main() -> None:
    asked = arguments()
    document = {"command": f"python benchmarks/verdicts.py --budget {asked.budget} --only {' '.join(asked.only)}", "when": time.strftime("%Y-%m-%d"), "machine": machine(), "sets": {}}
    kept = asked.output / "verdicts.json"
    if kept.exists():
        document["sets"] = json.loads(kept.read_text(encoding="utf-8"))["sets"]
    for name in asked.only:
        document["sets"][name] = measure(name, asked)
        asked.output.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("RESULT " + json.dumps({name: {key: found[key] for key in ("verdict", "scores")} for name, found in document["sets"].items()}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data", help="folder with the data sets")
    parser.add_argument("--only", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--budget", default="20m", help="time for each decision")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--work", type=Path, default=Path("runs/verdicts"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    return parser.parse_args()


def recipe_of(name: str, data: Path, model: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(SETS[name]))
    files = {key: value for key, value in content["data"].items() if key in ("train", "validation", "test", "documents")}
    content["data"] |= {key: value if value.startswith("demo:") else str((data / value).resolve()) for key, value in files.items()}
    content["data"] = {"validation_rows": 64, "test_rows": 150, **content["data"]}
    training = {"learning_rate": 1e-3, "micro_batch_size": 16, "validations_per_epoch": 2, **content["training"]}
    return {**content, "name": name.replace("_", "-"), "model": model, "training": training}


def measure(name: str, asked: argparse.Namespace) -> dict[str, Any]:
    from burnish import pipeline
    from burnish.cli.search import parse_time
    from burnish.cli.terminal import progress
    from burnish.recipe import build_recipe
    from burnish.run import Run

    began = time.monotonic()
    recipe = build_recipe(recipe_of(name, asked.data, asked.model))
    with Run.working(asked.work / name, recipe) as job, progress() as tell:
        job.note(versions=pipeline.versions(), machine=pipeline.machine())
        found = pipeline.decide(job, wish=pipeline.Wish(parse_time(asked.budget)), tell=tell)
    scores = {row["name"]: [row["score"], row["low"], row["high"]] for row in found["candidates"]}
    for row in found["candidates"]:
        print(f"{name:>15} · {row['title']:<45} {100 * row['score']:5.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]")
    print(f"{name:>15} · {found['verdict']} (expected {EXPECTED[name]}): {found['sentence']}", flush=True)
    kept = ("sentence", "rule", "would_change", "metric", "test_rows", "train_rows", "constant", "probe", "selection", "costs", "pairs")
    return {
        "verdict": found["verdict"],
        "expected": EXPECTED[name],
        "scores": scores,
        **{key: found[key] for key in kept},
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    main()
