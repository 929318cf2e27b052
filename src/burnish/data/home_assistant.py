"""The embedded data: voice commands for a home and what they mean, sampled from the templates of Home Assistant.

in:  the PyPI package `home-assistant-intents` (CC BY 4.0), a language, a seed, a number of rows per split
out: rows `{"messages", "split", "group", "metadata"}`; the assistant's answer is one line of JSON: intent and slots
invariant: same seed and package → same bytes; a template lives in one split, an utterance too, and it has one meaning

How it works: `hassil` parses a template into a tree, and `_Walk` walks it at random, taking what people say more often
more often, and writes down the slots on its way. Every English utterance stays inside the language of its template (a
test recognises them with hassil); only the odds are ours. A quarter of the open words (rooms, devices, items …) is kept
for the test split, whose rows take half of their open words from it.

What a listener could not know is left out: the room the speaker stands in, templates where one wording has two readings
(`LEFT_OUT`), and a `domain` that the intent or the device class already says.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.data.home_words import BARE, ENGLISH, FLOORS, LATER, LEFT_OUT, NOUNS, ODD, OPENING, RARE, RULES, SAID, VERBS, WORDS
from burnish.errors import BurnishWarning, DataError, missing_extra

ATTRIBUTION = (
    "Sentence templates: home-assistant-intents, © the Home Assistant intents contributors (Open Home Foundation), "
    "https://github.com/OHF-Voice/intents, licensed CC BY 4.0. Sampled and filled with words by Burnish."
)
SPLITS = ("train", "validation", "test")
MAX_WORDS = 25
UNSEEN_FRACTION = 0.25  # of every open word list, only in test
KEYS = ("intent", "name", "area", "floor", "domain", "device_class", "item", "state")  # in this order, then by alphabet


@dataclass(frozen=True, slots=True)
class _Template:
    intent: str
    text: str
    fixed: tuple[tuple[str, Any], ...]
    domains: tuple[str, ...]

    @property
    def group(self) -> str:
        return f"{self.intent}-{_hash(self.intent, self.text)[:10]}"


@dataclass(slots=True)
class _Source:
    """What every walk reads: the package's lists and rules, and the words of the home, parted in seen and unseen."""

    language: str
    lists: dict[str, Any]
    rules: dict[str, str]
    seen: dict[str, list[str]]
    unseen: dict[str, list[str]]
    parsed: dict[str, Any] = field(default_factory=dict)

    def tree(self, text: str) -> Any:
        if text not in self.parsed:
            from hassil.parse_expression import parse_sentence

            self.parsed[text] = parse_sentence(text).expression
        return self.parsed[text]


