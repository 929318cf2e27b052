"""Reading models and tokenizers: without the libraries' own bars and advice, and without a search for garbage."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# What these say when they are imported is about paths that are not taken here (a missing CUDA file, a kernel to be fetched).
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws bars and advice of its own; ours are enough. Errors still come through."""
    level, drawn = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if drawn:  # not where this stands within another
            transformers_logging.enable_progress_bar()


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while something large is read that stays: with 262,144 words, half of the seconds that a tokenizer takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
