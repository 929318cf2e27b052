"""How a base model becomes trainable. METHODS is the table: each row is a function of the same form.

    lora     small matrices beside the linear layers                      LoRA, arXiv 2106.09685
    rslora   the same, scaled by alpha ÷ √rank: for high ranks            rsLoRA, arXiv 2312.03732
    dora     direction by LoRA, length of each row learnt apart           DoRA, arXiv 2402.09353
    qlora    LoRA on a base held in 4 bits                                QLoRA, arXiv 2305.14314
    full     the weights themselves

`training.layers` chooses where, with any of them. To add a method: write base model, recipe → trainable model, and add a line to METHODS
and to LEARNING_RATES; tests/contract/test_methods.py then runs on it.

The trained weights live in the base's compute type; the loop keeps float32 masters of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from burnish.errors import ModelError
from burnish.models.layers import choose_layers, known, target_names
from burnish.models.quantize import is_quantized, quantize
from burnish.models.quiet import quiet
from burnish.recipe import Recipe

# Where a search for the peak learning rate begins, and what it falls back on. 1e-3 suits LoRA of rank 16 on all linear layers of Gemma 3 270M on both golden
# recipes: the validation loss fell at every validation (docs/results.md). rsLoRA's scale is √rank times LoRA's at the same alpha, so its rate is a
# quarter at rank 16; DoRA's and QLoRA's papers keep LoRA's. `full` moves every weight: a fiftieth. None is the outcome of a sweep.
LEARNING_RATES = {"lora": 1e-3, "rslora": 2.5e-4, "dora": 1e-3, "qlora": 1e-3, "full": 2e-5}


def lora(model: Any, recipe: Recipe, **variant: bool) -> Any:
    """LoRA through PEFT: y = W x + alpha/r · B A x, B = 0 at the start, so a fresh adapter changes nothing.

    Raises ModelError where no module has the name asked for.
    """
    layers, targets = recipe.training.layers, recipe.lora.target_modules
    names: str | list[str] = targets if layers == "all" else target_names(model, layers, targets)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
        **variant,
    )
    torch.manual_seed(recipe.seed)
    try:
        with quiet():
            return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as problem:
        raise ModelError(f"lora.target_modules: {targets}: {str(problem)[:300]}") from problem


def rslora(model: Any, recipe: Recipe) -> Any:
    """Rank-stabilised LoRA (Kalajdzievski 2023): the scale alpha/√r keeps the size of the update when the rank grows."""
    return lora(model, recipe, use_rslora=True)


def dora(model: Any, recipe: Recipe) -> Any:
    """Weight-decomposed LoRA (Liu et al. 2024): y = m · (W + s B A) x / ‖W + s B A‖ per output row, m = ‖W‖ at the start."""
    return lora(model, recipe, use_dora=True)


def qlora(model: Any, recipe: Recipe) -> Any:
    """LoRA on a 4-bit base (Dettmers et al. 2023). A base that `load_base` has not quantised yet is quantised in place."""
    return lora(model if is_quantized(model) else quantize(model), recipe)


def full(model: Any, recipe: Recipe) -> Any:
    """The parameters of the chosen layers themselves; `all`: every one, embeddings and norms too. Raises ModelError where the choice is empty."""
    layers = recipe.training.layers
    chosen = choose_layers(model, layers)
    model.requires_grad_(False)
    # A tied head is the embedding under a second name: the regex may name either.
    parameters = list(model.named_parameters(remove_duplicate=False))
    wanted = [parameter for name, parameter in parameters if chosen(name.rpartition(".")[0])]
    if not wanted:
        raise ModelError(
            f"training.layers: {layers}: found in the name of no module with weights; there are {known(name.rpartition('.')[0] for name, _ in parameters)}"
        )
    for parameter in wanted:
        parameter.requires_grad_(True)
    return model


METHODS: dict[str, Callable[[Any, Recipe], Any]] = {"lora": lora, "rslora": rslora, "dora": dora, "qlora": qlora, "full": full}


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