@dataclass(slots=True)
class _Walk:
    source: _Source
    template: _Template
    rng: random.Random
    unseen_odds: float  # how often an open word comes from the words kept for test
    said: list[str] = field(default_factory=list)
    slots: dict[str, Any] = field(default_factory=dict)
    unseen: bool = False

    def say(self, part: Any) -> None:
        """Walk one part of the tree: append its words, note its slots."""
        kind = type(part).__name__
        if kind == "TextChunk":
            self.said.append(part.original_text)
        elif kind == "ListReference":
            self.fill(part.list_name, part.slot_name)
        elif kind == "RuleReference":
            self.say(self.source.tree(self.source.rules[part.rule_name]))
        elif kind == "Permutation":
            order = list(part.items)
            if self.rng.random() > LATER:
                self.rng.shuffle(order)
            for item in order:
                self.say(item)
        elif kind == "Alternative":
            items = [item for item in part.items if not _empty(item)] if part.is_optional else list(part.items)
            if items and (not part.is_optional or self.wants(items[0])):
                if part.is_optional and _gist(items[0]) == "<in>":
                    self.said.append("‹?›")  # this "in" may be left out again
                self.say(self.rng.choices(items, [LATER**index for index in range(len(items))])[0])
        else:
            for item in part.items:
                self.say(item)

    def wants(self, first: Any) -> bool:
        """Whether an optional part is said."""
        gist = _gist(first)
        text = "".join(self.said).strip()
        if gist == "<the>" and "area" in self.slots and text.endswith(str(self.slots["area"])):
            return False  # "the kitchen the radio"
        if gist not in SAID and not text:
            return self.rng.random() < OPENING
        return self.rng.random() < SAID.get(gist, RARE)

    def fill(self, name: str, slot: str) -> None:
        """Put a value of list `name` into `slot`."""
        described = self.source.lists.get(name, {})
        if "values" in described:
            value = self.rng.choice(described["values"])
            if self.source.language == "en" and name == "media_class" and "search_query" in self.slots:
                value = {"in": "playlist", "out": "playlist"}  # "play dinner jazz playlist", not "play adele artist"
            start = len(self.said)
            self.say(self.source.tree(str(value["in"] if isinstance(value, dict) else value)))
            said = " ".join("".join(self.said[start:]).split())
            self.slots[slot] = value.get("out", said) if isinstance(value, dict) else said
        elif "range" in described or re.match(r"\d+\.\.\d+", name):
            number = self.number(name, described.get("range"))
            self.said.append(str(number))
            factor = described.get("range", {}).get("multiplier", 1)
            self.slots[slot] = int(number * factor) if float(number * factor).is_integer() else number * factor
        else:
            self.slots[slot] = self.word(name)
            self.said.append(self.slots[slot])

    def number(self, name: str, range_: Mapping[str, Any] | None) -> int | float:
        """A number a person would say, inside the list's range."""
        if range_ is None:
            low, high = (int(x) for x in re.findall(r"\d+", name)[:2])
            return self.rng.randint(low, high)
        low, high, step = int(range_["from"]), int(range_["to"]), int(range_.get("step", 1))
        kind = range_.get("type", "number")
        if kind == "percentage":
            usual: Iterable[int] = range(10, 101, 10) if self.rng.random() < 0.6 else range(5, 100, 5)
        elif kind == "temperature":
            usual = range(15, 29)
        elif "hour" in name:
            usual = (1, 2, 3, 4, 5, 6, 8, 10, 12)
        elif "minute" in name or "second" in name:
            odd = range(1, 61) if "minute" in name else range(5, 60, 5)
            usual = (2, 3, 5, 10, 15, 20, 25, 30, 40, 45, 50, 90)["second" in name :] if self.rng.random() < 0.8 else odd
        else:
            usual = range(2000, 6501, step) if high >= 6500 else ()
        fitting = [value for value in usual if low <= value <= high] or list(range(low, high + 1, step))
        chosen = self.rng.choice(fitting)
        halved = range_.get("fractions") == "halves" and chosen < high and self.rng.random() < 0.08
        return chosen + 0.5 if halved else chosen

    def word(self, name: str) -> str:
        """An open word: a room, a device of the wanted kind, an item, a message …"""
        key = name
        if name == "name":
            key = f"name.{self.rng.choice(self.template.domains)}" if self.template.domains else "name.switch"
            if key == "name.light" and re.search(r"\{name\} <light>", self.template.text):
                key = "name.light_stem"
        elif name == "search_query":
            kinds = sorted(pool for pool in self.source.seen if pool.startswith("search_query."))
            wanted = f"search_query.{self.slots.get('media_class')}"
            if "{search_query} {media_class}" in self.template.text:
                wanted = "search_query.playlist"
            key = wanted if wanted in kinds else self.rng.choice(kinds)
        if key not in self.source.seen:
            key = "name.button" if key == "name.input_button" else "name.switch" if name == "name" else "todo_list_item"
        fresh = bool(self.source.unseen[key]) and self.rng.random() < self.unseen_odds
        self.unseen |= fresh
        return self.rng.choice(self.source.unseen[key] if fresh else self.source.seen[key])


