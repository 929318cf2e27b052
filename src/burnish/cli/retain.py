"""`burnish retain`: what a person types and sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.app import JsonOption, app, open_run, print_json
from burnish.cli.search import parse_time
from burnish.errors import RecipeError


@app.command()
def retain(
    run: Annotated[Path, typer.Argument(help="A run's folder, its name under ./runs, or its recipe.", show_default=False)],
    suites: Annotated[
        list[str] | None,
        typer.Option("--suites", metavar="NAME", help="embedded, a file or folder of suites or must-still-work prompts, or lm-eval:TASK; may be repeated.  [default: the recipe's, else embedded]", show_default=False),
    ] = None,
    repairs: Annotated[str | None, typer.Option("--try", metavar="A,B", help="Look for a better point: scale, replay, kl, layers, rank.  [default: measure only]", show_default=False)] = None,
    budget: Annotated[str | None, typer.Option(help="Time for --try at most: 90s, 30m, 2h. What does not fit is left out and told.", show_default=False)] = None,
    max_drop: Annotated[float | None, typer.Option("--max-drop", min=0, max=1, help="What may be lost, as a fraction: exit code 3 where more was, 4 where it can't tell.  [default: the recipe's]", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=4, help="Rows of each suite at most.")] = 200,
    task_rows: Annotated[int, typer.Option("--task-rows", min=4, help="Validation rows that each point answers at most.")] = 100,
    scales: Annotated[str, typer.Option(help="What --try scale tries besides 0 and 1.")] = "0.25,0.5,0.75,1.25",
    replay_data: Annotated[str | None, typer.Option("--replay-data", metavar="FILE", help="General rows for --try replay.  [default: the recipe's, else answers of the base model]", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """What the tuned model has forgotten, and which point between task and retention is worth shipping. Goes on where it was cut off."""
    from burnish import pipeline
    from burnish.cli.steps import gate_code
    from burnish.cli.terminal import progress, say

    options = pipeline.RetainOptions(
        suites=tuple(suites or ()),
        max_drop=max_drop,
        rows=rows,
        task_rows=task_rows,
        repairs=tuple(name.strip() for name in (repairs or "").split(",") if name.strip()),
        scales=_numbers(scales),
        budget_seconds=None if budget is None else parse_time(budget),
        replay_data=None if replay_data is None else str(Path(replay_data).resolve()),
    )
    job = open_run(run, None)
    with job.lock(), progress(as_json) as tell:
        found = pipeline.retain(job, options, tell=tell)
    if as_json:
        print_json({"run": str(job.path), **found})
    else:
        show_retention(found)
        if not options.repairs and found["verdict"] == "LOST":
            say(f"`burnish retain {run} --try scale` looks for a point that loses less, without training")
        if job.report_file.exists():
            say(f"report: {job.report_file.resolve()}")
    raise typer.Exit(gate_code(found))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RecipeError(f"--scales {text}: expected numbers with commas between them, for example 0.25,0.5,0.75") from None


def show_retention(found: dict[str, Any]) -> None:
    """The table of suites, the sentence; of a repair, its points and its sentence."""
    from burnish.cli.terminal import difference, out, say, score, table

    rows = [
        (
            row["suite"] or row["title"],
            "–" if row["before"] is None else score(row["before"], row["unit"]),
            "–" if row["after"] is None else score(row["after"], row["unit"]),
            difference({"difference": row["change"], "low": row["low"], "high": row["high"]}),
            row["n"],
            f"{row['p_adjusted']:.2g}",
            row["verdict"],
            "–" if row["detectable"] is None else f"{100 * row['detectable']:.1f} points",
        )
        for row in (*found["suites"], found["whole"])
    ]
    out.print()
    columns = ["suite", "base", "tuned", f"change [{100 * found['confidence']:.0f} %]", "rows", "p (Holm)", "verdict", "can show"]
    table("What must not be forgotten (bits per byte: change in % of the base, turned round)", columns, rows)
    for row in found["broken"][:5]:
        say(f"no longer works: {row['prompt'][-80:]!r} → {row['answer_after'][:60]!r} (before: {row['answer_before'][:60]!r})", "yellow")
    if found["repair"] is not None:
        _show_repair(found["repair"])
    style = {"KEPT": "bold green", "LOST": "bold red"}.get(found["verdict"], "bold yellow")
    say(f"\n{found['verdict']}  {found['sentence']}", style)
    gate = (found["repair"] or {}).get("gate") or found["gate"]
    if gate is not None:
        say(f"gate: {gate['sentence']}")


def _show_repair(found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, percent, say, seconds, table

    unit = 100 if found["task_percent"] else 1
    rows = [
        (
            point["name"] + (" (chosen)" if point["name"] == found["chosen"] else ""),
            f"{unit * point['task']:.3g} [{unit * point['task_low']:.3g}, {unit * point['task_high']:.3g}]",
            f"{100 * point['change']:+.1f} [{100 * point['change_low']:+.1f}, {100 * point['change_high']:+.1f}]",
            percent(point["gain_kept"]),
            percent(point["loss_kept"]),
            seconds(point.get("training_seconds", 0) + point["seconds"]),
        )
        for point in found["points"]
    ]
    out.print()
    title = f"Points, on {found['rows']['validation']} validation rows and {found['rows']['choosing']} rows of the suites: {found['task_title']}"
    table(title, ["point", "task", "retention, points", "gain kept", "loss kept", "took"], rows)
    for left in found["left_out"]:
        say(f"left out: {left['name']}: {left['reason']}", "yellow")
    say(f"chosen: {found['chosen']}: {found['why']}")
    say(found["sentence"], "bold")
    if found["published"] is not None:
        say(f"the repaired adapter: {found['published']['folder']}")
