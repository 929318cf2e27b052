"""A data file → a commented recipe that `burnish run` takes as it is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from burnish.data.formats import FORMATS, guess_columns, recognise, to_examples
from burnish.data.read import DOCUMENTS, read_documents, read_rows
from burnish.errors import DataError
from burnish.recipe import Recipe, build_recipe, explain

_SHOWN = (
    "training.epochs",
    "training.learning_rate",
    "training.micro_batch_size",
    "data.max_length",
    "lora.rank",
    "evaluation.shots",
    "task.metric",
)


def suggest_recipe(data: str, *, name: str, model: str) -> str:
    """YAML text. The format is recognised; for plain columns the two to use are guessed and marked as a guess. Raises DataError."""
    if _is_text(data):
        return _suggest_text(data, name=name, model=model)
    rows = read_rows(data)
    if not rows.rows:
        raise DataError(f"{data}: no row can be read", rows.problems)
    lines = [f"  train: {json.dumps(data)}"]
    section = build_recipe({"model": model, "data": data}).data
    try:
        form = recognise(rows.rows, section, data)
        about = f"{len(rows.rows)} rows in the form `{form}`"
    except DataError as problem:
        keys = Counter(key for row in rows.rows for key in row.content)
        guess = guess_columns(list(keys))
        if guess is None or sum(all(k in row.content for k in form.keys) for row in rows.rows for form in FORMATS.values() if form.keys):
            raise
        del problem
        form, about = "columns", f"{len(rows.rows)} rows with the columns {', '.join(keys)}"
        lines += [
            f"  prompt_column: {json.dumps(guess[0])}   # a guess: is this the question?",
            f"  completion_column: {json.dumps(guess[1])}   # and this the answer?",
        ]
        section = section.model_copy(update={"prompt_column": guess[0], "completion_column": guess[1]})
    examples, problems = to_examples(rows.rows, form, section)
    bad = len(rows.problems) + len(problems)
    if bad:
        about += f"; {bad} problems: `burnish check` names them"
    sample = examples[0] if examples else None
    header = [
        f"# {about}.",
        *([f"# First question: {_short(sample.question)}", f"# First answer:   {_short(sample.reference)}"] if sample else []),
        "# Two commands: `burnish check RECIPE` looks at the data, `burnish run RECIPE` does everything and writes the report.",
        "",
        f"name: {json.dumps(name[:100])}",
        f"model: {json.dumps(model)}",
        "data:",
        *lines,
        "",
        "# What you may want to change; `burnish recipe explain` lists every key.",
    ]
    for key in _SHOWN:
        row = explain(key)[0]
        header.append(f"# {key} = {row['default']}: {row['meaning']}")
    header += ["# For example:", "# training:", "#   epochs: 5"]
    text = "\n".join(header) + "\n"
    _prove(text)
    return text


def _is_text(data: str) -> bool:
    """A folder, a .md file, or a .txt file that is not JSON in disguise."""
    path = Path(data)
    if path.suffix.lower() == ".txt" and path.is_file():
        with path.open("rb") as file:
            return file.read(1 << 10).lstrip()[:1] not in (b"{", b"[")
    return path.is_dir() or (path.suffix.lower() in DOCUMENTS and path.is_file())


def _suggest_text(data: str, *, name: str, model: str) -> str:
    """A recipe for plain text: continued pre-training."""
    documents = read_documents(data)
    if not documents.rows:
        raise DataError(f"{data}: no document can be read", documents.problems)
    text = "\n".join(
        [
            f"# {len(documents.rows)} document{'s' * (len(documents.rows) != 1)} of plain text: the model goes on with its pre-training on {'it' if len(documents.rows) == 1 else 'them'}.",
            "# `burnish run RECIPE` does everything; the verdict is bits per byte of held-out documents, before and after.",
            "",
            f"name: {json.dumps(name[:100])}",
            f"model: {json.dumps(model)}",
            "data:",
            f"  train: {json.dumps(data)}",
            "training:",
            "  objective: text",
            "",
        ]
    )
    _prove(text)
    return text


def _prove(text: str) -> Recipe:
    import yaml

    return build_recipe(yaml.safe_load(text))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "·" for c in (line if len(line) <= 90 else line[:89] + "…"))


def recipe_name(path: Path) -> str:
    """A run's name from a file's name."""
    name = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in path.stem).strip("-._")
    return name[:100] if name[:1].isalnum() else "run"
