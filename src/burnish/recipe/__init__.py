"""Recipe: every knob once (knobs.py), with its default, unit and reason; read, overridden, explained and written here.

One YAML file; `model:` and `data:` suffice. Everything else has a default that is printed by `burnish recipe explain`. An unknown key
is an error that names the line and the nearest known key; the names that other trainers use are recognised and translated.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from burnish.errors import Problem, RecipeError
from burnish.recipe.checks import CHECK_NAMES, CheckSection, path_holders
from burnish.recipe.knobs import (
    MAX_LEAVES,
    Auto,
    DataSection,
    EndpointSection,
    EngineSection,
    EvaluationSection,
    GateSection,
    LoraSection,
    ModelSection,
    Recipe,
    RetainSection,
    StageSection,
    TaskSection,
    TrainingSection,
)
from burnish.recipe.names import PEERS_NAMES
from burnish.recipe.stages import stage_content, stage_recipes


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file; apply `key=value` overrides; resolve data paths against the file's folder.

    Raises RecipeError with file, line and the nearest known key for everything that is wrong, all at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. `burnish init DATA` writes one from a data file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {problem}") from problem
    content, lines = _parse_yaml(text, path)
    return build_recipe(content, overrides=overrides, origin=str(path), lines=lines, folder=path.resolve().parent)


def build_recipe(
    content: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    origin: str = "recipe",
    lines: Mapping[str, int] | None = None,
    folder: Path | None = None,
) -> Recipe:
    """Validate a mapping. Relative paths in it count from `folder` (none: the working directory), those in overrides from the working directory.

    The recipe holds absolute paths, so that a run finds its files from wherever it is taken up.
    """
    merged = json.loads(json.dumps(content, default=str))
    _anchor_paths(merged, folder or Path.cwd())
    for override in overrides:
        _apply_override(merged, override)
        _anchor_paths(merged, Path.cwd())
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as problem:
        raise RecipeError(f"{origin}: the recipe is not valid", _problems(problem, origin, lines or {})) from None
    if problems := _stage_problems(recipe, origin):
        raise RecipeError(f"{origin}: the recipe is not valid", problems)
    return recipe


def leaves(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every knob as (dotted key, FieldInfo), in the order of the recipe."""
    for key, info in model.model_fields.items():
        section = _section_of(info.annotation)
        if section is None:
            yield prefix + key, info
        else:
            yield from leaves(section, f"{prefix}{key}.")


def explain(key: str | None = None) -> list[dict[str, str]]:
    """Rows of key, type, default and reason; for one key, a section, or all. An unknown key raises RecipeError."""
    rows = [
        {"key": name, "type": _type_name(info), "default": _default_text(info), "meaning": str(info.description)}
        for name, info in leaves()
        if key is None or name == key or name.startswith(key + ".")
    ]
    if not rows:
        raise RecipeError(f"no such key: {key}{_did_you_mean(str(key))}")
    return rows


def schema() -> dict[str, Any]:
    """JSON Schema for editors; `model` and `data` may be given as a plain text."""
    result = Recipe.model_json_schema()
    for short in ("model", "data"):
        section = result["properties"][short]
        result["properties"][short] = {"anyOf": [{"type": "string"}, section], "description": section.get("description", "")}
    return result


def parse_value(text: str) -> Any:
    """A value as it would stand in a recipe: `1e-5` is a number, `[4, 8]` a list. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump_recipe(recipe: Recipe, *, short: bool = False) -> str:
    """The recipe as YAML; `short`: only what differs from the defaults."""
    content = recipe.model_dump(mode="json", exclude_defaults=True) if short else recipe.to_dict()
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as (a, b)."""
    left, right = dict(_flatten(a.to_dict())), dict(_flatten(b.to_dict()))
    return {key: (left.get(key), right.get(key)) for key in {**left, **right} if left.get(key) != right.get(key)}


# ------------------------------------------------------------------------------------------------------------------ inside


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _type_name(info: Any) -> str:
    """What may stand here, in words: from the JSON Schema of the field."""
    content = TypeAdapter(info.annotation).json_schema()
    return " or ".join(dict.fromkeys(_words_of(part) for part in content.get("anyOf", [content])))


