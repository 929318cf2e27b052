"""Outcomes → medians, ratios within a round, the RESULT line, a JSON file and a table in Markdown."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from speed.contestants import BURNISH, CONTESTANTS, REFERENCE
from speed.launch import Outcome

LOSS_STEPS = 20  # of the loss curve that must agree with the reference's
UNITS = {"plain": "tokens", "prefix": "examples"}  # what is counted per second where contestants are compared

Runs = Mapping[tuple[str, str, int], Outcome]  # (case, contestant, round)


def measured(outcome: Outcome | None) -> bool:
    """Whether it has a speed: the first step warms up, so at least two are needed. A run that was cut off late keeps the steps it did."""
    return outcome is not None and len(outcome.steps) >= 2


def rate(outcome: Outcome, unit: str, steps: int | None = None) -> float:
    """`unit` per second over steps 2 … `steps` (all, if none)."""
    counted = outcome.steps[1:steps]
    return sum(step[unit] for step in counted) / sum(step["seconds"] for step in counted)


def ratio(burnish: Outcome, other: Outcome, unit: str) -> float:
    """How many times faster Burnish was, on the same steps where both ran the same batches."""
    steps = min(len(burnish.steps), len(other.steps)) if CONTESTANTS[other.contestant].same_batches else None
    return rate(burnish, unit, steps) / rate(other, unit, steps)


def loss_differences(outcome: Outcome, reference: Outcome) -> list[float]:
    """|loss − reference| ÷ reference for each step that both have, LOSS_STEPS at most."""
    pairs = list(zip(outcome.steps, reference.steps, strict=False))[:LOSS_STEPS]
    return [abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for ours, theirs in pairs]


def summarise_case(case: str, runs: Runs, names: Sequence[str], held_out: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """One row for each contestant of a case."""
    rows: dict[str, dict[str, Any]] = {}
    reference = runs.get((case, REFERENCE, 1))
    for name in names:
        mine = [outcome for (c, n, _), outcome in sorted(runs.items()) if (c, n) == (case, name)]
        good = [outcome for outcome in mine if measured(outcome)]
        row: dict[str, Any] = {"title": CONTESTANTS[name].title, "problem": next((o.problem for o in mine if o.problem), None)}
        if good:
            row |= {
                "tokens_per_second": round(median(rate(o, "tokens") for o in good), 2),
                "examples_per_second": round(median(rate(o, "examples") for o in good), 4),
                "median_step_tokens_per_second": round(median(s["tokens"] / s["seconds"] for o in good for s in o.steps[1:]), 2),
                "peak_memory_gb": round(max(o.peak_bytes for o in good) / 1e9, 2),
                "first_step_begins_seconds": _median(o.first_step_begins for o in good),
                "first_step_done_seconds": _median(o.first_step_done for o in good),
                "others_share": max(o.others_share or 0.0 for o in good),
                "steps": [len(o.steps) for o in good],
                "held_out_loss": held_out.get(name),
                "losses": [round(step["loss"], 5) for step in good[0].steps],
                "versions": good[0].versions,
                "command": good[0].command,
            }
            row["burnish_is_faster"] = _median(_ratios(case, name, runs), digits=3)
            if reference is not None and CONTESTANTS[name].same_batches and name != REFERENCE:
                row["max_loss_difference"] = round(max(loss_differences(good[0], reference), default=0.0), 6)
        rows[name] = row
    return rows


def result_line(cases: Mapping[str, Mapping[str, Mapping[str, Any]]], runs: Runs) -> dict[str, Any]:
    """The keys that the issue asks for, ratios within rounds; then the names of those compared with, and more."""
    plain, prefix = cases.get("plain", {}), cases.get("prefix", {})
    peer_plain, peer_prefix = fastest(plain, "plain"), fastest(prefix, "prefix")
    trl = fastest(plain, "plain", only="trl")
    burnish = plain.get(BURNISH, {})
    result = {
        "burnish_tokens_per_second": burnish.get("tokens_per_second"),
        "ratio_trl_plain": plain.get(trl or "", {}).get("burnish_is_faster"),
        "ratio_fastest_peer_plain": plain.get(peer_plain or "", {}).get("burnish_is_faster"),
        "ratio_fastest_peer_prefix": prefix.get(peer_prefix or "", {}).get("burnish_is_faster"),
        "peak_memory_gb": max((rows[BURNISH].get("peak_memory_gb", 0) for rows in cases.values() if BURNISH in rows), default=None),
        "startup_seconds": burnish.get("first_step_done_seconds"),
        "max_loss_difference": max_loss_difference(cases, runs),
    }
    product = fastest(plain, "plain", only="product")
    more = {
        "trl": trl,
        "fastest_peer_plain": peer_plain,
        "fastest_peer_prefix": peer_prefix,
        "ratio_fastest_product_plain": plain.get(product or "", {}).get("burnish_is_faster"),
        "ratio_plain_fp32": plain.get("plain-all-fp32", {}).get("burnish_is_faster"),
        "prefix_examples_per_second": prefix.get(BURNISH, {}).get("examples_per_second"),
        "prefix_startup_seconds": prefix.get(BURNISH, {}).get("first_step_done_seconds"),
        "others_share": max((row.get("others_share", 0.0) for rows in cases.values() for row in rows.values()), default=None),
        "problems": [f"{case} {name}: {row['problem']}" for case, rows in cases.items() for name, row in rows.items() if row["problem"]],
        "reference_against_full_logits": plain.get("plain-all-fp32", {}).get("max_loss_difference"),
    }
    return result | more


def fastest(rows: Mapping[str, Mapping[str, Any]], case: str, only: str | None = None) -> str | None:
    """The peer against which Burnish does worst: all, TRL's settings, or products (not our own plain loop)."""
    peers = [name for name in rows if name != BURNISH and rows[name].get("burnish_is_faster")]
    if only == "product":
        peers = [name for name in peers if CONTESTANTS[name].product]
    elif only is not None:
        peers = [name for name in peers if CONTESTANTS[name].environment == only]
    return min(peers, key=lambda name: rows[name]["burnish_is_faster"], default=None)


