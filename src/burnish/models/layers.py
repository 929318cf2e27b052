"""Which layers are trained: `training.layers` → which modules of a model. The same choice for every method.

all          everything the method trains
last-8       the eight decoder layers nearest the head; first-4: the four nearest the input
[0, 5, 11]   decoder layers by number, counted from 0
a regex      every module in whose name it is found (`re.search`): `layers\\.(0|1)\\.`, `mlp`, `embed_tokens|norm`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from burnish.errors import ModelError

Choice = Callable[[str], bool]
_COUNTED = re.compile(r"(first|last)-(\d+)")


def choose_layers(model: Any, layers: str | Sequence[int]) -> Choice:
    """A test of module names. Raises ModelError where the choice names layers that the model does not have, or is no regex."""
    if layers == "all":
        return lambda name: True
    if isinstance(layers, str) and not (counted := _COUNTED.fullmatch(layers)):
        try:
            pattern = re.compile(layers)
        except re.error as problem:
            raise ModelError(
                f"training.layers: {layers}: {problem}; expected all, last-8, first-4, a list of numbers, or a regex"
            ) from problem
        return lambda name: pattern.search(name) is not None
    prefix, count = decoder_layers(model)
    if isinstance(layers, str):
        assert counted is not None
        wanted = int(counted[2])
        if not 1 <= wanted <= count:
            raise ModelError(
                f"training.layers: {layers}: this model has {count} decoder layers; expected {counted[1]}-1 to {counted[1]}-{count}"
            )
        numbers = set(range(wanted) if counted[1] == "first" else range(count - wanted, count))
    else:
        numbers = set(layers)
        if not numbers or (outside := sorted(number for number in numbers if number >= count)):
            found = f"no layer {', '.join(map(str, outside))}" if numbers else "an empty list"
            raise ModelError(f"training.layers: {list(layers)}: {found}; this model's {count} decoder layers are numbered 0 to {count - 1}")
    inside = re.compile(rf"{re.escape(prefix)}\.({'|'.join(map(str, sorted(numbers)))})(\.|$)")
    return lambda name: inside.match(name) is not None


def decoder_layers(model: Any) -> tuple[str, int]:
    """(name of the list of decoder layers, how many there are)."""
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return name, len(module)
    raise ModelError(
        f"training.layers: no list of {wanted} decoder layers found in {type(model).__name__}; choose modules with a regex over their names"
    )


def linear_names(model: Any) -> list[str]:
    """Every linear module but the head: what `lora.target_modules: all-linear` means."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if is_linear(module) and module is not head]


def is_linear(module: Any) -> bool:
    """transformers' Conv1D is GPT-2's linear layer."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def target_names(model: Any, layers: str | Sequence[int], target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear modules in the chosen layers that `lora.target_modules` (PEFT's rule) names."""
    chosen = choose_layers(model, layers)
    linear = linear_names(model)
    if target_modules == "all-linear":
        targets = linear
    elif isinstance(target_modules, str):
        targets = [name for name in linear if re.fullmatch(target_modules, name)]
    else:
        targets = [name for name in linear if any(name == target or name.endswith(f".{target}") for target in target_modules)]
    if not targets:
        raise ModelError(f"lora.target_modules: {target_modules}: no such module; this model has {known(linear)}")
    found = [name for name in targets if chosen(name)]
    if not found:
        raise ModelError(f"training.layers: {layers}: found in the name of no module to train; there are {known(targets)}")
    return found


def known(names: Iterable[str]) -> str:
    """Module names with their numbers folded, for errors: `model.layers.*.mlp.up_proj`."""
    folded = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return ", ".join(folded[:20]) + (f" and {len(folded) - 20} more" if len(folded) > 20 else "")