def _words_of(part: Mapping[str, Any]) -> str:
    if "enum" in part or "const" in part:
        return " | ".join(map(str, part.get("enum", [part.get("const")])))
    if "$ref" in part:
        return "mapping"
    if part.get("type") == "array":
        return f"list of {_words_of(part['items'])}"
    return {"null": "none", "integer": "whole number", "string": "text", "boolean": "true | false"}.get(
        str(part.get("type")), str(part.get("type"))
    )


def _default_text(info: Any) -> str:
    if info.is_required():
        return "(required)"
    return "none" if info.default is None else json.dumps(info.default) if isinstance(info.default, list) else str(info.default)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; of a chain `stages` (the names in order), then stages.NAME.…"""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif key == "stages" and not prefix and value:
            yield key, [stage["name"] for stage in value]
            yield from _flatten({stage["name"]: stage for stage in value}, "stages.")
        else:
            yield prefix + key, value


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number (YAML 1.1 wants 1.0e-5) and refuses a key given twice."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[str, int] = {}
            problems: list[Problem] = []
            _note_lines(node, "", lines, problems, str(path))
            if problems:
                raise RecipeError(f"{path}: the recipe is not valid", problems)
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(problem, 'problem', problem)}") from problem
    if not isinstance(content, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping with at least `model:` and `data:`; found {type(content).__name__ if content else 'nothing'}"
        )
    return content, lines


def _note_lines(node: Any, prefix: str, lines: dict[str, int], problems: list[Problem], origin: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[f"{prefix}{index}"] = item.start_mark.line + 1
            _note_lines(item, f"{prefix}{index}.", lines, problems, origin)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            problems.append(Problem(f"{origin}:{key.start_mark.line + 1} {name}", f"given twice, first on line {lines[name]}", "keep one"))
        lines[name] = key.start_mark.line + 1
        _note_lines(value, f"{name}.", lines, problems, origin)


def _anchor_paths(content: dict[str, Any], folder: Path) -> None:
    for stage in content["stages"] if isinstance(content.get("stages"), list) else ():
        if isinstance(stage, dict):
            _anchor_paths(stage, folder)
    data, gate = content.get("data"), content.get("gate")
    holders: list[tuple[dict[str, Any], str]] = [(gate, "data")] if isinstance(gate, dict) else []
    if isinstance(data, dict):
        holders += [(data, key) for key in ("train", "validation", "test", "documents")]
    elif isinstance(data, str):
        holders.append((content, "data"))
    training = content.get("training")
    if isinstance(training, dict):
        holders.append((training, "replay_data"))
    evaluation = content.get("evaluation")
    checked = path_holders(evaluation.get("checks")) if isinstance(evaluation, dict) else []
    holders += checked
    retain = content.get("retain")
    if isinstance(retain, dict) and isinstance(retain.get("suites"), list):
        retain["suites"] = [_anchored_suite(name, folder) for name in retain["suites"]]
    task = content.get("task")
    if isinstance(task, dict) and ".py:" in str(task.get("metric")):
        holders.append((task, "metric"))
    if isinstance(content.get("model"), dict):
        holders += [(content["model"], "name"), (content["model"], "chat_template")]
    else:
        holders.append((content, "model"))
    for holder, key in holders:
        value = holder.get(key)
        if not isinstance(value, str) or value.startswith(("demo:", "hub:")) or Path(value).is_absolute():
            continue
        anchored = folder / value
        # Model and template names are only paths where such a path exists or is plainly meant.
        if (
            key in ("train", "validation", "test", "documents", "data", "metric", "replay_data")
            or (holder, key) in checked
            or value.startswith((".", "/"))
            or (anchored.exists() and "/" in value)
        ):
            holder[key] = str(Path(anchored).resolve()) if not value.startswith("~") else str(Path(value).expanduser())


def _anchored_suite(name: Any, folder: Path) -> Any:
    """A file or folder of suites as an absolute path; the names that are no paths as they are."""
    if not isinstance(name, str) or not name or name == "embedded" or name.startswith("lm-eval:"):
        return name
    return str((folder / Path(name).expanduser()).resolve())


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set training.learning_rate=2e-4")
    try:
        value = parse_value(text)
    except yaml.YAMLError as problem:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from problem
    *parents, last = key.strip().split(".")
    place = content
    for parent in parents:
        below = place.get(parent)
        if isinstance(below, str) and parent in ("model", "data"):
            below = {"name" if parent == "model" else "train": below}
        place[parent] = below if isinstance(below, dict) else {}
        place = place[parent]
    place[last] = value


def _did_you_mean(key: str) -> str:
    last = key.rsplit(".", 1)[-1]
    if last in PEERS_NAMES:
        return f"; here it is called `{PEERS_NAMES[last]}`"
    if key.startswith("evaluation.checks."):
        nearest = difflib.get_close_matches(last, CHECK_NAMES, 1, 0.6)
        return f"; did you mean `{nearest[0]}`?" if nearest else f"; the checks are {', '.join(CHECK_NAMES)}"
    known = [name for name, _ in leaves()]
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, 1, 0.75) or [by_last[n] for n in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
    return f"; did you mean `{near[0]}`?" if near else "; `burnish recipe explain` lists every key"


def _stage_problems(recipe: Recipe, origin: str) -> list[Problem]:
    """What is wrong with the recipes that the stages make, all at once."""
    problems: list[Problem] = []
    for stage in recipe.stages or ():
        try:
            Recipe.model_validate(stage_content(recipe, stage))
        except ValidationError as problem:
            problems += _problems(problem, f"{origin} stages.{stage.name}", {})
    return problems


def _problems(error: ValidationError, origin: str, lines: Mapping[str, int]) -> list[Problem]:
    problems = []
    for item in error.errors():
        # List positions, union branches and validator names are not keys of the file.
        parts = [
            str(part) for part in item["loc"] if isinstance(part, str) and not re.search(r"[\[(]|^(float|int|str|literal.*|list.*)$", part)
        ]
        key = ".".join(parts)
        # Lines are noted with list positions: evaluation.checks.0.regex.
        steps = [str(part) for part in item["loc"] if isinstance(part, int) or part in parts]
        at = next((lines[k] for n in range(len(steps), 0, -1) if (k := ".".join(steps[:n])) in lines), None)
        where = f"{origin}:{at} {key}".strip() if at else f"{origin} {key}".strip()
        if item["type"] == "extra_forbidden":
            problems.append(Problem(where, f"unknown key `{key}`", f"remove it or rename it{_did_you_mean(key)}"))
        elif item["type"] == "missing":
            short = {"model": "gemma-3-270m", "data": "rows.jsonl"}.get(key)
            problems.append(Problem(where, "missing", f"add `{key}:`" + (f", for example `{key}: {short}`" if short else "")))
        else:
            found = (
                f"{item['msg'].removeprefix('Value error, ')}; found {str(item.get('input'))[:80]!r}"
                if parts
                else item["msg"].removeprefix("Value error, ")
            )
            hint = next((str(info.description) for name, info in leaves() if name == key), "see `burnish recipe explain`")
            problems.append(Problem(where, found, hint))
    # A key that may be a number or a word is refused once by each branch: one line is enough.
    merged: dict[str, Problem] = {}
    for problem in problems:
        before = merged.get(problem.where)
        same = before is not None and before.do == problem.do and before.found != problem.found
        merged[problem.where] = (
            Problem(problem.where, f"{before.found.split('; found')[0]}, or: {problem.found}", problem.do) if same and before else problem
        )
    return list(merged.values())


__all__ = [
    "CHECK_NAMES", "MAX_LEAVES", "PEERS_NAMES", "Auto", "CheckSection", "DataSection", "EndpointSection", "EngineSection",
    "EvaluationSection", "GateSection", "LoraSection", "ModelSection", "Recipe", "RetainSection", "StageSection", "TaskSection",
    "TrainingSection", "build_recipe", "differences", "dump_recipe", "explain", "leaves", "load_recipe", "parse_value", "schema",
    "stage_recipes",
]  # fmt: skip
