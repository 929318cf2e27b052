"""Does a JSON answer fit a JSON Schema? Carried by `jsonschema` (extra `checks`), which never fetches anything here.

The schema is the user's, the text is not: a pattern of the schema is given a time limit, because "aaaa…!" keeps `^(a+)+$` busy for ever.
`format` is not checked, as the standard has it by default.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import regex

from burnish.errors import DataError, missing_extra
from burnish.tasks.metrics import Unreadable, parse_json
from burnish.types import Score

PATTERN_SECONDS = 0.5


def read_schema(path: Path) -> Callable[[str], Score]:
    """A function from an answer to 1 (fits) or 0; unscored where the answer is no JSON. DataError for a file that is no JSON Schema."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"{path}: cannot be read as JSON: {problem}") from problem
    with missing_extra("checks", f"the check json_schema ({path})", DataError):
        import jsonschema
        import referencing
    base = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        base.check_schema(schema)
    except (jsonschema.SchemaError, RecursionError) as problem:
        place = "/".join(map(str, getattr(problem, "path", ())))
        raise DataError(f"{path}: not a JSON Schema: {getattr(problem, 'message', problem)} (at /{place})") from None
    if _mentions(schema, "unevaluatedProperties") and _mentions(schema, "patternProperties"):
        raise DataError(
            f"{path}: unevaluatedProperties beside patternProperties cannot be checked within a time limit; use additionalProperties"
        )
    limited = jsonschema.validators.extend(
        base, {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional_properties}
    )
    # An empty registry of our own: a $ref to an address is an error, not a download.
    validator = limited(schema, registry=referencing.Registry())
    problems = (ArithmeticError, ValueError, RecursionError)

    def score(answer: str) -> Score:
        try:
            parse_json(answer)
            instance = json.loads(_unfenced(answer))
            return Score(float(validator.is_valid(instance)))
        except Unreadable as problem:
            return Score(None, f"prediction {problem}")
        except TimeoutError:
            return Score(None, f"prediction keeps a pattern of the schema busy for more than {PATTERN_SECONDS:g} s")
        except referencing.exceptions.Unresolvable as problem:
            raise DataError(f"{path}: {problem}: a $ref must point into the file itself") from None
        except problems as problem:
            return Score(None, f"prediction cannot be checked ({type(problem).__name__})")

    score("{}"), score("[]"), score('""')  # a $ref that leads nowhere is told now, not after a training
    return score


def _unfenced(answer: str) -> str:
    """What `parse_json` looks through."""
    text = answer.strip()
    return text.split("\n", 1)[1].rsplit("```", 1)[0] if text.startswith("```") else text


def search(pattern: str, text: str) -> bool:
    """Whether the pattern is found in the text. TimeoutError after PATTERN_SECONDS."""
    return regex.search(pattern, text, timeout=PATTERN_SECONDS) is not None


def _mentions(schema: Any, keyword: str) -> bool:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if keyword in part:
                return True
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
    return False


# jsonschema's own keyword functions (validator, value of the keyword, instance, schema) with our `search` for its `re.search`.


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(instance, "string") and not search(pattern, instance):
        yield ValidationError(f"does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: dict[str, Any], instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, below in patterns.items():
        for key, value in instance.items():
            if search(pattern, key):
                yield from validator.descend(value, below, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(instance, "object"):
        return
    named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, value in instance.items():
        if key in named or any(search(pattern, key) for pattern in patterns):
            continue
        if validator.is_type(allowed, "object"):
            yield from validator.descend(value, allowed, path=key)
        elif not allowed:
            yield ValidationError(f"{key!r} is not expected")
