"""Whether cost grows in proportion to the rows: `burnish prepare` and `burnish train` on 1,000 and on 100,000 examples.

    python benchmarks/train_scale.py                 about 15 minutes on 2 cores
    python benchmarks/train_scale.py --rows 1000 10000 --rounds 1

Both sets repeat the same GSM8K rows with another number in front of each, so that lengths are alike and no row is a duplicate. The model is
tiny (2 layers, 64 wide, a vocabulary of 4,096, random weights): what handling the rows costs cannot hide behind the products. Both train for the
same number of steps, in turn; speeds are compared within a round. The last line is `RESULT {…}`; results/train_scale.json holds it all.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from speed.contestants import BURNISH
from speed.launch import Outcome, environment, note_arrivals, read_lines, watch
from speed.summary import machine

HERE = Path(__file__).resolve().parent
BATCH, LIMIT_SECONDS = 8, 3000.0
TEMPLATE_ROWS, HELD_OUT = 1000, 64  # rows that are repeated; then rows for validation and for test
TINY = """
import json, sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast
raw = Tokenizer(models.BPE())
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
text = (part for line in open(sys.argv[2], encoding="utf-8") for part in json.loads(line).values())
raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=4096, special_tokens=["<pad>", "<bos>", "<eos>"],
                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
torch.manual_seed(0)
config = Gemma3TextConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, sliding_window=512,
                          pad_token_id=0, bos_token_id=1, eos_token_id=2)
AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[1])
"""


def main() -> None:
    asked = arguments()
    model = asked.model or make_tiny(asked.work / "tiny", asked.data)
    prepared = {rows: prepare(rows, model, asked) for rows in asked.rows}
    rounds = [{rows: train(rows, number, prepared[rows], asked) for rows in asked.rows} for number in range(1, asked.rounds + 1)]
    small, large = min(asked.rows), max(asked.rows)
    of = {rows: [turn[rows] for turn in rounds] for rows in asked.rows}
    result: dict[str, Any] = {
        "ratio_100k_to_1k": _median([turn[large]["tokens_per_second"] / turn[small]["tokens_per_second"] for turn in rounds], 4),
        "memory_100k_minus_1k_mb": _median([(turn[large]["peak_bytes"] - turn[small]["peak_bytes"]) / 1e6 for turn in rounds], 1),
        "rows": [small, large],
        "tokens_per_second": [_median([turn["tokens_per_second"] for turn in of[rows]], 1) for rows in (small, large)],
        "train_peak_mb": [_median([turn["peak_bytes"] / 1e6 for turn in of[rows]], 1) for rows in (small, large)],
        "train_first_step_seconds": [_median([turn["first_step_seconds"] for turn in of[rows]], 2) for rows in (small, large)],
        "prepare_seconds": [prepared[rows]["seconds"] for rows in (small, large)],
        "prepare_milliseconds_per_added_row": round(1e3 * (prepared[large]["seconds"] - prepared[small]["seconds"]) / max(1, large - small), 4),
        "prepare_peak_mb": [round(prepared[rows]["peak_bytes"] / 1e6, 1) for rows in (small, large)],
    }  # fmt: skip
    document = {
        "result": result, "command": shlex.join(["python", *sys.argv]), "when": time.strftime("%Y-%m-%d"), "machine": machine(),
        "model": asked.model or "tiny", "rounds": rounds,
        "prepare": {rows: {key: found[key] for key in ("seconds", "peak_bytes")} for rows, found in prepared.items()},
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "train_scale.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("RESULT " + json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared/data/gsm8k/train.jsonl", help="GSM8K's train.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--steps", type=int, default=125, help="of training; 125 steps of 8 are the 1,000 rows once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a model's name or folder in place of the tiny one")
    parser.add_argument("--work", type=Path, default=Path("runs/train_scale"))
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    asked = parser.parse_args()
    if not asked.data.is_file():
        parser.error(f"--data {asked.data}: not there; GSM8K's train.jsonl is at https://github.com/openai/grade-school-math (MIT)")
    asked.work = asked.work.resolve()
    return asked


def make_tiny(folder: Path, data: Path) -> str:
    if not (folder / "model.safetensors").exists():
        subprocess.run([sys.executable, "-c", TINY, str(folder), str(data)], check=True, env=environment(BURNISH))
    return str(folder)


def prepare(rows: int, model: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Write the rows and run `burnish prepare` on them. Returns its time and peak, the run's folder and the recipe."""
    folder = asked.work / str(rows)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = write_recipe(rows, model, folder, data=asked.data, steps=asked.steps)
    outcome = launch(["prepare", recipe, "--run", str(folder / "run"), *_sets(asked.set)], folder)
    print(f"{rows:>7} rows · prepare {outcome.seconds:.1f} s · {outcome.peak_bytes / 1e6:.0f} MB", flush=True)
    return {"seconds": outcome.seconds, "peak_bytes": outcome.peak_bytes, "run": str(folder / "run"), "recipe": recipe}


