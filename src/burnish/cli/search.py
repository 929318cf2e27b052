"""`burnish sweep`: what a person types and sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import FreshOption, JsonOption, RecipeArgument, SetOption, app, asked_recipe, folder_of, print_json
from burnish.errors import RecipeError

if TYPE_CHECKING:
    from burnish.run import Run


@app.command()
def sweep(
    recipe: RecipeArgument,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=LOW..HIGH | KEY=A,B,C", help="A recipe key and what to try; may be repeated.  [default: learning rate and rank]", show_default=False),
    ] = None,
    objective: Annotated[str, typer.Option(help="validation_loss, validation_score (the task's metric), or a metric's name.")] = "validation_loss",
    trials: Annotated[int | None, typer.Option(min=1, help="Trials at most, all sessions together.  [default: 20 where no budget is given]", show_default=False)] = None,
    budget: Annotated[str | None, typer.Option(help="Time at most, all sessions together: 90s, 30m, 2h.", show_default=False)] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The sweep's folder.  [default: ./sweeps/NAME]", show_default=False)] = None,
    overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Search recipe keys for the best model on validation rows; write the winner as a recipe. Goes on where it was cut off."""
    from burnish import pipeline
    from burnish.cli.terminal import progress
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    aim = pipeline.Aim(objective, trials, None if budget is None else parse_time(budget))
    with Run.working(run or folder_of(recipe) or Path("sweeps") / asked.name, asked, fresh=fresh) as job, progress(as_json) as tell:
        found = pipeline.sweep(job, over=over or (), aim=aim, tell=tell)
    if as_json:
        print_json({"sweep": str(job.path), "report": str(job.sweep_report_file), **found, "trials": pipeline.read_trials(job.trials_file)})
    else:
        show_sweep(job, found)


def parse_time(text: str) -> float:
    """90s, 30m, 2h → seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"--budget {text}: expected a time above 0 with its unit, for example 90s, 30m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def show_sweep(job: Run, found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, say, seconds, table

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
