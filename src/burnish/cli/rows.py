"""`burnish curve` and `burnish value`: questions about the training rows; what a person types and sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import FreshOption, JsonOption, RecipeArgument, SetOption, app, asked_recipe, folder_of, print_json
from burnish.cli.search import parse_time
from burnish.errors import EXIT_CANT_TELL, EXIT_DONE, EXIT_GATE_SAID_NO, RecipeError

if TYPE_CHECKING:
    from burnish.run import Run

ObjectiveOption = Annotated[
    str, typer.Option(help="validation_score (the task's metric), validation_loss, or a metric's name.  [default: the score of answers, the loss of plain text]", show_default=False)
]  # fmt: skip


@app.command()
def curve(
    recipe: RecipeArgument,
    at: Annotated[str, typer.Option("--at", metavar="PERCENT,…", help="Parts of the training rows, in per cent; each holds the smaller ones.")] = "12.5,25,50,100",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each part; another seed draws other rows.")] = 3,
    equal: Annotated[str, typer.Option(help="epochs (as `burnish run` would) or steps (every part as many updates as all rows).")] = "epochs",
    objective: ObjectiveOption = "auto",
    budget: Annotated[str | None, typer.Option(help="Time at most, all sessions together: 90s, 30m, 2h.", show_default=False)] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The curve's folder.  [default: ./curves/NAME, or the run that is given]", show_default=False)] = None,
    overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """How much would more data bring? Short trainings on parts of the rows, a curve through them. Exit code 4: it is not trustworthy."""
    from burnish import pipeline
    from burnish.cli.terminal import progress, say
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    plan = pipeline.CurvePlan(parse_parts(at), seeds, equal, objective, None if budget is None else parse_time(budget))
    with Run.working(run or folder_of(recipe) or Path("curves") / asked.name, asked, fresh=fresh) as job, progress(as_json) as tell:
        found = pipeline.curve(job, plan=plan, tell=tell)
    if as_json:
        print_json({"curve": str(job.path), "report": str(job.curve_report_file), **found})
    else:
        show_curve(job, found)
        say(f"\n{found['sentence']}", "bold green" if found["trustworthy"] else "bold yellow")
        say(f"report: {job.curve_report_file.resolve()}")
    raise typer.Exit(EXIT_DONE if found["trustworthy"] else EXIT_CANT_TELL)


@app.command()
def value(
    recipe: RecipeArgument,
    drop: Annotated[float, typer.Option(help="Per cent of the training rows that are left out, the worst.")] = 20,
    folds: Annotated[int, typer.Option(min=2, help="Each row is judged by a model that was trained on the other folds.")] = 3,
    seeds: Annotated[int, typer.Option(min=0, help="Trainings of each arm of the proof (kept rows against random ones); 0: no proof.")] = 3,
    objective: ObjectiveOption = "auto",
    run: Annotated[Path | None, typer.Option("--run", help="The folder.  [default: ./values/NAME, or the run that is given]", show_default=False)] = None,
    overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Which training rows help, which hurt? A ranked list, the rows worth keeping, and a proof. Exit code 3: leaving rows out is worse, 4: can't tell."""
    from burnish import pipeline
    from burnish.cli.terminal import progress, say
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    plan = pipeline.ValuePlan(drop / 100, folds, seeds, objective)
    with Run.working(run or folder_of(recipe) or Path("values") / asked.name, asked, fresh=fresh) as job, progress(as_json) as tell:
        found = pipeline.value(job, plan=plan, tell=tell)
    verdict = found["proof"]["verdict"] if found["proof"] else None
    if as_json:
        print_json({"value": str(job.path), "report": str(job.value_report_file), "ranking": str(job.value_rows_file), **found})
    else:
        show_value(job, found)
        say(f"\n{found['sentence']}", {"BETTER": "bold green", "WORSE": "bold red"}.get(str(verdict), "bold yellow"))
        say(f"report: {job.value_report_file.resolve()}")
        say(
            f"ranking: {job.value_rows_file} and {job.value_table_file.name} · rows that stay: {job.kept_file} (data.train of a recipe, in the chat form)"
        )
    raise typer.Exit({None: EXIT_DONE, "BETTER": EXIT_DONE, "WORSE": EXIT_GATE_SAID_NO}.get(verdict, EXIT_CANT_TELL))


def parse_parts(text: str) -> tuple[float, ...]:
    """12.5,25,50,100 → fractions, the smallest first."""
    try:
        parts = sorted({float(part) / 100 for part in text.split(",") if part.strip()})
    except ValueError:
        raise RecipeError(f"--at {text}: expected per cents with commas between, for example 12.5,25,50,100") from None
    return tuple(parts)


def show_curve(job: Run, found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, percent, seconds, table

    def shown(value: Any) -> str:
        return f"{value:.4f}" if found["lower_is_better"] else percent(value)

    rows = [(point["rows"], point["seed"], shown(point["value"]), seconds(point["seconds"]), "") for point in found["points"]]
    rows += [(point["rows"], point["seed"], "–", "–", f"missing: {point['reason']}") for point in found["missing"]]
    out.print()
    table(found["metric_title"], ["rows", "seed", "value", "took", ""], sorted(rows, key=lambda row: (row[0], row[1])))


def show_value(job: Run, found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, table

    rows = [
        (row["rank"], row["source"], f"{row['badness']:.3f}", row["question"][:50], row["answer"][:30], row["reason"][:100])
        for row in found["worst"][:10]
    ]
    out.print()
    table("the worst rows", ["rank", "where", "badness", "question", "answer", "why"], rows)
