"""Files → Dataset. No torch.

in          the files a recipe names
out         Dataset: train, validation, test and a manifest with hashes and the reason of every row left out
invariant   no row is lost or changed without being counted; no prompt stands in two splits; adding rows never moves old ones
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.data import home_assistant
from burnish.data.check import Checked, FindControl, Tokenize, check_examples, statistics, token_lengths
from burnish.data.formats import FORMATS, make_example, recognise, to_examples
from burnish.data.passages import Passage, read_passages
from burnish.data.read import DOCUMENTS, parse_json, read_documents, read_rows
from burnish.data.rows import Rows
from burnish.data.split import find_overlap, split_by_group, take
from burnish.errors import DataError, Problem
from burnish.recipe import DataSection, Recipe
from burnish.run import hash_file, hash_of
from burnish.types import Dataset, Example, Tell, silent

SPLITS = ("train", "validation", "test")
REPLAY = "replay"  # a fourth file beside the splits: general rows, mixed into training only
# Below these a run cannot learn, cannot choose, or cannot show anything.
LEAST_ROWS = {"train": 10, "validation": 4, "test": 8}
DEMO_ROWS = {"train": 3000, "validation": 150, "test": 400}


@dataclass(slots=True)
class Loaded:
    """Rows as read: by split where the recipe names a file for each, else all under `train`."""

    splits: dict[str, list[Example]]  # and REPLAY, where the recipe names such rows
    sources: list[dict[str, Any]]
    problems: list[Problem] = field(default_factory=list)
    attribution: str | None = None

    @property
    def rows(self) -> int:
        return sum(int(source["rows"]) for source in self.sources)


def load(recipe: Recipe) -> Loaded:
    """Read every file of the recipe. Raises DataError where a file gives no rows at all; bad rows become `problems`."""
    if recipe.data.train.startswith("demo:"):
        loaded = _load_demo(recipe.data, recipe.seed)
    else:
        loaded = Loaded({}, [])
        for split in SPLITS:
            if getattr(recipe.data, split) is not None:
                _read_split(loaded, split, recipe.data, getattr(recipe.data, split), plain=recipe.training.objective == "text")
    if recipe.training.replay_data is not None:
        _load_replay(loaded, recipe)
    return loaded


def check(
    loaded: Loaded, recipe: Recipe, *, tokenize: Tokenize | None = None, find_control: FindControl | None = None, tell: Tell = silent
) -> dict[str, Checked]:
    """Check each split that was read. The problems of reading are not repeated here: see `Loaded.problems`."""
    checked = {
        split: check_examples(examples, recipe.data, tokenize=tokenize, find_control=find_control, tell=tell)
        for split, examples in loaded.splits.items()
    }
    for source in loaded.sources:
        _check_pairs(checked[source["split"]], source, recipe.training.objective)
    return checked


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
    replay = splits.pop(REPLAY, None)
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
    if replay is not None:
        replay, gave_way = _replay_apart(replay, drawn, data.overlap_ngram)
        removed += gave_way
        drawn[REPLAY], available[REPLAY] = replay, len(replay)
    lengths = {key: value for part in checked.values() for key, value in part.lengths.items()}
    manifest: dict[str, Any] = {
        "sources": loaded.sources,
        "attribution": loaded.attribution,
        "splits": {
            split: {
                "rows": len(drawn[split]),
                "available": available[split],
                "groups": len({e.group for e in drawn[split]}),
                "sha256": hash_of([e.id for e in drawn[split]]),
            }
            for split in drawn
        },
        "removed_counts": dict(Counter(reason.split(":")[0] for _, reason in removed)),
        "removed": [{"source": example.source, "reason": reason} for example, reason in removed[:1000]],
        "duplicate_fraction": round(sum(reason == "duplicate" for _, reason in removed) / max(1, loaded.rows), 6),
        "token_lengths": {split: token_lengths(drawn[split], lengths) for split in drawn},
        "warnings": [str(problem) for part in checked.values() for problem in part.warnings][:200],
    }
    return Dataset(tuple(drawn["train"]), tuple(drawn["validation"]), tuple(drawn["test"]), manifest, tuple(drawn.get(REPLAY, ())))


def example_to_row(example: Example) -> dict[str, Any]:
    """The row as it is kept in a run: OpenAI's chat format with our keys beside it."""
    row: dict[str, Any] = {"messages": list(example.messages), "id": example.id, "group": example.group, "source": example.source}
    row |= {"metadata": example.metadata} if example.metadata else {}
    return row | ({} if example.rejected is None else {"rejected": example.rejected})


def row_to_example(row: Mapping[str, Any]) -> Example:
    return Example(row["id"], tuple(row["messages"]), row["group"], row["source"], row.get("metadata", {}), row.get("rejected"))


def read_split(path: Path) -> Rows:
    """A split as `prepare` wrote it; a row is read when it is asked for."""
    if not path.exists():
        raise DataError(f"{path} is not there yet: run `burnish prepare` first")
    return Rows(path, row_to_example)


