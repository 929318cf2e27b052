"""`burnish decide`: what a person types and sees."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.app import (
    FreshOption,
    JsonOption,
    RecipeArgument,
    RunOption,
    SetOption,
    app,
    asked_recipe,
    folder_of,
    import_steps,
    print_json,
)
from burnish.errors import EXIT_CANT_TELL, EXIT_DONE, EXIT_GATE_SAID_NO

EXIT_OF = {"fine-tune": EXIT_DONE, "cant-tell": EXIT_CANT_TELL}  # every other answer is a no to fine-tuning


@app.command()
def decide(
    recipe: RecipeArgument,
    run: RunOption = None,
    budget: Annotated[str, typer.Option(help="Time for all of it; a short training gets what is left: 90s, 30m, 2h.")] = "20m",
    target: Annotated[float | None, typer.Option(min=0, max=1, help="A score (0 to 1) that is enough: a prompt that surely reaches it wins.", show_default=False)] = None,
    of_use: Annotated[float, typer.Option(min=0, max=1, help="A score that cannot reach this is of no use.")] = 0.1,
    bases: Annotated[str | None, typer.Option(metavar="A,B,C", help="Put several base models through the same rows, and recommend one.", show_default=False)] = None,
    overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Should you fine-tune? Measures prompts, examples, look-up and a short training on the same rows. Exit code 0: yes, 3: no, 4: can't tell."""
    from burnish.cli.search import parse_time

    seconds = parse_time(budget)
    import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import progress
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    wish = pipeline.Wish(seconds, target, of_use)
    folder = run or folder_of(recipe) or Path("runs") / asked.name
    with Run.working(folder, asked, fresh=fresh) as job, progress(as_json) as tell:
        job.note(versions=pipeline.versions(), machine=pipeline.machine())
        if bases:
            found = pipeline.decide_bases(job, [name.strip() for name in bases.split(",") if name.strip()], wish=wish, tell=tell)
        else:
            found = pipeline.decide(job, wish=wish, tell=tell)
    if as_json:
        print_json({"run": str(job.path), **found})
    elif bases:
        _show_bases(found)
    else:
        _show(job, found)
    raise typer.Exit(EXIT_OF.get(found["verdict"], EXIT_GATE_SAID_NO))


def _show(job: Any, found: dict[str, Any]) -> None:
    from burnish.cli.terminal import difference, out, say, score, seconds, table

    rows = [
        (
            row["title"] + (" (probe)" if row["family"] == "tuned" and found["probe"] and not found["probe"]["whole"] else ""),
            score(row["score"]),
            f"{score(row['low'])} – {score(row['high'])}",
            row["unscored"],
            seconds(row["seconds_p50"]),
            f"{row['prompt_tokens_mean']:.0f} → {row['completion_tokens_mean']:.0f}",
            "–" if row["cost_per_1000"] is None else f"{row['cost_per_1000']:.4g}",
        )
        for row in found["candidates"]
    ]
    out.print()
    confidence = f"{100 * found['confidence']:.0f} % interval"
    columns = ["candidate", "score", confidence, "unread", "wait p50", "tokens in → out", "cost of 1,000"]
    table(f"{found['metric_title']}, {found['test_rows']} test rows", columns, rows)
    say(f"the most frequent training answer, to every question: {score(found['constant']['score'])}")
    for item in found["pairs"]:
        say(f"{item['candidate']} against {item['baseline']}: {difference(item)}, p = {item['p_adjusted']:.2g} (Holm)  {item['verdict']}")
    style = {"fine-tune": "bold green", "cant-tell": "bold yellow"}.get(found["verdict"], "bold red")
    say(f"\n{found['verdict'].upper()}  {found['sentence']}", style)
    for line in found["would_change"]:
        say(f"what would change it: {line}")
    say(f"report: {job.decision_report_file.resolve()}")


def _show_bases(found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, say, score, seconds, table

    rows = [
        (
            row["base"],
            score(row["before"]),
            score(row["after"]),
            "–" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}",
            f"{row['tokens_per_word']:.2f}",
            f"{row['weights_gb']:.2f}",
            seconds(row["seconds_p50"]),
            row["licence"],
            row["verdict"],
        )
        for row in found["bases"]
    ]
    out.print()
    columns = [
        "base model",
        "best before",
        "after a probe",
        "bits per byte",
        "tokens per word",
        "weights GB",
        "wait p50",
        "licence",
        "advice",
    ]
    table(f"{found['metric_title']}, {found['test_rows']} test rows", columns, rows)
    say(f"\n{found['sentence']}", "bold")
