"""A chain's recipe → one plain recipe for each stage."""

from __future__ import annotations

from typing import Any

from burnish.recipe.knobs import Recipe, StageSection

# What belongs to a data file and not to the chain: a stage that names rows of its own starts these from their defaults.
_OF_THE_FILE = (
    "validation", "test", "format", "prompt_column", "completion_column", "context_column", "group_column", "system", "train_rows",
    "validation_rows", "test_rows",
)  # fmt: skip


def stage_content(recipe: Recipe, stage: StageSection) -> dict[str, Any]:
    """The recipe of one stage as a mapping, not yet validated: the chain's, with what the stage changes."""
    content = recipe.model_dump(mode="json", exclude={"stages"})
    if "train" in stage.data:
        content["data"] = {key: value for key, value in content["data"].items() if key not in _OF_THE_FILE}
    for section in ("data", "training", "lora"):
        content[section] = {**content[section], **getattr(stage, section)}
    return {**content, "name": stage.name}


def stage_recipes(recipe: Recipe) -> list[Recipe]:
    """One recipe for each stage, in order. They were checked when the chain's recipe was read."""
    return [Recipe.model_validate(stage_content(recipe, stage)) for stage in recipe.stages or ()]
