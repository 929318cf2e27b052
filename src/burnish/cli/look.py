"""The commands that only look: doctor, runs, recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish.cli.app import JsonOption, app, open_run, print_json, recipe_app, runs_app
from burnish.errors import EXIT_USER_INPUT


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Whether this machine is ready: versions, memory, disk, compute type, extras, the embedded model."""
    from burnish.cli.doctor import examine
    from burnish.cli.terminal import table

    findings = examine()
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        table("burnish doctor", ["what", "found", "state", "advice"], [(f.what, f.found, f.state, f.advice) for f in findings])
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(EXIT_USER_INPUT)


@runs_app.command("list")
def runs_list(folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"), as_json: JsonOption = False) -> None:
    """The runs in a folder: state, verdict, score."""
    from burnish.cli.terminal import score, table
    from burnish.run import list_runs

    rows = list_runs(folder)
    if as_json:
        print_json(rows)
    else:
        shown = [
            (
                r["name"],
                r["created"][:16],
                r["state"],
                r["verdict"] or "–",
                score(r["tuned"], r["unit"]),
                score(r["best_baseline"], r["unit"]),
            )
            for r in rows
        ]
        table(f"{len(rows)} runs in {folder}", ["run", "created", "state", "verdict", "tuned", "best baseline"], shown)


@runs_app.command("show")
def runs_show(run: Annotated[Path, typer.Argument(help="A run's folder, or its name under ./runs.")], as_json: JsonOption = False) -> None:
    """One run: its steps and its table."""
    from burnish.cli.terminal import say, seconds, table

    job = open_run(run, None)
    status = job.status()
    if as_json:
        comparison = job.read_json(job.comparison_file) if job.comparison_file.exists() else None
        print_json({"run": str(job.path), **status, "recipe": job.recipe().to_dict(), "comparison": comparison})
        return
    steps = [(name, step["state"], seconds(step.get("seconds")), step.get("error", "")) for name, step in status["steps"].items()]
    table(str(job.path), ["step", "state", "took", "error"], steps)
    if job.comparison_file.exists():
        from burnish.cli.tables import show_verdict

        show_verdict(job)
    else:
        say("no verdict yet: `burnish run` goes on where the run stopped")


@runs_app.command("diff")
def runs_diff(a: Path, b: Path, as_json: JsonOption = False) -> None:
    """What differed between two runs, and what it did to the scores (B minus A)."""
    from burnish.evaluation.diff import diff_runs

    found = diff_runs(open_run(a, None), open_run(b, None))
    if as_json:
        print_json(found)
    else:
        from burnish.cli.tables import show_diff

        show_diff(found)


@recipe_app.command("explain")
def recipe_explain(
    key: Annotated[str | None, typer.Argument(help="A key or section; none: all.", show_default=False)] = None, as_json: JsonOption = False
) -> None:
    """Every key with its default, unit and reason."""
    from burnish.cli.terminal import say
    from burnish.recipe import explain

    rows = explain(key)
    if as_json:
        print_json(rows)
        return
    for row in rows:
        say(f"{row['key']} = {row['default']}   ({row['type']})", "bold")
        say(f"    {row['meaning']}")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from burnish.recipe import schema

    print_json(schema())
