"""Two runs side by side: what differed, and what it did to the scores."""

from __future__ import annotations

import dataclasses
from typing import Any

from burnish.recipe import differences
from burnish.run import Run
from burnish.tasks import METRICS, compare


def diff_runs(a: Run, b: Run) -> dict[str, Any]:
    """Recipe keys, data, versions and scores that differ, as (a, b). Scores of the same candidate on the same test rows, judged by the same
    metric, are compared in pairs; where the rows or the metric differ, that is said instead of a number."""
    left, right = a.read_json(a.comparison_file), b.read_json(b.comparison_file)
    data_a, data_b = a.read_json(a.manifest_file), b.read_json(b.manifest_file)
    versions_a, versions_b = a.status().get("versions", {}), b.status().get("versions", {})
    return {
        "a": str(a.path),
        "b": str(b.path),
        "recipe": {k: list(v) for k, v in differences(a.recipe(), b.recipe()).items() if k != "name"},
        "data": {
            split: [_rows(part, split) for part in (data_a, data_b)]
            for split in {**data_a["splits"], **data_b["splits"]}
            if _rows(data_a, split) != _rows(data_b, split)
        },
        "versions": {
            k: [versions_a.get(k), versions_b.get(k)] for k in {**versions_a, **versions_b} if versions_a.get(k) != versions_b.get(k)
        },
        "metric": [left["metric"], right["metric"]],
        "verdicts": [left["verdict"], right["verdict"]],
        "scores": [_score_row(name, left, right) for name in _names(left, right)],
    }


def _rows(manifest: dict[str, Any], split: str) -> str:
    part = manifest["splits"].get(split)  # replayed rows may stand in one run only
    return f"{part['rows']} rows, {part['sha256'][:8]}" if part else "none"


def _names(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["name"] for content in (left, right) for row in content["candidates"]))


def _score_row(name: str, left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    scores = [next((row["score"] for row in content["candidates"] if row["name"] == name), None) for content in (left, right)]
    row: dict[str, Any] = {"candidate": name, "a": scores[0], "b": scores[1]}
    if left["metric"] != right["metric"]:
        return row | {"note": "not comparable: the metrics differ"}
    if left["metric"] in METRICS and METRICS[left["metric"]].corpus is not None:
        return row | {"note": "a number of the whole corpus: no interval of the difference between runs"}
    by_id = [{item["example"]: item["scores"] for item in content["rows_detail"] if name in item["scores"]} for content in (left, right)]
    shared = [example for example in by_id[0] if example in by_id[1]]
    if not shared or None in scores:
        return row | {"note": "no test rows in common" if None not in scores else "measured in one run only"}
    # An answer that could not be read counts as wrong, as in the table of candidates.
    values = [[float(side[example][name] or 0.0) for example in shared] for side in by_id]
    found = compare(values[1], values[0], binary=left["binary"], confidence=left["confidence"])
    row |= {"difference": dataclasses.asdict(found), "rows_in_common": len(shared)}
    if len(shared) < max(len(by_id[0]), len(by_id[1])):
        row["note"] = f"compared on the {len(shared)} test rows that both runs have"
    return row
