"""Files → Dataset. No torch.

in          the files a recipe names
out         Dataset: train, validation, test and a manifest with hashes and the reason of every row left out
invariant   no row is lost or changed without being counted; no prompt stands in two splits; adding rows never moves old ones
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.data import home_assistant
from burnish.data.check import Checked, FindControl, Tokenize, check_examples, statistics, token_lengths
from burnish.data.formats import make_example, recognise, to_examples
from burnish.data.read import parse_json, read_rows
from burnish.data.split import find_overlap, split_by_group, take
from burnish.errors import DataError, Problem
from burnish.recipe import DataSection, Recipe
from burnish.run import hash_file, hash_of
from burnish.types import Dataset, Example, Tell, silent

SPLITS = ("train", "validation", "test")
# Below these a run cannot learn, cannot choose, or cannot show anything.
LEAST_ROWS = {"train": 10, "validation": 4, "test": 8}
DEMO_ROWS = {"train": 3000, "validation": 150, "test": 400}


@dataclass(slots=True)
class Loaded:
    """Rows as read: by split where the recipe names a file for each, else all under `train`."""

    splits: dict[str, list[Example]]
    sources: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    attribution: str | None = None

    @property
    def rows(self) -> int:
        return sum(int(source["rows"]) for source in self.sources)


def load(recipe: Recipe) -> Loaded:
    """Read every file of the recipe. Raises DataError where a file gives no rows at all; bad rows become `problems`."""
    if recipe.data.train.startswith("demo:"):
        return _load_demo(recipe)
    loaded = Loaded({}, [])
    for split in SPLITS:
        name = getattr(recipe.data, split)
        if name is None:
            continue
        rows = read_rows(name)
        loaded.problems += rows.problems
        format_name = recognise(rows.rows, recipe.data, rows.path) if rows.rows else "none"
        examples, problems = to_examples(rows.rows, format_name, recipe.data) if rows.rows else ([], [])
        loaded.problems += problems
        loaded.splits[split] = examples
        digest = hash_file(Path(name)) if Path(name).is_file() else hash_of([e.id for e in examples])
        loaded.sources.append(
            {"path": rows.path, "split": split, "format": format_name, "rows": len(rows.rows) + len(rows.problems), "sha256": digest}
        )
    return loaded


def check(
    loaded: Loaded, recipe: Recipe, *, tokenize: Tokenize | None = None, find_control: FindControl | None = None, tell: Tell = silent
) -> dict[str, Checked]:
    """Check each split that was read. The problems of reading are not repeated here: see `Loaded.problems`."""
    return {
        split: check_examples(examples, recipe.data, tokenize=tokenize, find_control=find_control, tell=tell)
        for split, examples in loaded.splits.items()
    }


def prepare(loaded: Loaded, checked: Mapping[str, Checked], recipe: Recipe, *, apart: Dataset | None = None) -> Dataset:
    """De-duplicate, split, remove overlap, draw the rows asked for. Raises DataError with all problems, or when too few rows are left.

    `apart`: the rows of the run that this stage is part of; what overlaps with its test and validation rows is left out, too.
    """
    problems = loaded.problems + [problem for part in checked.values() for problem in part.problems]
    if problems:
        raise DataError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in the data; nothing was prepared", problems)
    data, seed = recipe.data, recipe.seed
    removed = [(example, reason) for part in checked.values() for example, reason in part.removed]
    splits = {split: part.examples for split, part in checked.items()}
    fractions = {name: getattr(data, f"{name}_fraction") for name in ("test", "validation") if name not in splits}
    if fractions:
        splits = {**splits, **split_by_group(splits["train"], fractions, seed)}
    # A row of a split that is read earlier in the story gives way: the test rows stay what they are when training rows are added.
    for split, against in (("validation", ("test",)), ("train", ("test", "validation"))):
        overlap = find_overlap(splits[split], [e for name in against for e in splits[name]], data.overlap_ngram)
        removed += [(e, f"overlap with {' or '.join(against)}: {overlap[e.id]}") for e in splits[split] if e.id in overlap]
        splits[split] = [e for e in splits[split] if e.id not in overlap]
        others = [e for name in against for e in getattr(apart, name)] if apart is not None else []
        overlap = find_overlap(splits[split], others, data.overlap_ngram)
        removed += [(e, f"overlap with the run's {' or '.join(against)} rows: {overlap[e.id]}") for e in splits[split] if e.id in overlap]
        splits[split] = [e for e in splits[split] if e.id not in overlap]
    available = {split: len(splits[split]) for split in SPLITS}
    drawn = {split: take(splits[split], getattr(data, f"{split}_rows"), seed) for split in SPLITS}
    _enough(drawn, data)
    lengths = {key: value for part in checked.values() for key, value in part.lengths.items()}
    manifest = {
        "sources": loaded.sources,
        "attribution": loaded.attribution,
        "splits": {
            split: {
                "rows": len(drawn[split]),
                "available": available[split],
                "groups": len({e.group for e in drawn[split]}),
                "sha256": hash_of([e.id for e in drawn[split]]),
            }
            for split in SPLITS
        },
        "removed_counts": dict(Counter(reason.split(":")[0] for _, reason in removed)),
        "removed": [{"source": example.source, "reason": reason} for example, reason in removed[:1000]],
        "duplicate_fraction": round(sum(reason == "duplicate" for _, reason in removed) / max(1, loaded.rows), 6),
        "token_lengths": {split: token_lengths(drawn[split], lengths) for split in SPLITS},
        "warnings": [str(problem) for part in checked.values() for problem in part.warnings][:200],
    }
    return Dataset(tuple(drawn["train"]), tuple(drawn["validation"]), tuple(drawn["test"]), manifest)


def example_to_row(example: Example) -> dict[str, Any]:
    """The row as it is kept in a run: OpenAI's chat format with our keys beside it."""
    row = {"messages": list(example.messages), "id": example.id, "group": example.group, "source": example.source}
    return row | ({"metadata": example.metadata} if example.metadata else {})