def sample(*, language: str = "en", train: int = 3000, validation: int = 200, test: int = 400, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of voice commands and their meaning. Fewer than asked for are said in a BurnishWarning."""
    source, templates = _load(language, seed)
    parts = _part(templates, seed)
    wanted = dict(zip(SPLITS, (train, validation, test), strict=True))
    drawn: list[dict[str, Any]] = []
    for split in SPLITS:
        extra = math.ceil(wanted[split] * 1.2) + 20 if wanted[split] else 0
        rng = random.Random(f"{seed} {language} {split}")
        drawn += _draw(source, parts[split], split, extra, rng)
    rows = _one_meaning(drawn)
    kept: list[dict[str, Any]] = []
    short = []
    for split in SPLITS:
        of_split = [row for row in rows if row["split"] == split]
        kept += of_split[: wanted[split]]
        if len(of_split) < wanted[split]:
            short.append(f"{len(of_split)} of {wanted[split]} {split} rows")
    if short:
        found = f"home-assistant-intents ({language}) gives {', '.join(short)}: no more distinct sentences were found"
        warnings.warn(found, BurnishWarning, stacklevel=2)
    return kept


def languages() -> list[str]:
    """The languages the installed package has templates for."""
    return sorted(path.stem for path in _folder().glob("*.json"))


def _folder() -> Path:
    with missing_extra("demo", "the embedded data", DataError):
        import hassil  # noqa: F401
        import home_assistant_intents
    return Path(str(home_assistant_intents.__file__)).parent / "data"


def _load(language: str, seed: int) -> tuple[_Source, list[_Template]]:
    known = languages()
    if language not in known:
        raise DataError(f"home-assistant-intents has no language {language!r}. Available: {', '.join(known)}")
    content = json.loads((_folder() / f"{language}.json").read_text(encoding="utf-8"))
    rules = dict(content.get("expansion_rules", {}))
    if language == "en":
        rules |= {name: text for name, text in RULES.items() if name in rules}
    pools = {**ENGLISH, **WORDS.get(language, {})}
    seen: dict[str, list[str]] = {}
    unseen: dict[str, list[str]] = {}
    placed: dict[str, bool] = {}  # a word of two lists is unseen in both or in none
    for key in pools:
        words = sorted(pools[key].split("|"), key=lambda word: _hash(seed, word))
        for word in words[: round(len(words) * UNSEEN_FRACTION)]:
            placed.setdefault(word, True)
        for word in words:
            placed.setdefault(word, False)
        unseen[key] = [word for word in words if placed[word]]
        seen[key] = [word for word in words if not placed[word]]
    templates = []
    for intent, described in content["intents"].items():
        implied = {block.get("slots", {}).get("domain") for block in described["data"]} - {None}
        for block in described["data"]:
            slots = block.get("slots", {}).items()
            fixed = tuple((key, value) for key, value in slots if key != "domain" or len(implied) > 1)
            domains = block.get("requires_context", {}).get("domain", [])
            domains = tuple(domains if isinstance(domains, list) else [domains])
            templates += [
                _Template(intent, text, fixed, domains)
                for text in block["sentences"]
                if not any(pattern.search(text) for pattern in LEFT_OUT)
            ]
    return _Source(language, content.get("lists", {}), rules, seen, unseen), templates


def _part(templates: list[_Template], seed: int) -> dict[str, list[_Template]]:
    """Every wording of an intent in one split: a fifth to test, a tenth to validation, the rest to train."""
    wordings: dict[str, dict[str, list[_Template]]] = defaultdict(lambda: defaultdict(list))
    for template in templates:
        wordings[template.intent][template.text].append(template)
    parts: dict[str, list[_Template]] = {split: [] for split in SPLITS}
    for intent, texts in wordings.items():
        order = sorted(texts, key=lambda text: _hash(seed, intent, text))
        tests = max(1, round(len(order) * 0.2)) if len(order) >= 3 else 0
        checks = max(1, round(len(order) * 0.1)) if len(order) >= 5 else 0
        for index, text in enumerate(order):
            split = "test" if index < tests else "validation" if index < tests + checks else "train"
            parts[split] += texts[text]
    return parts


def _draw(source: _Source, templates: list[_Template], split: str, wanted: int, rng: random.Random) -> list[dict[str, Any]]:
    """`wanted` distinct rows: an intent by the root of its number of templates, one of its templates, then a walk."""
    open_: dict[str, list[_Template]] = defaultdict(list)
    for template in templates:
        open_[template.intent].append(template)
    odds = {intent: math.sqrt(len(of_intent)) for intent, of_intent in open_.items()}
    most = max(6, math.ceil(4 * wanted / max(1, len(templates))))  # rows of one template
    count: Counter[_Template] = Counter()
    failures: Counter[_Template] = Counter()
    rows: dict[str, dict[str, Any]] = {}
    while open_ and len(rows) < wanted:
        intents = list(open_)
        intent = rng.choices(intents, [odds[name] for name in intents])[0]
        template = rng.choice(open_[intent])
        row = _row(source, template, split, rng)
        if row is None or row["messages"][0]["content"] in rows:
            failures[template] += 1
        else:
            rows[row["messages"][0]["content"]] = row
            count[template] += 1
            failures[template] = 0
        if count[template] >= most or failures[template] >= 40:
            open_[intent].remove(template)
            if not open_[intent]:
                del open_[intent]
    return list(rows.values())


def _row(source: _Source, template: _Template, split: str, rng: random.Random) -> dict[str, Any] | None:
    """One row, or None where the walk led to something nobody says."""
    walk = _Walk(source, template, rng, unseen_odds=0.5 if split == "test" else 0.0)
    walk.say(source.tree(template.text))
    utterance = "".join(walk.said)
    if source.language == "en":
        utterance = _settle(utterance, template, walk.slots, rng)
        elsewhere = walk.slots.get("device_class") == "garage" and {"area", "floor"} & set(walk.slots)
        if elsewhere or ODD.search(utterance):
            return None
    utterance = " ".join(utterance.split())
    if not utterance or len(utterance.split()) > MAX_WORDS or re.search(r"[\[\]{}<>‹›|]", utterance):
        return None
    slots = {**dict(template.fixed), **walk.slots}
    if "device_class" in slots:
        slots.pop("domain", None)
    meaning = {"intent": template.intent}
    meaning |= {key: slots[key] for key in (*KEYS, *sorted(slots)) if key in slots}
    return {
        "messages": [
            {"role": "user", "content": utterance},
            {"role": "assistant", "content": json.dumps(meaning, ensure_ascii=False)},
        ],
        "split": split,
        "group": template.group,
        "metadata": {"intent": template.intent, "unseen_words": walk.unseen},
    }


def _settle(text: str, template: _Template, slots: Mapping[str, Any], rng: random.Random) -> str:
    """English grammar where the template leaves it open: in/on/at, the/my, singular/plural, is/are."""
    text = " ".join(text.split())
    people = re.escape(str(slots.get("name"))) if {"person", "weather"} & set(template.domains) else r"(?!)"
    before_bare = "at " if slots.get("state") in ("work", "school") else ""
    text = re.sub(rf"‹\?›‹in› (?:‹the› )?(?={BARE})", before_bare, text).replace("‹?›", "")
    text = re.sub(rf"(\b(?:the|all|my|every)) ‹the›|‹the› (?={people}|{BARE})", lambda found: found[1] or "", text)
    text = re.sub("‹the›", lambda found: "my" if rng.random() < 0.1 else "the", text)
    on = rf"(?:the |my )?(?:{FLOORS} floor|patio|porch|deck|balcony|driveway|terrace)\b"
    at = r"(?:the |my )?(?:airport|supermarket|gym|office|church)\b" if "state" in slots else r"(?!)"
    text = re.sub(rf"‹in› (?={on})", "on ", re.sub(rf"‹in› (?={at})", "at ", text)).replace("‹in›", "in")
    if template.intent == "HassGetState" and re.match(r"<(are_any|are_all|which|how_many)>", template.text):
        text = re.sub(r"\bevery\b", "all", re.sub(r"\bis\b", "are", text))
        text = re.sub(rf"\b{NOUNS}\b", _plural, text)
    elif template.intent == "HassGetState" and "name" in slots:
        many = str(slots["name"]).endswith("s") and "person" not in template.domains
        text = re.sub(r"^(is|are)\b", "are" if many else "is", text)
    text = re.sub(r"^(make sure all .*)\bis\b", r"\1are", text)
    text = re.sub(rf"\ball\b.*?\b{NOUNS}(?:e?s)?\b", _plural, text)
    text = re.sub(rf"\bevery\b(.*?)\b{NOUNS}(?:e?s)\b", lambda found: f"every{found[1]}{found[2]}", text)
    text = re.sub(r"\b(\d+)([ -])(hour|minute|second)s?\b(?=(.*))", _unit, text)
    text = re.sub(r"\b(and (?:a )?half (?:hour|minute))\b", r"\1s", text)
    return _politely(text, bool(re.search("message|timer_name|timer_command|search_query", template.text)), rng)


def _plural(found: re.Match[str]) -> str:
    return found[0] + ("" if found[0].endswith("s") else "es" if found[0].endswith("switch") else "s")


def _unit(found: re.Match[str]) -> str:
    """5 minutes, but a 5 minute timer (also: a 5 minute and 30 second timer)."""
    attributive = re.match(r"(?: (?:and )?\d+[ -](?:minute|second)s?)?(?: timer)\b", found[4])
    if attributive:
        return f"{found[1]}{found[2]}{found[3]}"
    return f"{found[1]} {found[3]}{'' if found[1] == '1' else 's'}"


def _politely(text: str, open_end: bool, rng: random.Random) -> str:
    """Some people are polite to machines; hassil skips these words, but not in free text, which may contain them."""
    if not VERBS.match(text) or open_end:
        return text
    polite = [text, f"please {text}", f"{text} please", f"can you {text}", f"could you {text}"]
    return rng.choices(polite, [85, 4, 5, 4, 2])[0]


def _one_meaning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without utterances of two meanings or of an earlier split; articles and politeness make no difference."""
    meanings: dict[str, set[str]] = defaultdict(set)
    home: dict[str, str] = {}
    for row in rows:
        key = _loose(row)
        meanings[key].add(row["messages"][1]["content"])
        home.setdefault(key, row["split"])
    return [row for row in rows if len(meanings[_loose(row)]) == 1 and home[_loose(row)] == row["split"]]


def _loose(row: Mapping[str, Any]) -> str:
    said = str(row["messages"][0]["content"]).casefold()
    return " ".join(re.sub(r"\b(?:please|can you|could you|the|my|our|an?)\b|\W+", " ", said).split())


def _gist(part: Any) -> str:
    """The first word of a part of a template, a rule as <name>."""
    kind = type(part).__name__
    if kind == "RuleReference":
        return f"<{part.rule_name}>"
    if kind == "TextChunk":
        return (str(part.original_text).split() or [""])[0]
    for item in getattr(part, "items", ()):
        if gist := _gist(item):
            return gist
    return ""


def _empty(part: Any) -> bool:
    kind = type(part).__name__
    if kind == "TextChunk":
        return not part.original_text
    return kind == "Sequence" and all(_empty(item) for item in part.items)


def _hash(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()
