"""What a person types and sees of a sweep."""

from __future__ import annotations

import re
from typing import Any

from burnish.cli.terminal import out, say, seconds, table
from burnish.errors import RecipeError
from burnish.run import Run


def parse_time(text: str) -> float:
    """90s, 30m, 2h → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--budget {text}: expected a time above 0 with its unit, for example 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def show_sweep(job: Run, found: dict[str, Any]) -> None:
    best, keys = found["best"], list(found["space"])
    rows = [
        (
            trial["trial"],
            *(trial["values"][key] for key in keys),
            "–" if trial.get("value") is None else f"{trial['value']:.4f}",
            seconds(trial.get("seconds")),
            trial["state"] + (" (best)" if trial["trial"] == best["trial"] else ""),
        )
        for trial in job.read_jsonl(job.trials_file)
        if trial["state"] != "running"
    ]
    out.print()
    table(found["metric_title"], ["trial", *keys, "value", "took", "state"], rows)
    say(f"best: trial {best['trial']}, {best['value']:.4f}, chosen on {found['rows']['validation']} validation rows", "bold green")
    say(f"report: {job.sweep_report_file.resolve()}")
    say(f"`burnish run {job.best_recipe_file}` trains with the winner and measures it on the test rows")