def max_loss_difference(cases: Mapping[str, Mapping[str, Mapping[str, Any]]], runs: Runs) -> float | None:
    """The largest relative difference to the reference: the first 20 steps of both cases, and the held-out loss after the same number of steps."""
    found: list[float] = []
    for case, rows in cases.items():
        ours, theirs = runs.get((case, BURNISH, 1)), runs.get((case, REFERENCE, 1))
        if ours is None or theirs is None:
            continue
        found += loss_differences(ours, theirs)
        losses = [rows[name].get("held_out_loss") for name in (BURNISH, REFERENCE) if name in rows]
        if len(losses) == 2 and all(losses) and len(ours.steps) == len(theirs.steps):
            found.append(abs(losses[0] - losses[1]) / losses[1])
    return round(max(found), 6) if found else None


def markdown(document: Mapping[str, Any]) -> str:
    """The tables for people."""
    machine = document["machine"]
    lines = [
        "# Training speed, side by side", "",
        f"`{document['command']}` on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; fast types: {machine['types']}. {document['when']}", "",
        "Steps after the first; medians over rounds; the last column is Burnish's speed over this row's, within a round, on the same steps.", "",
    ]  # fmt: skip
    for case, rows in document["cases"].items():
        lines += [f"## {case}", "", "| | tok/s | examples/s | peak GB | first step done, s | loss off by | held-out loss | Burnish is |",
                  "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        for row in rows.values():
            cells = [
                row.get("tokens_per_second"),
                row.get("examples_per_second"),
                row.get("peak_memory_gb"),
                row.get("first_step_done_seconds"),
            ]
            off = row.get("max_loss_difference")
            cells += [None if off is None else f"{off:.2%}", row.get("held_out_loss") and f"{row['held_out_loss']:.4f}"]
            times = row.get("burnish_is_faster")
            cells.append(f"{times:.2f} ×" if times else row["problem"])
            lines.append("| " + " | ".join([row["title"], *("–" if cell is None else str(cell) for cell in cells)]) + " |")
        lines.append("")
    absent = [f"- {name}: {why}" for name, why in document["absent"].items()]
    return "\n".join([*lines, *(["Not here:", "", *absent, ""] if absent else []), "```", f"RESULT {document['result_json']}", "```", ""])


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = set(re.findall(r"\b(avx2|avx512f|avx512_vnni|avx512_bf16|amx_bf16|amx_int8)\b", text))
    return {
        "cpu": found.group(1) if found else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "types": ", ".join(sorted(flags)) or "none known",
        "system": f"{platform.system()} {platform.release()}",
    }


def _ratios(case: str, name: str, runs: Runs) -> Iterable[float]:
    for (c, n, number), outcome in runs.items():
        burnish = runs.get((case, BURNISH, number))
        if (c, n) == (case, name) and measured(outcome) and burnish is not None and measured(burnish):
            yield ratio(burnish, outcome, UNITS[case])


def _median(values: Iterable[float | None], digits: int = 2) -> float | None:
    kept = [value for value in values if value is not None]
    return round(median(kept), digits) if kept else None