def _read_split(loaded: Loaded, split: str, data: DataSection, name: str, *, plain: bool = False) -> None:
    """`plain`: documents, not questions and answers."""
    rows = read_documents(name) if plain else read_rows(name)
    loaded.problems += rows.problems
    format_name = "none" if not rows.rows else "text" if plain else recognise(rows.rows, data, rows.path)
    examples, problems = to_examples(rows.rows, format_name, data) if rows.rows else ([], [])
    loaded.problems += problems
    loaded.splits[split] = examples
    digest = hash_file(Path(name)) if Path(name).is_file() else hash_of([e.id for e in examples])
    loaded.sources.append(
        {"path": rows.path, "split": split, "format": format_name, "rows": len(rows.rows) + len(rows.problems), "sha256": digest}
    )


def _load_replay(loaded: Loaded, recipe: Recipe) -> None:
    """General rows have a form of their own: what the recipe says of the columns and the system prompt is about its own rows."""
    name = str(recipe.training.replay_data)
    data = DataSection.model_validate({"train": name})
    if name.startswith("demo:"):
        embedded = _load_demo(data, recipe.seed)
        loaded.splits[REPLAY] = embedded.splits["train"]
        loaded.sources += [{**source, "split": REPLAY} for source in embedded.sources if source["split"] == "train"]
        loaded.attribution = embedded.attribution
        return
    _read_split(loaded, REPLAY, data, name, plain=recipe.training.objective == "text" and _is_plain(name))


def _is_plain(name: str) -> bool:
    """Whether general rows beside plain text are plain text too; they may as well be questions and answers."""
    path = Path(name)
    if path.is_dir() or path.suffix.lower() in DOCUMENTS:
        return True
    return all("text" in row.content for row in read_rows(name).rows[:20])


def _check_pairs(checked: Checked, source: dict[str, Any], objective: str) -> None:
    """Rejected answers where the objective needs them; a word where it does not use them. Test rows need only a reference."""
    pairs = sum(example.rejected is not None for example in checked.examples)
    if objective == "preference" and source["split"] in ("train", "validation") and checked.examples and not pairs:
        found = f"training.objective is preference, but no row has a rejected answer (read as `{source['format']}`)"
        do = f"write rows like {FORMATS['preference'].example}, or set training.objective: supervised"
        checked.problems.append(Problem(str(source["path"]), found, do))
    elif objective != "preference" and pairs:
        found = f"{pairs} rows have a rejected answer, which training.objective {objective} does not use"
        do = "nothing: the chosen answers are trained. Set training.objective: preference to train on both"
        checked.warnings.insert(0, Problem(str(source["path"]), found, do))


def _replay_apart(
    replay: Sequence[Example], drawn: Mapping[str, Sequence[Example]], ngram: int
) -> tuple[list[Example], list[tuple[Example, str]]]:
    """Replayed rows give way to validation and test rows like training rows, and to training rows that are the same."""
    known = {example.id for example in drawn["train"]}
    # Without system prompts: the task's rows may have got one from the recipe, and general rows have their own or none.
    asked, held_out = ([_without_system(e) for e in part] for part in (replay, [*drawn["test"], *drawn["validation"]]))
    overlap = find_overlap(asked, held_out, ngram)
    removed = [(e, f"replay overlap with test or validation: {overlap[e.id]}") for e in replay if e.id in overlap]
    removed += [(e, "replay row that is a training row") for e in replay if e.id in known and e.id not in overlap]
    gone = {example.id for example, _ in removed}
    if not (kept := [example for example in replay if example.id not in gone]):
        raise DataError(
            f"training.replay_data: none of its {len(replay)} usable rows is left: all are training, validation or test rows. "
            "Name general rows that are not the task's own"
        )
    return kept, removed


def _without_system(example: Example) -> Example:
    return dataclasses.replace(example, messages=tuple(m for m in example.messages if m["role"] != "system"))


def _load_demo(data: DataSection, seed: int) -> Loaded:
    name, _, language = data.train.removeprefix("demo:").partition("/")
    if name != "home-assistant":
        raise DataError(f"{data.train}: no such embedded data; there is `demo:home-assistant/LANGUAGE`, for example demo:home-assistant/en")
    counts = {split: max(DEMO_ROWS[split], getattr(data, f"{split}_rows") or 0) for split in SPLITS}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    rows = home_assistant.sample(language=language or "en", seed=seed, **counts)
    for number, row in enumerate(rows, 1):
        source = f"{data.train}:{number}"
        splits[row["split"]].append(make_example(row["messages"], source=source, group=row["group"], metadata=row["metadata"]))
    digest = hash_of([[e.id for e in part] for part in splits.values()])
    sources = [
        {"path": data.train, "split": split, "format": "chat", "rows": len(part), "sha256": digest} for split, part in splits.items()
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
            text = any(example.metadata.get("kind") == "text" for part in splits.values() for example in part)
            do = (
                "collect more documents, or cut long ones into several (a file each, or rows with a `text`)"
                if text
                else "collect more rows"
            )
        problems.append(
            Problem(f"data.{split}", f"{count} rows after cleaning and splitting", f"at least {LEAST_ROWS[split]} are needed: {do}")
        )
    raise DataError(f"too few rows: {total} in all. With so few, nothing that is measured would mean anything", problems)


__all__ = [
    "REPLAY", "SPLITS", "Checked", "Loaded", "Passage", "check", "example_to_row", "load", "make_example", "parse_json", "prepare", "read_passages", "read_split", "row_to_example", "statistics", "take",
]  # fmt: skip
