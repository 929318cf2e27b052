"""The model card: README.md of the model in Hugging Face's form, with the numbers of report.json.

Its head is YAML made from values by a YAML writer; its body is Markdown in which every text from outside (names of files and data sets, an
attribution, a metric of one's own) is escaped. No row of the data is shown, and no path: a card is made to be published, rows and folders are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from burnish.recipe import Recipe, dump_recipe
from burnish.report.texts import encodable, interval, is_number, number, score, signed, visible, whole_percent
from burnish.run import Run

# Of Hugging Face's list of licence ids; any other text goes under license_name.
_LICENCES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc",
        "cc0-1.0",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-4.0",
        "gpl-3.0",
        "agpl-3.0",
        "lgpl-3.0",
        "mpl-2.0",
        "gemma",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "afl-3.0",
        "isc",
        "unlicense",
        "wtfpl",
        "unknown",
    ]
)
_HUB_NAMES = {"gemma-3-270m": "google/gemma-3-270m"}  # embedded models and what they were made from
_LONGEST, _SENTENCE = 300, 2000  # characters of a name, of a sentence or an attribution
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~!&$@^])")
_LINK = re.compile(r"(?i)(https?|ftp|mailto)(:)|(www)(\.)")


def model_card(run: Run, facts: Mapping[str, Any], *, merged: bool = False) -> str | None:
    """The card's text from what report.json holds (`facts`) and the run's recipe. None where nothing was trained.

    `merged`: of the merged model, which plain transformers loads; else of what `adapter/` holds.
    """
    row = next((one for one in facts["candidates"] if one["name"] == facts["subject"]), None)
    if row is None or not run.training_file.exists():
        return None
    recipe, summary = run.recipe(), run.read_json(run.training_file)
    whole = merged or summary.get("method") == "full"
    base = base_name(recipe.model.name)
    licence = str(run.status().get("base_license") or "unknown")
    head = _flat(_head(facts, row, base=base, licence=licence, whole=whole, method=str(summary.get("method"))))
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=False, width=4096)}---",
        f"# {escaped(facts['run']['name'])}",
        _purpose(facts, row, base, licence),
        _table(facts),
        _forgotten(run),
        _data(facts["data"] or {}),
        _training(summary, recipe),
        _limits(facts),
        _loading(base, whole),
    ]
    return str(encodable("\n\n".join(parts))) + "\n"


def write_card(run: Run, facts: Mapping[str, Any]) -> Path | None:
    """Write RUN/model_card.md, and the same as README.md into the folder of the trained weights, whose manifest names its own files only."""
    text = model_card(run, facts)
    if text is None:
        return None
    run.write_text(run.card_file, text)
    if run.adapter_folder.is_dir():
        run.write_text(run.adapter_folder / "README.md", text)
    return run.card_file


def base_name(name: str) -> str:
    """As a reader of the card can find it: a hub's name stays, of a folder only its name is told."""
    if name in _HUB_NAMES:
        return _HUB_NAMES[name]
    bare = name.removeprefix("hub:")
    return bare if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", bare) and not bare.startswith(".") else PurePath(bare).name


def source_name(path: Any) -> str:
    """hub:OWNER/NAME → OWNER/NAME, demo:NAME as it is, a file's path → its name."""
    text = str(path or "unnamed")
    if text.startswith("hub:"):
        return ":".join(text.split(":")[1:2])[:_LONGEST]
    return text[:_LONGEST] if text.startswith("demo:") else (PurePath(text.replace("\\", "/")).name or "unnamed")[:_LONGEST]


def escaped(text: Any, most: int = _LONGEST) -> str:
    """One line of Markdown that shows this text and is nothing else: no markup, no link, no HTML, no new block."""
    line = _SPECIAL.sub(r"\\\1", _one_line(text, most))
    line = _LINK.sub(lambda found: f"{found[1] or found[3]}\\{found[2] or found[4]}", line)
    return re.sub(r"^(\d+)(\.)", r"\1\\\2", re.sub(r"^([-+:])", r"\\\1", line))


def _flat(value: Any) -> Any:
    """The same values without what UTF-8 or a line cannot hold: a text in the head is one line, whatever it was."""
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_flat(item) for item in value]
    return _one_line(encodable(value)) if isinstance(value, str) else encodable(value)


def _one_line(text: Any, most: int = _LONGEST) -> str:
    return " ".join(visible(str(text)).split())[:most]


