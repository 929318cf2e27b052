"""The commands that work in a run, in the order of the flow: init, check, prepare, train, evaluate, compare, report, merge; run and demo do them all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    open_run,
    print_json,
    rank,
)
from burnish.errors import EXIT_CANT_TELL, EXIT_DONE, EXIT_GATE_SAID_NO, DataError, RecipeError, Stopped

if TYPE_CHECKING:
    from burnish.run import Run


@app.command()
def init(
    data: Annotated[str, typer.Argument(help="A data file.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="The base model.")] = "gemma-3-270m",
) -> None:
    """Write a commented recipe from a data file."""
    from burnish.cli.terminal import say
    from burnish.data.start import recipe_name, suggest_recipe
    from burnish.run import write_whole

    if output.exists():
        raise RecipeError(f"{output} exists already; choose another name with --output")
    shown = data
    if not data.startswith(("demo:", "hub:")) and Path(data).exists():
        # The recipe's paths count from the recipe's folder.
        shown = _relative(data, output)
    text = suggest_recipe(data, name=recipe_name(Path(data)), model=model)
    write_whole(output, text.replace(json.dumps(data), json.dumps(shown), 1).encode())
    say(f"wrote {output}: `burnish check {output}` looks at the data, `burnish run {output}` does everything")


@app.command()
def check(
    recipe: RecipeArgument,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Print N rows coloured by what is trained.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings (duplicates, contradictions) count as problems.")] = False,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at the data: every problem at once, as file:line:field, and the numbers."""
    from burnish import pipeline
    from burnish.cli import terminal
    from burnish.data import statistics
    from burnish.models import tokens_of

    with terminal.progress(as_json) as tell:
        asked = asked_recipe(recipe, overrides)
        loaded, checked, chat = pipeline.check(asked, tell=tell)
    problems = loaded.problems + [problem for part in checked.values() for problem in part.problems]
    warnings = [problem for part in checked.values() for problem in part.warnings]
    rows = {source["split"]: source["rows"] for source in loaded.sources}
    numbers = {split: statistics(part, int(rows[split])) for split, part in checked.items()}
    if as_json:
        print_json(
            {"problems": [str(p) for p in problems], "warnings": [str(w) for w in warnings], "splits": numbers, "sources": loaded.sources}
        )
    else:
        from burnish.cli.tables import show_check

        show_check(numbers, loaded.sources, [str(w) for w in warnings])
        for example in [example for part in checked.values() for example in part.examples][:show]:
            terminal.say(f"\n{example.source}", "bold")
            for tokens in tokens_of(chat, example, asked):
                terminal.out.print(terminal.coloured_mask(chat.segments(tokens)))
    if problems or (strict and warnings):
        found = problems + (warnings if strict else [])
        raise DataError(f"{len(found)} problem{'s' * (len(found) != 1)}", found)


@app.command()
def prepare(recipe: RecipeArgument, run: RunOption = None, overrides: SetOption = None, fresh: FreshOption = False) -> None:
    """Clean and split the rows into the run's folder."""
    _step("prepare", recipe, run, overrides, fresh)


@app.command()
def train(
    recipe: RecipeArgument, run: RunOption = None, overrides: SetOption = None, fresh: FreshOption = False,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-change", metavar="KEY", show_default=False,
            help="A training that was cut off may go on although this key (or `versions`) differs; may be repeated.",
        ),
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Share each step among so many processes (one for each GPU).")] = 1,
) -> None:  # fmt: skip
    """Fine-tune on the prepared rows. Goes on where a training was cut off; Ctrl-C and SIGTERM save first."""
    if processes > 1:
        _launch(processes, run or folder_of(recipe) or Path("runs") / asked_recipe(recipe, overrides).name)
    elif rank() > 0:
        from burnish import pipeline

        pipeline.assist(run or folder_of(recipe) or Path("runs") / asked_recipe(recipe, overrides).name)
    else:
        _step("train", recipe, run, overrides, fresh, allow_change=allow_change or ())


@app.command()
def evaluate(recipe: RecipeArgument, run: RunOption = None, overrides: SetOption = None) -> None:
    """Answer the test rows with every candidate (the tuned one, once there is an adapter)."""
    _step("evaluate", recipe, run, overrides, False)


@app.command()
def compare(recipe: RecipeArgument, run: RunOption = None, as_json: JsonOption = False) -> None:
    """Scores, intervals and the verdict, from the answers in the run."""
    from burnish import pipeline
    from burnish.cli.terminal import progress

    job = open_run(recipe, run)
    with job.lock(), progress(as_json) as tell:
        pipeline.compare(job, tell=tell)
    finish(job, as_json)


