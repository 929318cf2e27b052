"""Examples → train, validation, test. Pure functions of each row's own content: adding rows never moves old ones."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from burnish.types import Example

_WORD = re.compile(r"\w+", re.UNICODE)


def share(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed only."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def split_by_group(examples: Sequence[Example], fractions: dict[str, float], seed: int) -> dict[str, list[Example]]:
    """Each group goes whole to the split whose slice of [0, 1) its hash falls into; what is left is `train`."""
    result: dict[str, list[Example]] = {**{name: [] for name in fractions}, "train": []}
    for example in examples:
        place, edge = share(example.group, seed), 0.0
        for name, fraction in fractions.items():
            edge += fraction
            if place < edge:
                result[name].append(example)
                break
        else:
            result["train"].append(example)
    return result


def take(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """At most `rows` examples, those with the smallest hash, in their old order: a sample of a sample is a sample."""
    if rows is None or len(examples) <= rows:
        return list(examples)
    chosen = {e.id for e in sorted(examples, key=lambda e: (share(e.id, seed), e.id))[:rows]}
    return [e for e in examples if e.id in chosen]


def find_overlap(of: Sequence[Example], against: Sequence[Example], ngram: int) -> dict[str, str]:
    """Rows of `of` whose prompt also stands in `against`: Example.id → reason.

    Exact: the same words in the whole prompt (case, punctuation and spacing aside). n-gram, in user messages: a run of `ngram` words in common (GPT-3,
    arXiv 2005.14165, appendix C). A run that stands in the prompts of five or more groups of `against` is the form of the data (an
    instruction, a schema), not a leak, and does not count.
    """
    known = {_key(example): example for example in against}
    runs: dict[int, set[str]] = defaultdict(set)
    if ngram:
        for example in against:
            for run in _runs(example, ngram):
                runs[run].add(example.group)
    found: dict[str, str] = {}
    common = Counter({run: len(groups) for run, groups in runs.items()})
    for example in of:
        if (key := _key(example)) in known:
            found[example.id] = f"same prompt as {known[key].source}"
        elif ngram and any(0 < common[run] < 5 for run in _runs(example, ngram) if run in common):
            found[example.id] = f"{ngram} words in a row in common"
    return found


def _words(example: Example) -> list[str]:
    # Plain text has no prompt: the whole of it must not stand in two splits.
    asked = " ".join(m["content"] for m in example.prompt if m["role"] == "user") if example.prompt else example.reference
    return _WORD.findall(asked.casefold())


def _key(example: Example) -> str:
    """The whole prompt, a system message too: with a fixed question, what differs may stand there."""
    text = "\n".join(m["content"] for m in example.prompt or example.messages)
    return " ".join(_WORD.findall(text.casefold())) or text


def _runs(example: Example, n: int) -> set[int]:
    """Hashes of the word n-grams (64 bits: among 10⁸ runs a chance meeting has odds of 1 in 4,000)."""
    words = _words(example)
    return {
        int.from_bytes(hashlib.blake2b(" ".join(words[i : i + n]).encode(), digest_size=8).digest(), "big")
        for i in range(len(words) - n + 1)
    }
