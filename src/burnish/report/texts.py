"""Values → texts for people: foreign text made visible, numbers with their unit, answers marked against references."""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

MISSING = "–"
MARKED_WORDS = 600  # a longer text is shown unmarked: comparing words is quadratic
MARKED_LIKENESS = 0.3  # below this share of common words the marks would be noise

# Format characters that belong to ordinary writing: joiners (Persian, Indic scripts, emoji) and Arabic number signs.
_WRITING = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2")
_WORD = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")


def visible(text: str) -> str:
    """Show what would otherwise hide or reorder text: ESC as ␛, a bidi override as [U+202E]. Newline and tab stay."""
    if text.isprintable():  # printable text holds no control, format, surrogate or separator character but the space
        return text
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # U+2400…: the pictures of the control characters
    if code == 0x7F:
        return "␡"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _WRITING:
        return f"[U+{code:04X}]"
    return character


def encodable(value: Any) -> Any:
    """The same JSON value without what UTF-8 or JSON cannot hold: lone surrogates become \\udXXX, NaN null."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {encodable(str(key)): encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encodable(item) for item in value]
    return None if isinstance(value, float) and not is_number(value) else value


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def marked(answer: str, reference: str) -> Markup:
    """The answer, escaped, the words it has too many in <mark>, the words of the reference it lacks in <del>."""
    ours, theirs = _WORD.findall(answer), _WORD.findall(reference)
    if not ours or not theirs or max(len(ours), len(theirs)) > MARKED_WORDS:
        return escape(visible(answer))
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in theirs], [word.strip() for word in ours], autojunk=False)
    if matcher.ratio() < MARKED_LIKENESS:
        return escape(visible(answer))
    parts: list[Markup] = []
    for kind, from_theirs, to_theirs, from_ours, to_ours in matcher.get_opcodes():
        lacks, has = "".join(theirs[from_theirs:to_theirs]), "".join(ours[from_ours:to_ours])
        if kind in ("delete", "replace") and lacks.strip():
            parts.append(Markup("<del>{}</del>").format(visible(lacks.strip())))
        if kind in ("insert", "replace") and has.strip():
            start, end = len(has) - len(has.lstrip()), len(has.rstrip())
            parts.append(Markup("{}<mark>{}</mark>{}").format(*map(visible, (has[:start], has[start:end], has[end:]))))
        else:
            parts.append(escape(visible(has)))
    return Markup("").join(parts)


# ------------------------------------------------------------------------------------------------------------- numbers


def score(value: Any, percent: bool = True) -> str:
    """A metric's value: 0.726 → 72.6 %; a metric that is no fraction keeps its own unit."""
    if not is_number(value):
        return MISSING
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def whole_percent(value: Any) -> str:
    """0.95 → 95 %; 0.995 → 99.5 %."""
    return f"{100 * value:.4g} %" if is_number(value) else MISSING


def interval(low: Any, high: Any, percent: bool = True) -> str:
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{100 * low:.1f} – {100 * high:.1f} %" if percent else f"{low:.3g} – {high:.3g}"


def signed(value: Any, percent: bool = True) -> str:
    """A difference: 0.52 → +52.0 (percentage points), with a true minus sign."""
    if not is_number(value):
        return MISSING
    text = f"{100 * value:+.1f}" if percent else f"{value:+.3g}"
    return text.replace("-", "−")


def probability(value: Any) -> str:
    if not is_number(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def seconds(value: Any) -> str:
    if not is_number(value):
        return MISSING
    if value < 0.0995:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: Any, digits: int = 0) -> str:
    """12345 → 12,345. Whole numbers stay whole whatever `digits` says."""
    if not is_number(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def loss(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else MISSING


def size(value: Any) -> str:
    """Bytes in binary units."""
    if not is_number(value):
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def fraction(value: Any) -> str:
    """A number between 0 and 1 for the length of a bar; nothing else ever reaches a style attribute."""
    return f"{min(max(float(value), 0.0), 1.0):.3f}" if is_number(value) else "0.000"
