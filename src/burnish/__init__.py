"""Burnish fine-tunes a language model on your own data and proves whether that helped.

    import burnish
    job = burnish.run_recipe("recipe.yaml")          # everything: data → baselines → training → verdict → report
    print(job.read_json(job.comparison_file)["sentence"])

The names below are in the order of the flow. They load on first use, so that `import burnish` is quick and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "Recipe": "burnish.recipe",
    "load_recipe": "burnish.recipe",
    "build_recipe": "burnish.recipe",
    "Run": "burnish.run",
    "check": "burnish.pipeline",
    "prepare": "burnish.pipeline",
    "decide": "burnish.pipeline",
    "train": "burnish.pipeline",
    "evaluate": "burnish.pipeline",
    "compare": "burnish.pipeline",
    "write_report": "burnish.pipeline",
    "run_recipe": "burnish.pipeline",
    "estimate": "burnish.pipeline",
    "judge": "burnish.pipeline",
    "sweep": "burnish.pipeline",
    "retain": "burnish.pipeline",
    "BurnishError": "burnish.errors",
    "RecipeError": "burnish.errors",
    "DataError": "burnish.errors",
    "ModelError": "burnish.errors",
    "TrainingError": "burnish.errors",
    "ServingError": "burnish.errors",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'burnish' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
