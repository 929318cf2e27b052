"""The command that asks a language model which answers are better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from burnish.cli.app import JsonOption, app, import_steps, open_run, print_json
from burnish.errors import EXIT_CANT_TELL, EXIT_DONE, EXIT_GATE_SAID_NO, RecipeError


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its name under ./runs.", show_default=False)],
    rubric: Annotated[Path | None, typer.Option(help="A text file that says what makes an answer better.", show_default=False)] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Where the judge answers, up to /v1.  [default: evaluation.endpoint]", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="The judge's name there.", show_default=False)] = None,
    key_variable: Annotated[str | None, typer.Option(metavar="NAME", help="The environment variable that holds the key; none: no key is sent.", show_default=False)] = None,
    price_in: Annotated[float, typer.Option(help="For a million tokens read.")] = 0.0,
    price_out: Annotated[float, typer.Option(help="For a million tokens written.")] = 0.0,
    max_spend: Annotated[float, typer.Option(help="No request is sent that could cost more, all together, in the currency of the prices.")] = 1.0,
    labels: Annotated[Path | None, typer.Option(help="A CSV file of people's choices: example,winner.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(metavar="CANDIDATE", help="The other candidate.  [default: the best baseline]", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=1, help="Test rows at most; each costs two requests.")] = 100,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """A language model compares the fine-tuned answers with the best baseline's, by a rubric, in both orders. Leaves 0 better, 3 worse, 4 can't tell."""
    import_steps()
    from burnish import pipeline
    from burnish.cli.terminal import complain, progress
    from burnish.evaluation import Endpoint

    if (endpoint is None) != (model is None):
        raise RecipeError("--endpoint and --model go together: where the judge answers, and its name there")
    asked = None
    if endpoint is not None and model is not None:
        asked = Endpoint("judge", endpoint, model, key_variable=key_variable, price_in=price_in, price_out=price_out, max_spend=max_spend)
    if asked is not None and not (price_in or price_out) and not asked.is_local:
        complain("no --price-in and --price-out: what the judge costs is not counted, and --max-spend cannot hold")
    job = open_run(run, None)
    with job.lock(), progress(as_json) as tell:
        found = pipeline.judge(job, endpoint=asked, rubric=rubric, labels=labels, against=against, rows=rows, tell=tell)
    if as_json:
        print_json({"run": str(job.path), **{key: value for key, value in found.items() if key != "judgements"}})
    else:
        _show(found)
    codes = {"BETTER": EXIT_DONE, "WORSE": EXIT_GATE_SAID_NO}
    raise typer.Exit(codes.get(found["verdict"], EXIT_CANT_TELL))


def _show(found: dict[str, Any]) -> None:
    from burnish.cli.terminal import say

    colour = {"BETTER": "bold green", "WORSE": "bold red"}.get(found["verdict"], "bold yellow")
    say(
        f"{found['verdict']}: {found['subject']} won {found['won']}, lost {found['lost']}, tied {found['tied']} of {found['n']} against {found['against']}",
        colour,
    )
    say(
        f"win rate {100 * found['win_rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}], a tie being half; p {found['p_value']:.3f}; judge: {found['model']}"
    )
    bias = found["position_bias"]
    say(
        f"the place decided, not the answer: {'–' if bias is None else f'{100 * bias:.0f} %'} of the pairs decided; replies not in the form asked for: {found['unreadable']} pairs"
    )
    if found["judges_itself"]:
        say("the judge is the model that it judges: models prefer what they wrote", "yellow")
    if (labels := found["labels"]) is not None:
        if labels["kappa"] is None:
            say(f"{labels['n']} labelled pairs: agreement cannot be told from them", "yellow")
        else:
            interval = f" [{labels['low']:.2f}, {labels['high']:.2f}]" if labels["low"] is not None else ""
            say(
                f"agrees with people on {100 * labels['share']:.0f} % of {labels['n']} pairs, Cohen's kappa {labels['kappa']:.2f}{interval}"
            )
