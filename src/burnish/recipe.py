"""Recipe: every knob once, with its default, unit and reason.

One YAML file; `model:` and `data:` suffice. Everything else has a default that is printed by `burnish recipe explain`. An unknown key
is an error that names the line and the nearest known key; the names that other trainers use are recognised and translated.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from burnish.errors import Problem, RecipeError

Auto = Literal["auto"]
MAX_LEAVES = 70


def _from_scalar(key: str) -> BeforeValidator:
    """`model: NAME` and `data: FILE` are short for `model: {name: NAME}` and `data: {train: FILE}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSection(_Section):
    name: str = Field(min_length=1, description="embedded name (`gemma-3-270m`), local folder, or Hugging Face id (extra `hub`)")
    chat_template: str = Field(
        "auto",
        description="`auto`: the tokenizer's own, else `plain`; or a shipped name (`plain`, `chatml`), or a .jinja file. It travels with the adapter",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="compute type of the base weights; `auto`: bfloat16 where this machine multiplies it fast, else float32"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$", description="`auto`: cuda if there is one, else cpu")


class DataSection(_Section):
    train: str = Field(
        min_length=1, description="rows to learn from: .jsonl, .csv, .parquet (extra), hub:ID (extra), or `demo:home-assistant/en`"
    )
    validation: str | None = Field(None, description="rows to choose on (prompt form, shots, checkpoint); none: split off `train`")
    test: str | None = Field(None, description="rows for the verdict, read at the end; none: split off `train`")
    format: Literal["auto", "chat", "completion", "alpaca", "sharegpt", "columns"] = Field(
        "auto", description="`auto`: recognised from the rows; none or two fitting is an error"
    )
    prompt_column: str | None = Field(None, description="for plain columns and CSV: the column of the question")
    completion_column: str | None = Field(None, description="for plain columns and CSV: the column of the answer")
    context_column: str | None = Field(None, description="a column put before the question (a schema, an article)")
    group_column: str | None = Field(
        None, description="rows of one group (user, source, template) never part at a split; none: each row alone"
    )
    system: str | None = Field(None, description="a system prompt put before every row that has none")
    train_rows: int | None = Field(None, ge=1, description="at most so many training rows, drawn by hash; none: all")
    validation_rows: int | None = Field(None, ge=1, description="at most so many validation rows; none: all")
    test_rows: int | None = Field(None, ge=1, description="at most so many test rows; none: all")
    validation_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of groups split off for validation when no file is given")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of groups split off for test when no file is given")
    max_length: int = Field(1024, ge=16, le=131072, description="tokens; a longer row is treated by `over_length`, never cut silently")
    over_length: Literal["error", "drop", "truncate-prompt"] = Field(
        "error",
        description="`error`: name the rows · `drop`: leave out, counted · `truncate-prompt`: cut the start of the longest user text",
    )
    overlap_ngram: int = Field(
        13,
        ge=0,
        description="words; training rows that share such a run with validation or test are removed and counted (GPT-3 paper, app. C); 0: exact only",
    )


class TaskSection(_Section):
    metric: str = Field("auto", description="`auto`: chosen from the training answers; a name of METRICS, or your own `file.py:function`")
    instruction: str | None = Field(None, description="what an untrained model is told; none: written from the training rows")


class LoraSection(_Section):
    rank: int = Field(16, ge=1, le=1024, description="r of LoRA (arXiv 2106.09685)")
    alpha: float = Field(32.0, gt=0, description="scale = alpha ÷ rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input; 0: short runs on little data are steadier without")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="PEFT's rule: `all-linear` (all but the head), or module names; all layers beat attention alone (QLoRA, arXiv 2305.14314)",
    )


class TrainingSection(_Section):
    method: Literal["lora"] = Field("lora", description="what is trained: a row of METHODS")
    learning_rate: Annotated[float, Field(gt=0, le=10)] | Auto = Field(
        "auto", description="peak; `auto`: the method's default, written into the run"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after warm-up, down to a tenth of the peak (cosine), to 0 (linear), or flat"
    )
    warmup_fraction: float = Field(0.05, ge=0, le=0.5, description="share of the steps in which the rate rises from 0")
    epochs: float = Field(3.0, gt=0, le=100, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer updates at most; none: what `epochs` gives")
    micro_batch_size: int = Field(8, ge=1, le=4096, description="examples computed at once")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="micro-batches per step; 1×8 equals 8×1 up to rounding")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="AdamW's decoupled decay, on the trained weights")
    max_gradient_norm: float = Field(1.0, gt=0, description="clip the gradient's norm here")
    validations_per_epoch: int = Field(
        2, ge=1, le=100, description="how often the validation loss is measured; the best checkpoint is kept"
    )
    early_stopping_patience: int = Field(4, ge=0, description="stop after so many validations without a better loss; 0: never")


class EvaluationSection(_Section):
    candidates: list[Literal["base", "few_shot", "few_shot_retrieved", "tuned"]] = Field(
        ["base", "few_shot", "few_shot_retrieved", "tuned"], min_length=1, description="what is measured on the same test rows"
    )
    shots: list[Annotated[int, Field(ge=1, le=64)]] = Field(
        [4, 16], min_length=1, description="numbers of examples tried on validation rows; the best is kept"
    )
    prompt_forms: list[Literal["as_is", "instructed"]] = Field(
        ["as_is", "instructed"], min_length=1, description="ways to ask an untrained model, tried on validation rows; the best is kept"
    )
    selection_rows: int = Field(24, ge=4, description="validation rows on which form and shots are chosen")
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] | Auto = Field(
        "auto", description="tokens; `auto`: 1.25 × the longest training answer + 8"
    )
    batch_size: int = Field(32, ge=1, le=1024, description="requests generated at once")
    confidence: float = Field(
        0.95, gt=0.5, lt=1, description="of every interval; 1 − this is the verdict's error rate over all comparisons"
    )
    resamples: int = Field(10_000, ge=200, le=1_000_000, description="of the paired bootstrap and the sign-flip test")


class Recipe(_Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="the run's folder is ./runs/NAME")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the split, the order, the adapter's start and the resampling")
    model: Annotated[ModelSection, _from_scalar("name")] = Field(description="the base model")
    data: Annotated[DataSection, _from_scalar("train")] = Field(description="the rows")
    task: TaskSection = Field(default_factory=TaskSection, description="what good means")  # type: ignore[arg-type]
    lora: LoraSection = Field(default_factory=LoraSection, description="the adapter's size")  # type: ignore[arg-type]
    training: TrainingSection = Field(default_factory=TrainingSection, description="the loop")  # type: ignore[arg-type]
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="the proof")  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        data = self.data
        if (data.prompt_column is None) != (data.completion_column is None):
            raise ValueError("data.prompt_column and data.completion_column go together: name both or neither")
        if data.format == "columns" and data.prompt_column is None:
            raise ValueError("data.format: columns needs data.prompt_column and data.completion_column")
        if data.train.startswith("demo:"):
            given = [
                k
                for k in ("validation", "test", "prompt_column", "completion_column", "context_column", "group_column", "system")
                if getattr(data, k)
            ]
            if given or data.format != "auto":
                raise ValueError(
                    f"data.{(given or ['format'])[0]} does not go with the embedded data {data.train}, which brings its own splits: leave it out"
                )
        if data.validation is None and data.test is None and data.validation_fraction + data.test_fraction >= 0.9:
            raise ValueError("data.validation_fraction + data.test_fraction leave too little to train on")
        return self

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


# What the same knob is called elsewhere (Axolotl, LLaMA-Factory, TRL, Unsloth, mlx-lm, OpenAI) → ours.
PEERS_NAMES: dict[str, str] = {
    "base_model": "model.name",
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "template": "model.chat_template",
    "dataset": "data.train",
    "datasets": "data.train",
    "training_file": "data.train",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "eval_dataset": "data.validation",
    "val_set_size": "data.validation_fraction",
    "val_size": "data.validation_fraction",
    "test_size": "data.test_fraction",
    "max_samples": "data.train_rows",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "system_prompt": "data.system",
    "adapter": "training.method",
    "finetuning_type": "training.method",
    "num_epochs": "training.epochs",
    "n_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "epoch": "training.epochs",
    "iters": "training.max_steps",
    "lr": "training.learning_rate",
    "learning_rate_multiplier": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_fraction",
    "batch_size": "training.micro_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "max_grad_norm": "training.max_gradient_norm",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules",
    "metrics": "task.metric",
    "max_tokens": "evaluation.max_new_tokens",
}


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
        return Recipe.model_validate(merged)
    except ValidationError as problem:
        raise RecipeError(f"{origin}: the recipe is not valid", _problems(problem, origin, lines or {})) from None


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


def dump_recipe(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120)


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
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
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
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            problems.append(Problem(f"{origin}:{key.start_mark.line + 1} {name}", f"given twice, first on line {lines[name]}", "keep one"))
        lines[name] = key.start_mark.line + 1
        _note_lines(value, f"{name}.", lines, problems, origin)


def _anchor_paths(content: dict[str, Any], folder: Path) -> None:
    data = content.get("data")
    holders: list[tuple[dict[str, Any], str]] = []
    if isinstance(data, dict):
        holders += [(data, key) for key in ("train", "validation", "test")]
    elif isinstance(data, str):
        holders.append((content, "data"))
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
        if key in ("train", "validation", "test", "data", "metric") or value.startswith((".", "/")) or (anchored.exists() and "/" in value):
            holder[key] = str(Path(anchored).resolve()) if not value.startswith("~") else str(Path(value).expanduser())


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, for example --set training.learning_rate=2e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
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
    known = [name for name, _ in leaves()]
    by_last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, 1, 0.75) or [by_last[n] for n in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
    return f"; did you mean `{near[0]}`?" if near else "; `burnish recipe explain` lists every key"


def _problems(error: ValidationError, origin: str, lines: Mapping[str, int]) -> list[Problem]:
    problems = []
    for item in error.errors():
        # List positions, union branches and validator names are not keys of the file.
        parts = [
            str(part) for part in item["loc"] if isinstance(part, str) and not re.search(r"[\[(]|^(float|int|str|literal.*|list.*)$", part)
        ]
        key = ".".join(parts)
        at = next((lines[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in lines), None)
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