def write_recipe(rows: int, model: str, folder: Path, *, data: Path, steps: int) -> str:
    source = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for index in range(rows):
            row = source[index % TEMPLATE_ROWS]
            code = index * 104_729 % 1_000_000  # each of a million numbers once: a prime step; six digits, so that all are of like length
            file.write(json.dumps({"question": f"Problem {code:06d}. {row['question']}", "answer": row["answer"]}) + "\n")
    for place, split in enumerate(("validation", "test")):
        part = source[TEMPLATE_ROWS + place * HELD_OUT : TEMPLATE_ROWS + (place + 1) * HELD_OUT]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    content = {
        "name": f"scale-{rows}", "model": {"name": model, "chat_template": "plain", "dtype": "float32"},
        "data": {
            "train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl", "prompt_column": "question", "completion_column": "answer",
            "validation_rows": 8,
        },
        "training": {"epochs": 1, "max_steps": steps, "micro_batch_size": BATCH, "learning_rate": 1e-3, "validations_per_epoch": 1},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
    return str(folder / "recipe.yaml")


def train(rows: int, number: int, prepared: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """`burnish train` on a copy of the prepared run: tokens/s of the steps after the first, by the wall clock."""
    folder = Path(prepared["run"]).with_name(f"run-{number}")
    shutil.copytree(prepared["run"], folder)
    metrics, begun = folder / "training" / "metrics.jsonl", time.time()
    seen: dict[int, float] = {}
    outcome = launch(["train", prepared["recipe"], "--run", str(folder), *_sets(asked.set)], folder.parent, metrics, seen)
    tokens = {row["step"]: row["tokens"] for row in read_lines(metrics) if "loss" in row}
    last = max(tokens)
    speed = (tokens[last] - tokens[1]) / (seen[last] - seen[1])
    print(f"{rows:>7} rows · round {number} · {speed:.0f} tok/s · {outcome.peak_bytes / 1e6:.0f} MB · {last} steps", flush=True)
    return {
        "tokens_per_second": round(speed, 1), "peak_bytes": outcome.peak_bytes, "first_step_seconds": round(seen[1] - begun, 2),
        "seconds": outcome.seconds, "steps": last,
    }  # fmt: skip


def launch(command: Sequence[str], folder: Path, metrics: Path | None = None, seen: dict[int, float] | None = None) -> Outcome:
    outcome, begun = Outcome(BURNISH, "scale", 1), time.time()
    log_file = folder / f"{command[0]}.log"
    with log_file.open("wb") as log:
        full = [sys.executable, "-m", "burnish", *command]
        process = subprocess.Popen(full, stdout=log, stderr=subprocess.STDOUT, env=environment(BURNISH))
    outcome.problem = watch(process, LIMIT_SECONDS, outcome, lambda: None if metrics is None else note_arrivals(metrics, seen))
    outcome.seconds = round(time.time() - begun, 2)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}: exit {process.returncode} {outcome.problem or ''}\n{log_file.read_text()[-1500:]}")
    return outcome


def _sets(values: Sequence[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def _median(values: Sequence[float], digits: int) -> float:
    return round(median(values), digits)


if __name__ == "__main__":
    main()
