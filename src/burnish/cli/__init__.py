"""One sub-command per door; no logic. Exit codes: 0 done · 1 our fault · 2 the user's input · 3 a gate said no · 4 can't tell.

The doors are imported inside the commands: `burnish --help` must not wait for torch.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from burnish.errors import (
    EXIT_CANT_TELL,
    EXIT_DONE,
    EXIT_GATE_SAID_NO,
    EXIT_OUR_FAULT,
    EXIT_USER_INPUT,
    BurnishError,
    DataError,
    RecipeError,
    Stopped,
)

if TYPE_CHECKING:
    from burnish.run import Run


class _Interrupted(Exception):
    """A KeyboardInterrupt on its way through typer, which would make a bare 130 of it and lose what it says."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop


app = typer.Typer(
    name="burnish", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Fine-tune a language model on your own data, and prove whether it helped.",
)  # fmt: skip
runs_app = typer.Typer(no_args_is_help=True, help="Look at runs: list, show, diff.", rich_markup_mode=None)
recipe_app = typer.Typer(no_args_is_help=True, help="Every knob of a recipe: explain, schema.", rich_markup_mode=None)
app.add_typer(runs_app, name="runs")
app.add_typer(recipe_app, name="recipe")

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (.yaml), or a run's folder.", show_default=False)]
RunOption = Annotated[Path | None, typer.Option("--run", help="The run's folder.  [default: ./runs/NAME]", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; may be repeated.", show_default=False)
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Delete what the run's folder holds and start anew.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """--debug is read in main()."""


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
        asked = _recipe(recipe, overrides)
        loaded, checked, chat = pipeline.check(asked, tell=tell)
    problems = loaded.problems + [problem for part in checked.values() for problem in part.problems]
    warnings = [problem for part in checked.values() for problem in part.warnings]
    rows = {source["split"]: source["rows"] for source in loaded.sources}
    numbers = {split: statistics(part, int(rows[split])) for split, part in checked.items()}
    if as_json:
        _print_json(
            {"problems": [str(p) for p in problems], "warnings": [str(w) for w in warnings], "splits": numbers, "sources": loaded.sources}
        )
    else:
        _show_check(numbers, loaded.sources, [str(w) for w in warnings])
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
        _launch(processes, run or _folder_of(recipe) or Path("runs") / _recipe(recipe, overrides).name)
    elif _rank() > 0:
        from burnish import pipeline

        pipeline.assist(run or _folder_of(recipe) or Path("runs") / _recipe(recipe, overrides).name)
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

    job = _open(recipe, run)
    with job.lock(), progress(as_json) as tell:
        pipeline.compare(job, tell=tell)
    _finish(job, as_json)


@app.command()
def report(recipe: RecipeArgument, run: RunOption = None) -> None:
    """Write report.html and report.json from the run's files."""
    from burnish.cli.terminal import say
    from burnish.report import report as write

    job = _open(recipe, run)
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

    job = _open(run, None)
    with job.lock(), progress(as_json) as tell:
        merged = pipeline.merge(job, output, tell=tell)
    if as_json:
        _print_json(dataclasses.asdict(merged))
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
    recipe: RecipeArgument, run: RunOption = None, overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False
) -> None:
    """Everything: prepare, baselines, train, evaluate, compare, report. Takes up a run that was cut off."""
    _import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import progress

    with progress(as_json) as tell:
        job = pipeline.run_recipe(_recipe(recipe, overrides), folder=run or _folder_of(recipe), fresh=fresh, tell=tell)
    _finish(job, as_json)


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
    from burnish.cli.search import parse_time, show_sweep
    from burnish.cli.terminal import progress
    from burnish.run import Run

    asked = _recipe(recipe, overrides)
    aim = pipeline.Aim(objective, trials, None if budget is None else parse_time(budget))
    with Run.working(run or _folder_of(recipe) or Path("sweeps") / asked.name, asked, fresh=fresh) as job, progress(as_json) as tell:
        found = pipeline.sweep(job, over=over or (), aim=aim, tell=tell)
    if as_json:
        _print_json(
            {"sweep": str(job.path), "report": str(job.sweep_report_file), **found, "trials": pipeline.read_trials(job.trials_file)}
        )
    else:
        show_sweep(job, found)


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
    _finish(job, as_json)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Whether this machine is ready: versions, memory, disk, compute type, extras, the embedded model."""
    from burnish.cli.doctor import examine
    from burnish.cli.terminal import table

    findings = examine()
    if as_json:
        _print_json([finding._asdict() for finding in findings])
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
        _print_json(rows)
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

    job = _open(run, None)
    status = job.status()
    if as_json:
        comparison = job.read_json(job.comparison_file) if job.comparison_file.exists() else None
        _print_json({"run": str(job.path), **status, "recipe": job.recipe().to_dict(), "comparison": comparison})
        return
    steps = [(name, step["state"], seconds(step.get("seconds")), step.get("error", "")) for name, step in status["steps"].items()]
    table(str(job.path), ["step", "state", "took", "error"], steps)
    if job.comparison_file.exists():
        _show_verdict(job)
    else:
        say("no verdict yet: `burnish run` goes on where the run stopped")


@runs_app.command("diff")
def runs_diff(a: Path, b: Path, as_json: JsonOption = False) -> None:
    """What differed between two runs, and what it did to the scores (B minus A)."""
    from burnish.evaluation.diff import diff_runs

    found = diff_runs(_open(a, None), _open(b, None))
    if as_json:
        _print_json(found)
    else:
        _show_diff(found)


@recipe_app.command("explain")
def recipe_explain(
    key: Annotated[str | None, typer.Argument(help="A key or section; none: all.", show_default=False)] = None, as_json: JsonOption = False
) -> None:
    """Every key with its default, unit and reason."""
    from burnish.cli.terminal import say
    from burnish.recipe import explain

    rows = explain(key)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        say(f"{row['key']} = {row['default']}   ({row['type']})", "bold")
        say(f"    {row['meaning']}")


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from burnish.recipe import schema

    _print_json(schema())


def main() -> None:
    """The command `burnish`."""
    # Threads that spin while they wait lose all where another process wants the same cores: a step of 20 s took 72 s. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps the code of its last 1,024 products, megabytes each; packed rows have new lengths at every step. A step has some 150.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # --debug counts wherever it stands: people add it at the end of the line that failed.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except BurnishError as problem:
        code = _report_error(str(problem), problem.exit_code, debug)
    except typer.Abort:
        code = _report_error("stopped", EXIT_OUR_FAULT, debug)
    except (KeyboardInterrupt, _Interrupted) as caught:
        stop = caught.__cause__ if isinstance(caught, _Interrupted) else caught
        text = str(stop) or "stopped: finished steps are kept"
        code = stop.exit_code if isinstance(stop, Stopped) else 130
        if _is_launched():
            # The launcher says how to go on; the other processes have nothing to add to what the first says.
            code = code if _rank() else _report_error(text, code, debug)
        else:
            code = _report_error(f"{text}\ngo on with:  {_again()}", code, debug)
    except BrokenPipeError:
        code = EXIT_DONE
    except Exception as problem:
        # Usage errors come from typer's own click; they know how to print themselves.
        if hasattr(problem, "show") and hasattr(problem, "exit_code"):
            problem.show()
            code = EXIT_USER_INPUT
        else:
            code = _report_error(
                f"burnish failed: {type(problem).__name__}: {problem}. This is our fault; --debug shows where", EXIT_OUR_FAULT, debug
            )
    sys.exit(code or EXIT_DONE)


# ------------------------------------------------------------------------------------------------------------------ inside


def _report_error(text: str, code: int, debug: bool) -> int:
    from burnish.cli.terminal import complain

    if debug:
        traceback.print_exc()
    complain(text)
    return code


def _recipe(path: Path, overrides: list[str] | None) -> Any:
    from burnish.recipe import load_recipe

    if _is_run(path):
        job = _open(path, None)
        if overrides:
            raise RecipeError("--set changes a recipe, not a run that has begun: give the recipe's file, and another --run")
        return job.recipe_as_asked()
    return load_recipe(path, overrides or ())


def _is_run(path: Path) -> bool:
    """A run's folder, or its name under ./runs, was given where a recipe could stand."""
    return path.is_dir() or (not path.exists() and not path.suffix)


def _folder_of(path: Path) -> Path | None:
    return _open(path, None).path if _is_run(path) else None


def _open(recipe: Path, run: Path | None) -> Run:
    from burnish.recipe import load_recipe
    from burnish.run import Run

    if run is not None:
        return Run.open(run)
    if recipe.is_dir():
        return Run.open(recipe)
    if recipe.suffix in (".yaml", ".yml"):
        return Run.open(Path("runs") / load_recipe(recipe).name)
    return Run.open(Path("runs") / recipe)


def _rank() -> int:
    """Which process of a training this is (torchrun's environment)."""
    return int(os.environ.get("RANK", "0"))


def _is_launched() -> bool:
    """Whether `burnish train --processes N` started this process."""
    return "BURNISH_BEAT" in os.environ


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


def _again() -> str:
    """The command that goes on: this one, without what would delete what is there."""
    return shlex.join(["burnish", *(argument for argument in sys.argv[1:] if argument != "--fresh")])


def _import_steps() -> None:
    """torch, transformers and PEFT, read without a search for garbage among what stays anyway: a sixth quicker."""
    gc.disable()
    try:
        import burnish.pipeline  # noqa: F401
    finally:
        gc.enable()


def _step(
    step: str, recipe: Path, run: Path | None, overrides: list[str] | None, fresh: bool, *, allow_change: Sequence[str] = ()
) -> None:  # fmt: skip
    _import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import progress, say
    from burnish.run import Run

    asked = _recipe(recipe, overrides)
    if allow_change:
        pipeline.refuse_unchangeable(allow_change)
    job = Run.create(run or _folder_of(recipe) or Path("runs") / asked.name, asked, fresh=fresh, allow_change=allow_change)
    with job.lock(), progress() as tell:
        job.note(versions=pipeline.versions(), machine=pipeline.machine())
        if step != "prepare":
            pipeline.prepare(job, tell=tell)  # done already: nothing happens
        more = {"allow_change": allow_change} if step == "train" else {}
        getattr(pipeline, step)(job, tell=tell, **more)
    say(job.path)


def _finish(job: Run, as_json: bool) -> None:
    """Show the verdict; leave with the code that says it."""
    from burnish.evaluation import CANDIDATES
    from burnish.types import Verdict

    content = job.read_json(job.comparison_file)
    if as_json:
        kept = {key: value for key, value in content.items() if key != "rows_detail"}
        _print_json({"run": str(job.path), "report": str(job.report_file), **kept})
    else:
        _show_verdict(job)
    if any(CANDIDATES[row["name"]].trained for row in content["candidates"]):
        codes = {Verdict.BETTER: EXIT_DONE, Verdict.WORSE: EXIT_GATE_SAID_NO, Verdict.CANT_TELL: EXIT_CANT_TELL}
        raise typer.Exit(codes[Verdict(content["verdict"])])


def _show_verdict(job: Run) -> None:
    from burnish.cli.terminal import difference, out, say, score, seconds, table

    content = job.read_json(job.comparison_file)
    unit = content.get("unit")
    rows = [
        (
            row["title"],
            score(row["score"], unit),
            f"{score(row['low'], unit)} – {score(row['high'], unit)}",
            row["unscored"],
            seconds(row["seconds_p50"]),
            f"{row['prompt_tokens_mean']:.0f} → {row['completion_tokens_mean']:.0f}",
            seconds(row["training_seconds"]),
        )
        for row in content["candidates"]
    ]
    out.print()
    columns = ["candidate", "score", f"{100 * content['confidence']:.0f} % interval", "unread", "wait p50", "tokens in → out", "training"]
    batches = f" (waits in batches of {content['batch_size']})" if content["batch_size"] else ""
    table(f"{content['metric_title']}, {content['rows']} test rows{batches}", columns, rows)
    for item in content["comparisons"]:
        gain = f"{difference(item, unit)}, p = {item['p_adjusted']:.2g} (Holm)"
        say(f"{item['candidate']} against {item['baseline']}: {gain}  {item['verdict']}")
    style = {"BETTER": "bold green", "WORSE": "bold red"}.get(content["verdict"], "bold yellow")
    say(f"\n{content['verdict']}  {content['sentence']}", style)
    if job.report_file.exists():
        say(f"report: {job.report_file.resolve()}")


def _show_check(numbers: dict[str, Any], sources: list[dict[str, Any]], warnings: list[str]) -> None:
    from burnish.cli.terminal import percent, say, table

    rows = []
    for split, part in numbers.items():
        lengths = part.get("token_lengths", {})
        tokens = f"{lengths['p50']} / {lengths['p90']} / {lengths['p99']} / {lengths['max']}" if lengths else "–"
        targets = f"{lengths['target_p50']} / {lengths['target_max']}" if lengths else "–"
        rows.append((split, part["rows"], part["kept"], part["groups"], percent(part["duplicate_fraction"]), tokens, targets))
    table("rows", ["split", "read", "usable", "groups", "duplicates", "tokens p50 / p90 / p99 / max", "trained tokens p50 / max"], rows)
    for source in sources:
        say(f"{source['split']}: {source['path']} read as `{source['format']}`")
    for warning in warnings[:20]:
        say(f"warning: {warning}", "yellow")
    if len(warnings) > 20:
        say(f"… and {len(warnings) - 20} more warnings (--json lists them)", "yellow")


def _show_diff(found: dict[str, Any]) -> None:
    from burnish.cli.terminal import difference, say, score, table

    unit = "bits per byte" if "bits_per_byte" in found["metric"] else None
    say(f"A {found['a']}: {found['verdicts'][0]}    B {found['b']}: {found['verdicts'][1]}", "bold")
    changed = [(key, *map(str, pair)) for part in ("recipe", "data", "versions") for key, pair in found[part].items()]
    table("what differed" if changed else "nothing differed in recipe, data or versions", ["key", "A", "B"], changed)
    rows = []
    for row in found["scores"]:
        part = row.get("difference")
        gain = difference(part, unit) if part else "–"
        rows.append(
            (
                row["candidate"],
                score(row["a"], unit),
                score(row["b"], unit),
                gain,
                f"{part['p_value']:.2g}" if part else "–",
                row.get("note", ""),
            )
        )
    table(
        f"what it did ({' / '.join(dict.fromkeys(found['metric']))})",
        ["candidate", "A", "B", "B − A", "p (unadjusted)", "note"],
        rows,
    )


def _relative(data: str, output: Path) -> str:

    return os.path.relpath(Path(data).resolve(), output.resolve().parent)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n")