def row_to_example(row: Mapping[str, Any]) -> Example:
    return Example(row["id"], tuple(row["messages"]), row["group"], row["source"], row.get("metadata", {}))


def read_split(path: Path) -> list[Example]:
    """A split as `prepare` wrote it."""
    if not path.exists():
        raise DataError(f"{path} is not there yet: run `burnish prepare` first")
    return [row_to_example(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _load_demo(recipe: Recipe) -> Loaded:
    name, _, language = recipe.data.train.removeprefix("demo:").partition("/")
    if name != "home-assistant":
        raise DataError(
            f"{recipe.data.train}: no such embedded data; there is `demo:home-assistant/LANGUAGE`, for example demo:home-assistant/en"
        )
    counts = {split: max(DEMO_ROWS[split], getattr(recipe.data, f"{split}_rows") or 0) for split in SPLITS}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    rows = home_assistant.sample(language=language or "en", seed=recipe.seed, **counts)
    for number, row in enumerate(rows, 1):
        source = f"{recipe.data.train}:{number}"
        splits[row["split"]].append(make_example(row["messages"], source=source, group=row["group"], metadata=row["metadata"]))
    digest = hash_of([[e.id for e in part] for part in splits.values()])
    sources = [
        {"path": recipe.data.train, "split": split, "format": "chat", "rows": len(part), "sha256": digest} for split, part in splits.items()
    ]
    return Loaded(splits, sources, attribution=home_assistant.ATTRIBUTION)


def _enough(splits: Mapping[str, Sequence[Example]], data: DataSection) -> None:
    short = {split: len(splits[split]) for split in SPLITS if len(splits[split]) < LEAST_ROWS[split]}
    if not short:
        return
    total = sum(len(part) for part in splits.values())
    problems = []
    for split, count in short.items():
        limit = getattr(data, f"{split}_rows")
        if limit is not None and limit < LEAST_ROWS[split]:
            do = f"raise data.{split}_rows to {LEAST_ROWS[split]} or more"
        elif split != "train" and getattr(data, split) is None and total >= 2 * sum(LEAST_ROWS.values()):
            now = getattr(data, f"{split}_fraction")
            wanted = min(0.4, round(max(now * 1.5 * LEAST_ROWS[split] / max(1, count), now + 0.05), 2))
            do = f"set data.{split}_fraction: {wanted}"
        else:
            do = "collect more rows"
        problems.append(
            Problem(f"data.{split}", f"{count} rows after cleaning and splitting", f"at least {LEAST_ROWS[split]} are needed: {do}")
        )
    raise DataError(f"too few rows: {total} in all. With so few, nothing that is measured would mean anything", problems)


__all__ = [
    "SPLITS", "Checked", "Loaded", "check", "example_to_row", "load", "make_example", "parse_json", "prepare", "read_split", "row_to_example", "statistics", "take",
]  # fmt: skip
