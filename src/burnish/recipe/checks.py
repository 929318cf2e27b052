"""`evaluation.checks`: what an answer must keep to besides being right. Each entry names one check and gives its settings.

    checks:
      - json: true                                        it is JSON
      - json_schema: answer.json                          and fits a JSON Schema
      - regex: '^[A-Z]'                                   a pattern is found in it
      - sections: [Findings, Impression]                  these headings, in this order
      - number: true                                      it gives its number as the references do
      - sql: {database: shop.sqlite}                      it parses, and finds the same rows; without a database: it parses
      - meaning_representation: true                      name(slot[value], …): the name, and F1 of the slots
      - glossary: terms.csv                               preferred terms, and no forbidden ones
      - tone: true                                        it reads like the training answers
      - self_consistency: {samples: 5, temperature: 0.7}  several answers to one question agree
      - judge: {rubric: rubric.md}                        what `burnish judge` asks evaluation.endpoint, where it is told nothing else
      - refusal: true · repetition: true · finished: true · length: true

What each one measures stands in `tasks/checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

_PATHS = ("glossary", "json_schema")  # settings that are a file
_PATHS_WITHIN = {"sql": "database", "judge": "rubric"}  # settings that hold one


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SqlSettings(_Settings):
    database: str | None = Field(None, description="an SQLite file, of which a copy is read; none: only whether the answer parses")
    time_limit_seconds: float = Field(2.0, gt=0, le=60, description="for one statement; then its process is killed")


class SelfConsistencySettings(_Settings):
    samples: int = Field(5, ge=2, le=64, description="answers drawn for each question")
    temperature: float = Field(0.7, gt=0, le=2, description="of the draws")
    rows: int = Field(64, ge=1, description="test rows that are asked at most, the first ones by id")


class JudgeSettings(_Settings):
    rubric: str = Field(min_length=1, description="a text file that says what a better answer is")


def _empty_from_true(value: Any) -> Any:
    return {} if value is True else value


class CheckSection(_Settings):
    """One check: exactly one of the keys."""

    json_: Literal[True] | None = Field(None, alias="json")
    json_schema: str | None = Field(None, min_length=1)
    regex: str | None = Field(None, min_length=1, max_length=1000)
    sections: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)
    number: Literal[True] | None = None
    sql: Annotated[SqlSettings | None, BeforeValidator(_empty_from_true)] = None
    meaning_representation: Literal[True] | None = None
    glossary: str | None = Field(None, min_length=1)
    tone: Literal[True] | None = None
    self_consistency: Annotated[SelfConsistencySettings | None, BeforeValidator(_empty_from_true)] = None
    judge: JudgeSettings | None = None
    refusal: Literal[True] | None = None
    repetition: Literal[True] | None = None
    finished: Literal[True] | None = None
    length: Literal[True] | None = None

    @property
    def name(self) -> str:
        """Which check this is, as the recipe writes it."""
        return next((_written(name) for name in type(self).model_fields if getattr(self, name) is not None), "")

    @property
    def settings(self) -> Any:
        """True, a text, a list, or a mapping of settings."""
        return getattr(self, "json_" if self.name == "json" else self.name)

    @model_validator(mode="after")
    def _exactly_one(self) -> CheckSection:
        given = [_written(name) for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(map(_written, type(self).model_fields))
            raise ValueError(f"each entry names one check, found {' and '.join(given) or 'none'}; begin each with a dash. Known: {known}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        settings = self.settings
        return {self.name: settings.model_dump() if isinstance(settings, BaseModel) else settings}


CHECK_NAMES = tuple("json" if name == "json_" else name for name in CheckSection.model_fields)


def path_holders(checks: Any) -> list[tuple[dict[str, Any], str]]:
    """Where an unvalidated list of checks holds the name of a file."""
    holders: list[tuple[dict[str, Any], str]] = []
    for entry in checks if isinstance(checks, list) else ():
        for name, settings in entry.items() if isinstance(entry, dict) else ():
            if name in _PATHS:
                holders.append((entry, name))
            elif name in _PATHS_WITHIN and isinstance(settings, dict):
                holders.append((settings, _PATHS_WITHIN[name]))
    return holders


def _written(field: str) -> str:
    return "json" if field == "json_" else field
