"""Whether `burnish estimate` foretells what a run takes: `burnish estimate`, then `burnish run`, each in a process of its own.

    python benchmarks/estimate.py                                  demo, viggo and wikisql, whole: about 75 minutes on 2 cores
    python benchmarks/estimate.py --recipes demo                   about 15 minutes
    python benchmarks/estimate.py --rows 200 --test-rows 40        fewer rows of each: a first look, and marked as such in the result

The forecast is made before anything is trained; the facts come from the run's own report.json (section "Forecast and fact"). The last line is
`RESULT {…}`: for each recipe time_ratio and memory_ratio, forecast ÷ actual; results/estimate.json holds every part of both.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speed.summary import machine

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("demo", "viggo", "wikisql")
GOALS = {"time": 0.25, "memory": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rows", type=int, help="training rows of each recipe, in place of its own")
    parser.add_argument("--test-rows", type=int, help="test rows of each recipe, in place of its own")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "estimate.json")
    asked = parser.parse_args()
    overrides = [f"data.train_rows={asked.rows}"] * bool(asked.rows) + [f"data.test_rows={asked.test_rows}"] * bool(asked.test_rows)
    kept = json.loads(asked.output.read_text(encoding="utf-8")) if asked.output.exists() else {"recipes": {}}
    for name in asked.recipes:
        found = measure(name, overrides)
        found |= {"reduced": overrides, "command": shlex.join(["python", "benchmarks/estimate.py", *sys.argv[1:]])}
        found |= {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
        kept["recipes"][name] = found
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: time {found['time_ratio']:.3f}, memory {found['memory_ratio']:.3f}", flush=True)
    ratios = {name: {key: kept["recipes"][name][key] for key in ("time_ratio", "memory_ratio")} for name in asked.recipes}
    print("RESULT " + json.dumps(ratios))


def measure(name: str, overrides: list[str]) -> dict[str, Any]:
    """Forecast and facts of one recipe, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f"burnish-estimate-{name}-"))
    more = [word for override in overrides for word in ("--set", override)]
    try:
        place = ["--run", str(folder / "run"), *more]
        burnish("estimate", str(ROOT / "recipes" / f"{name}.yaml"), *place)
        burnish("run", str(ROOT / "recipes" / f"{name}.yaml"), *place)
        report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
        estimate = json.loads((folder / "run" / "estimate.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = {line["name"]: line for line in report["forecast"]["lines"]}
    ratios = {"time": lines["total"]["ratio"], "memory": lines["memory"]["ratio"]}
    return {
        **{f"{key}_ratio": value for key, value in ratios.items()},
        "step_ratio": lines["step"]["ratio"],
        "within_goals": {key: abs(value - 1) <= GOALS[key] for key, value in ratios.items()},
        "lines": report["forecast"]["lines"],
        "estimate": estimate,
        "answers": [
            {key: row[key] for key in ("name", "prompt_tokens_mean", "completion_tokens_mean", "shots", "prompt_form")}
            for row in report["candidates"]
        ],
        "versions": report["versions"],
    }


def burnish(*arguments: str) -> None:
    """The command as a user types it. A verdict other than BETTER (3, 4) is no failure of this measurement."""
    command = [sys.executable, "-m", "burnish", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, stdout=subprocess.DEVNULL, check=False)
    if done.returncode not in (0, 3, 4):
        raise SystemExit(f"{shlex.join(command)} left with {done.returncode}")


if __name__ == "__main__":
    main()