@app.command()
def report(recipe: RecipeArgument, run: RunOption = None) -> None:
    """Write report.html and report.json from the run's files."""
    from burnish.cli.terminal import say
    from burnish.report import report as write

    job = open_run(recipe, run)
    with job.lock(), job.step("report", ""):
        say(write(job))


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name under ./runs.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the merged model.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """The run's adapter and its base as one model that plain transformers loads, proved to answer as the two do."""
    from burnish import pipeline
    from burnish.cli.terminal import progress, say

    job = open_run(run, None)
    with job.lock(), progress(as_json) as tell:
        merged = pipeline.merge(job, output, tell=tell)
    if as_json:
        print_json(dataclasses.asdict(merged))
        return
    say(
        f"{merged.folder}: {merged.dtype}. Its logits are {merged.error:.2g} away from base + adapter's, which are {merged.effect:.2g} away from the base's "
        f"(root mean square over {merged.probe_tokens} places)"
    )
    if merged.quantized is not None:
        say(
            f"Trained on a base held as {merged.quantized}; merged into the original weights it is another model: its logits are {merged.difference_to_trained:.2g} "
            f"away from the trained one's, and {100 * (merged.agreement_with_trained or 0):.1f} % of the likeliest tokens are the same. Measure it before you ship it",
            "yellow",
        )


@app.command()
def run(
    recipe: RecipeArgument, run: RunOption = None, overrides: SetOption = None, fresh: FreshOption = False,
    forecast: Annotated[bool, typer.Option("--estimate", help="Foretell time and memory first; the report compares them with the facts.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Everything: prepare, baselines, train, evaluate, compare, report. Takes up a run that was cut off."""
    import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import progress

    with progress(as_json) as tell:
        asked = asked_recipe(recipe, overrides)
        job = pipeline.run_recipe(asked, folder=run or folder_of(recipe), fresh=fresh, forecast=forecast, tell=tell)
    finish(job, as_json)


@app.command()
def demo(
    language: Annotated[str, typer.Option(help="Of the embedded data, for example en or de.")] = "en",
    run: RunOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """The main job on the embedded model and data: voice commands for a home, turned into JSON. About 10 minutes on 2 cores."""
    from burnish import pipeline
    from burnish.cli.terminal import progress

    with progress(as_json) as tell:
        job = pipeline.run_recipe(pipeline.demo_recipe(language), folder=run, fresh=fresh, tell=tell)
    finish(job, as_json)


def _step(
    step: str, recipe: Path, run: Path | None, overrides: list[str] | None, fresh: bool, *, allow_change: Sequence[str] = ()
) -> None:  # fmt: skip
    import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import progress, say
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    if allow_change:
        pipeline.refuse_unchangeable(allow_change)
    job = Run.create(run or folder_of(recipe) or Path("runs") / asked.name, asked, fresh=fresh, allow_change=allow_change)
    with job.lock(), progress() as tell:
        job.note(versions=pipeline.versions(), machine=pipeline.machine())
        if step != "prepare":
            pipeline.prepare(job, tell=tell)  # done already: nothing happens
        more = {"allow_change": allow_change} if step == "train" else {}
        getattr(pipeline, step)(job, tell=tell, **more)
    say(job.path)


def finish(job: Run, as_json: bool) -> None:
    """Show the verdict; leave with the code that says it."""
    from burnish.evaluation import CANDIDATES
    from burnish.types import Verdict

    content = job.read_json(job.comparison_file)
    if as_json:
        shown = {key: value for key, value in content.items() if key != "rows_detail"}
        retained = {"retain": job.read_json(job.retain_file)} if job.retain_file.exists() else {}
        print_json({"run": str(job.path), "report": str(job.report_file), **shown, **retained})
    else:
        from burnish.cli.tables import show_verdict

        show_verdict(job)
    kept = job.read_json(job.retain_file) if job.retain_file.exists() else None
    if kept is not None and not as_json:
        from burnish.cli.retain import show_retention

        show_retention(kept)
    if any(CANDIDATES[row["name"]].trained for row in content["candidates"]):
        codes = {Verdict.BETTER: EXIT_DONE, Verdict.WORSE: EXIT_GATE_SAID_NO, Verdict.CANT_TELL: EXIT_CANT_TELL}
        # A model that is better but forgets does not pass; one that is not better has failed already.
        raise typer.Exit(codes[Verdict(content["verdict"])] or gate_code(kept))


def gate_code(kept: dict[str, Any] | None) -> int:
    """The exit code of the gate on retention: 0 where there is none."""
    from burnish.advice import Gate
    from burnish.pipeline import gate_of

    state = gate_of(kept) if kept is not None else None
    return {Gate.FAILED: EXIT_GATE_SAID_NO, Gate.CANT_TELL: EXIT_CANT_TELL}.get(Gate(state), EXIT_DONE) if state is not None else EXIT_DONE


def _launch(processes: int, folder: Path) -> None:
    """This command again, once for each process."""
    from burnish.training.launch import launch

    command = [sys.executable, "-m", "burnish", *_without(sys.argv[1:], "--processes")]
    if code := launch(command, processes):
        if code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            raise Stopped(f"stopped; what was done is saved in {folder}", code - 128)
        raise typer.Exit(code)


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """A command line without an option that takes a value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


def _relative(data: str, output: Path) -> str:

    return os.path.relpath(Path(data).resolve(), output.resolve().parent)
