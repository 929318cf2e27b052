"""`burnish estimate`: what a person types and sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.cli.app import FreshOption, JsonOption, RecipeArgument, RunOption, SetOption, app, asked_recipe, folder_of, print_json

if TYPE_CHECKING:
    from burnish.run import Run

PARTS = {
    "weights": "the base's weights",
    "adapter": "the adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "blocks of logits",
    "everything_else": "everything else",
}


@app.command()
def estimate(
    recipe: RecipeArgument, run: RunOption = None,
    price: Annotated[float | None, typer.Option("--price-per-hour", help="Of this machine, or of --gpu; in any currency.", show_default=False)] = None,
    gpu: Annotated[str | None, typer.Option(help="Reckon for a GPU of the table, too: h100, a100-80gb, l4, rtx-4090 …", show_default=False)] = None,
    overrides: SetOption = None, fresh: FreshOption = False, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Foretell time, memory and money of a whole run, from about a minute's probe on this machine. Prepares the rows; trains nothing."""
    from burnish import pipeline
    from burnish.cli.terminal import progress
    from burnish.run import Run

    asked = asked_recipe(recipe, overrides)
    folder = run or folder_of(recipe) or Path("runs") / asked.name
    with Run.working(folder, asked, fresh=fresh) as job, progress(as_json) as tell:
        job.note(versions=pipeline.versions(), machine=pipeline.machine())
        found = pipeline.estimate(job, price_per_hour=price, gpu=gpu, tell=tell).to_dict()
    if as_json:
        print_json({"run": str(job.path), **found})
    else:
        show_estimate(job, found)


def show_estimate(job: Run, found: dict[str, Any]) -> None:
    from burnish.cli.terminal import out, say, seconds, table

    forecasts = [found["here"], *([found["elsewhere"]] if found["elsewhere"] else [])]
    out.print()
    names = [forecast["machine"] for forecast in forecasts]
    rows: list[tuple[str, ...]] = [
        (step, *(seconds(forecast["seconds"][step]) for forecast in forecasts)) for step in forecasts[0]["seconds"]
    ]
    rows.append(("all", *(seconds(forecast["total_seconds"]) for forecast in forecasts)))
    rows.append(("between", *(f"{seconds(forecast['low_seconds'])} – {seconds(forecast['high_seconds'])}" for forecast in forecasts)))
    table("time", ["step", *names], rows)
    parts = [name for name in PARTS if any(name in forecast["memory"] for forecast in forecasts)]
    lines = [(PARTS[name], *(_gb(forecast["memory"].get(name, 0)) for forecast in forecasts)) for name in parts]
    lines.append(("together, at the peak", *(_gb(forecast["memory"]["total"]) for forecast in forecasts)))
    lines.append(("there are", *(_gb(forecast["memory_available"]) for forecast in forecasts)))
    table("memory", ["part", *names], lines)
    for forecast in forecasts:
        if (money := forecast["money"]) is not None:
            price = f"at {forecast['price_per_hour']:g} an hour"
            say(f"cost on {forecast['machine']}: {money['expected']:.2f} [{money['low']:.2f}, {money['high']:.2f}] {price}")
        if not forecast["fits"]:
            say(f"{forecast['machine']} has less memory than that: lower data.max_length or training.micro_batch_size", "bold yellow")
        if not forecast["measured"]:
            say(f"{forecast['machine']}: {'; '.join(forecast['assumptions'])}")
    shown = found["detectable_difference"]
    if shown is not None:
        say(f"{found['test_rows']} test rows show differences of about {100 * shown:.0f} points or more")
    elif found["here"]["seconds"]["baselines"]:
        say(f"{found['test_rows']} test rows")
    say(f"the probe took {seconds(found['probe_seconds'])}; `burnish run` goes on from here, and its report compares forecast and fact")
    say(job.estimate_file)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"
