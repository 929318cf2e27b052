"""What an answer does instead of answering: it refuses, or it says the same again and again. Judged by its words alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

# An apology alone is none ("I'm sorry to hear that your card was lost"): it must go on to say that something cannot be done.
_CANNOT = r"(?:can(?:not|[\s]not|['’]?t)|unable|not\s+able|won['’]?t|will\s+not|not\s+allowed|don['’]?t\s+have|no\s+access)"
_ACTS = r"(?:help|assist|answer|provide|do\s+that|comply|fulfil|fulfill|comment|discuss)"
_REFUSALS = re.compile(
    rf"""\b(?:(?:i['’]?\s?a?m\s+(?:sorry|afraid)|sorry|i\s+apologi[sz]e)[^.!?\n]{{0,60}}?\b{_CANNOT}|
    (?:i\s+)?(?:can(?:not|['’]t)|am\s+(?:not\s+able|unable)\s+to|['’]m\s+(?:not\s+able|unable)\s+to|won['’]t|will\s+not)\s+{_ACTS}|
    as\s+an?\s+(?:ai|artificial|language\s+model)|
    tut\s+mir\s+leid[^.!?\n]{{0,60}}?\b(?:nicht|keine?|leider)|ich\s+kann\s+(?:dir|ihnen|das|dabei|diese\s+\w+)\s+\w*\s*(?:nicht|leider)|als\s+(?:ki|sprachmodell)|
    désolée?[^.!?\n]{{0,60}}?\b(?:ne|pas)|je\s+ne\s+peux\s+pas|en\s+tant\s+qu['’](?:ia|intelligence)|
    lo\s+siento[^.!?\n]{{0,60}}?\bno|no\s+puedo\s+(?:ayudar|responder)|como\s+(?:una\s+)?ia)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_BEGINNING = 200  # characters in which a refusal shows


def is_refusal(text: str) -> bool:
    """Whether a text begins by saying that it cannot answer: phrases in English, German, French and Spanish."""
    return _REFUSALS.search(text[:_BEGINNING]) is not None


def has_loop(text: str) -> bool:
    """Whether some words (1 to 20) come four times in a row and more, or some characters (1 to 20) do over at least 60 characters."""
    return _loops(text.split(), least=8) or _loops(text, least=60)


def _loops(parts: Sequence[str], least: int) -> bool:
    for period in range(1, 21):
        run = 0
        for now, before in zip(parts[period:], parts, strict=False):
            run = run + 1 if now == before else 0
            if run >= 3 * period and run + period >= least:
                return True
    return False
