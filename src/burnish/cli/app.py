"""The command line's own words: the application, the options that commands share, and how a recipe or a run is named."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from burnish.errors import RecipeError

if TYPE_CHECKING:
    from burnish.run import Run


class Interrupted(Exception):
    """A KeyboardInterrupt on its way through typer, which would make a bare 130 of it and lose what it says."""


# As `burnish --help` lists them: the way of a run, then what only looks. Commands are written in several files.
ORDER = (
    "demo", "init", "check", "prepare", "estimate", "decide", "run", "train", "evaluate", "compare", "report", "judge", "merge", "retain", "sweep", "curve", "value", "runs", "recipe", "doctor",
)  # fmt: skip


class _Commands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted from stop


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


def asked_recipe(path: Path, overrides: list[str] | None) -> Any:
    from burnish.recipe import load_recipe

    if is_run(path):
        job = open_run(path, None)
        if overrides:
            raise RecipeError("--set changes a recipe, not a run that has begun: give the recipe's file, and another --run")
        return job.recipe_as_asked()
    return load_recipe(path, overrides or ())


def is_run(path: Path) -> bool:
    """A run's folder, or its name under ./runs, was given where a recipe could stand."""
    return path.is_dir() or (not path.exists() and not path.suffix)


def folder_of(path: Path) -> Path | None:
    return open_run(path, None).path if is_run(path) else None


def open_run(recipe: Path, run: Path | None) -> Run:
    from burnish.recipe import load_recipe
    from burnish.run import Run

    if run is not None:
        return Run.open(run)
    if recipe.is_dir():
        return Run.open(recipe)
    if recipe.suffix in (".yaml", ".yml"):
        return Run.open(Path("runs") / load_recipe(recipe).name)
    return Run.open(Path("runs") / recipe)


def rank() -> int:
    """Which process of a training this is (torchrun's environment)."""
    return int(os.environ.get("RANK", "0"))


def is_launched() -> bool:
    """Whether `burnish train --processes N` started this process."""
    return "BURNISH_BEAT" in os.environ


def import_steps() -> None:
    """torch, transformers and PEFT, read without a search for garbage among what stays anyway: a sixth quicker."""
    gc.disable()
    try:
        import burnish.pipeline  # noqa: F401
    finally:
        gc.enable()


def print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n")
