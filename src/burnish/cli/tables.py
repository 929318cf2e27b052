"""What a person sees of a run: the verdict with its table, the numbers of `check`, the differences of two runs."""

from __future__ import annotations

from typing import Any

from burnish.cli.terminal import difference, out, percent, say, score, seconds, table
from burnish.run import Run


def show_verdict(job: Run) -> None:

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
    _show_consistency(content)
    style = {"BETTER": "bold green", "WORSE": "bold red"}.get(content["verdict"], "bold yellow")
    say(f"\n{content['verdict']}  {content['sentence']}", style)
    if job.report_file.exists():
        say(f"report: {job.report_file.resolve()}")


def _show_consistency(content: dict[str, Any]) -> None:
    """Each check: the trained candidate beside the best baseline."""
    found = content.get("consistency") or {}
    names = {row["name"]: row["title"] for row in content["candidates"]}
    rows = []
    for measure in found.get("measures", ()):
        for name, pair in measure["comparisons"].items():
            ours, theirs = measure["candidates"][name], measure["candidates"][found["against"]]
            title = measure["title"] + (" (fewer is better)" if measure["lower_is_better"] else "")
            shown = (score(ours["value"], None), score(theirs["value"], None))
            rows.append((title, names[name], *shown, f"p = {pair['p_adjusted']:.2g}", pair["verdict"]))
    if rows:
        table("consistency", ["check", "candidate", "value", f"best baseline ({found['against']})", "Holm", "verdict"], rows)


def show_check(numbers: dict[str, Any], sources: list[dict[str, Any]], warnings: list[str]) -> None:

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


def show_diff(found: dict[str, Any]) -> None:

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