def fenced(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any run of backticks inside."""
    shown = visible(text.replace("\r", "")).rstrip("\n")
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


# ------------------------------------------------------------------------------------------------------------------ inside


def _head(facts: Mapping[str, Any], row: Mapping[str, Any], *, base: str, licence: str, whole: bool, method: str) -> dict[str, Any]:
    verdict, data = facts["verdict"], facts["data"] or {}
    known = licence.lower() in _LICENCES
    sources = list(dict.fromkeys(source_name(source.get("path")) for source in data.get("sources") or []))
    metrics = [
        _measured(verdict["metric"], verdict["metric_title"], row["score"], row["low"], row["high"], row["n"], verdict["confidence"])
    ]
    metrics += [
        _measured(name, value.get("title"), value.get("value"), value.get("low"), value.get("high"), row["n"], verdict["confidence"])
        for name, value in row["metrics"].items()
        if isinstance(value, dict)
    ]
    metrics = [metric for metric in metrics if is_number(metric["value"])]
    result = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"name": f"test rows of {', '.join(sources) or 'the run'}", "type": "custom", "split": "test"},
        "metrics": metrics,
    }
    return {
        "base_model": base,
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        **(
            {"license": licence.lower()}
            if known
            else {"license": "unknown"}
            if licence == "not stated"
            else {"license": "other", "license_name": licence}
        ),
        "tags": ["burnish", method],
        **({"datasets": sources} if sources else {}),
        "metrics": [str(metric["type"]) for metric in metrics],
        "model-index": [{"name": str(facts["run"]["name"]), "results": [result] if metrics else []}],
    }


def _measured(kind: Any, title: Any, value: Any, low: Any, high: Any, rows: Any, confidence: Any) -> dict[str, Any]:
    return {
        "type": str(kind),
        "name": str(title or kind),
        "value": value,
        "args": {"low": low, "high": high, "confidence": confidence, "rows": rows},
        "verified": False,
    }


def _purpose(facts: Mapping[str, Any], row: Mapping[str, Any], base: str, licence: str) -> str:
    verdict = facts["verdict"]
    lines = [
        f"{escaped(base)}, fine-tuned with Burnish on the rows told of below. It is for inputs like those rows, asked in the form it was trained on, "
        "and was measured for nothing else.",
        f"**{escaped(verdict['verdict'] or 'NO VERDICT')}.** {escaped(verdict['sentence'] or 'No verdict was asked for.', _SENTENCE)}",
        f"Licence of the base model, as its own model card states it: {escaped(licence)}. What is trained from it may be bound by it.",
    ]
    return "\n\n".join(lines)


def _table(facts: Mapping[str, Any]) -> str:
    verdict, percent = facts["verdict"], facts["verdict"]["percent"]
    confidence = whole_percent(verdict["confidence"]) if verdict["confidence"] is not None else ""
    lines = [
        "## Measured",
        "",
        f"{escaped(verdict['metric_title'])} of all candidates on the same {number(verdict['rows'])} test rows, with {confidence} intervals:",
        "",
        "| candidate | score | interval | rows | tokens in → out |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in facts["candidates"]:
        title = f"**{escaped(one['title'])}**" if one["name"] == facts["subject"] else escaped(one["title"])
        tokens = f"{number(one['prompt_tokens_mean'])} → {number(one['completion_tokens_mean'])}"
        cells = (title, score(one["score"], percent), interval(one["low"], one["high"], percent), number(one["n"]), tokens)
        lines.append(f"| {' | '.join(cells)} |")
    titles = {one["name"]: one["title"] for one in facts["candidates"]}
    if facts["comparisons"]:
        lines += ["", "Paired on the same rows, p-values corrected over the baselines (Holm):", ""]
        lines += ["| against | difference | interval | p | verdict |", "| --- | --- | --- | --- | --- |"]
    for pair in facts["comparisons"]:
        p = f"{pair['p_adjusted']:.2g}" if is_number(pair["p_adjusted"]) else "–"
        ends = f"{signed(pair['low'], percent)} to {signed(pair['high'], percent)}"
        name = escaped(titles.get(pair["baseline"], pair["baseline"]))
        lines.append(f"| {name} | {signed(pair['difference'], percent)} | {ends} | {p} | {escaped(pair['verdict'])} |")
    return "\n".join(lines)


def _forgotten(run: Run) -> str:
    path = run.path / "retain.json"
    content = run.read_json(path) if path.exists() else None
    if not isinstance(content, dict):
        return "## What was forgotten\n\nNot measured."
    lines = ["## What was forgotten", "", escaped(content.get("sentence") or "No sentence was written.", _SENTENCE), ""]
    suites = [suite for suite in content.get("suites") or [] if isinstance(suite, dict)]
    if suites:
        lines += ["| suite | base | tuned | change, points | interval | rows |", "| --- | --- | --- | --- | --- | --- |"]
    for suite in suites:
        before, after = (score(suite.get(key), not suite.get("unit")) for key in ("before", "after"))
        ends = f"{signed(suite.get('low'))} to {signed(suite.get('high'))}"
        name = escaped(suite.get("title") or suite.get("suite") or "–")
        lines.append(f"| {name} | {before} | {after} | {signed(suite.get('change'))} | {ends} | {number(suite.get('n'))} |")
    return "\n".join(lines)


def _data(data: Mapping[str, Any]) -> str:
    lines = ["## Data", ""]
    if sources := data.get("sources") or []:
        lines += ["| source | for | form | rows | SHA-256 |", "| --- | --- | --- | --- | --- |"]
    for source in sources:
        name, split, form = (
            escaped(text) for text in (source_name(source.get("path")), source.get("split") or "–", source.get("format") or "–")
        )
        lines.append(f"| {name} | {split} | {form} | {number(source.get('rows'))} | {escaped(source.get('sha256') or '–')} |")
    if splits := data.get("splits") or {}:
        lines += ["", "| split | rows used | groups | SHA-256 |", "| --- | --- | --- | --- |"]
    for name, split in splits.items():
        digest = str(split.get("file_sha256") or split.get("sha256") or "–")
        lines.append(f"| {escaped(name)} | {number(split.get('rows'))} | {number(split.get('groups'))} | {escaped(digest)} |")
    removed = data.get("removed_counts") or {}
    gone = ", ".join(f"{number(count)} × {escaped(reason)}" for reason, count in removed.items())
    lines += ["", f"Left out: {gone}." if removed else "No row was left out."]
    if data.get("attribution"):
        lines += ["", escaped(data["attribution"], _SENTENCE)]
    else:
        lines += ["", "Licences of the data are not known to the tool that wrote this card: state them here."]
    return "\n".join(lines)


def _training(summary: Mapping[str, Any], recipe: Recipe) -> str:
    done = [
        f"{escaped(summary.get('method') or '–')}, {number(summary.get('steps'))} steps of AdamW, peak learning rate {score(summary.get('learning_rate'), False)}",
        f"{number(summary.get('trainable_parameters'))} of {number(summary.get('total_parameters'))} parameters trained",
        f"{number(summary.get('target_tokens'))} target tokens",
        f"best validation loss {number(summary.get('best_validation_loss'), 4)} at step {number(summary.get('best_step'))}",
        f"hash of the base weights {escaped(summary.get('base_sha256') or '–')}, SHA-256 of the trained ones {escaped(summary.get('adapter_sha256') or '–')}",
    ]
    return "\n".join(
        ["## Training", "", *(f"- {line}" for line in done), "", fenced(dump_recipe(_without_paths(recipe), short=True), "yaml")]
    )


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe as it may be published: of files and folders the names only, no chain (its stages name files of their own), no address of an endpoint."""
    bare = {
        "data": ("train", "validation", "test", "documents"),
        "training": ("replay_data",),
        "model": ("chat_template",),
        "task": ("metric",),
        "evaluation": (),
    }
    changed: dict[str, Any] = {"stages": None}
    for name, keys in bare.items():
        section = getattr(recipe, name)
        values = {key: source_name(value) for key in keys if isinstance(value := getattr(section, key, None), str)}
        changed[name] = section.model_copy(update=values | ({"endpoint": None} if hasattr(section, "endpoint") else {}))
    changed["model"] = changed["model"].model_copy(update={"name": base_name(recipe.model.name)})
    return recipe.model_copy(update=changed)


def _limits(facts: Mapping[str, Any]) -> str:
    verdict = facts["verdict"]
    sources = list(dict.fromkeys(escaped(source_name(source.get("path"))) for source in (facts["data"] or {}).get("sources") or []))
    rows = f"{number(verdict['rows'])} test rows of {', '.join(sources) or 'the run'}"
    if is_number(verdict["groups"]) and is_number(verdict["rows"]) and verdict["groups"] < verdict["rows"]:
        rows += f", in {number(verdict['groups'])} groups that are judged as wholes"
    lines = [f"Measured on {rows}; other inputs were not looked at."]
    if is_number(verdict["detectable_difference"]):
        points = f"{signed(verdict['detectable_difference'], verdict['percent'])[1:]}{' points' if verdict['percent'] else ''}"
        lines.append(f"So many rows can show differences of {points} or more over a baseline in the middle of the scale.")
    lines += [
        "One training seed: the intervals are about the test rows, not about training again.",
        "Not measured: safety, bias, other languages, longer conversations.",
    ]
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


def _loading(base: str, whole: bool) -> str:
    ask = [
        'text = tokenizer.apply_chat_template([{"role": "user", "content": "…"}], tokenize=False, add_generation_prompt=True)',
        'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=200)[0][inputs.input_ids.shape[1]:], skip_special_tokens=True))",
    ]
    if whole:
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # where this card lies',
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ]
    else:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # where this card lies',
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({json.dumps(base)}), folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)  # with the template it was trained in",
        ]
    return f"## How to load it\n\n{fenced(chr(10).join([*lines, *ask]), 'python')}"
