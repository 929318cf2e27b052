"""Should you fine-tune? RULES is the table: tried from the top, the first whose condition holds is the answer.

Every condition is about numbers with intervals. A candidate is *better* where the paired test says so after Holm's correction over all pairs; it is *as
good* where the interval of the difference leaves no room for a gain worth having; else nobody can tell. To add a rule: a function that
returns its reason or None, and a line in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from burnish.types import Verdict

FINE_TUNE, PROMPT, RETRIEVE, MORE_DATA, NO, CANT_TELL = "fine-tune", "prompt", "retrieve", "more-data", "no", "cant-tell"
OF_USE = 0.1  # a score that cannot reach this is of no use: a convention, to be stated by the user where it matters
WORTH_HAVING = 0.05  # a gain below this is not worth a training: five rows in a hundred
FEW_ROWS = 500  # below, more training rows are the first thing to try (OpenAI's guide: improvements from 50 to 100 rows on, doubling helps in steps)


@dataclass(frozen=True, slots=True)
class Facts:
    """What `decide` measured, as the rules read it."""

    scores: Mapping[str, Mapping[str, Any]]  # candidate → its row: score, low, high, title …
    best: Mapping[str, str]  # family → its best candidate
    pairs: Mapping[tuple[str, str], Mapping[str, Any]]  # (candidate, baseline) → difference, low, high, verdict
    train_rows: int
    test_rows: int
    detectable: float | None  # the smallest difference that the test rows show with 80 % probability
    target: float | None = None  # a score that is enough for the user
    of_use: float = OF_USE
    worth_having: float = WORTH_HAVING

    @property
    def untrained(self) -> str | None:
        """The best candidate that needs no training, larger models aside."""
        names = [self.best[family] for family in ("prompt", "retrieve") if family in self.best]
        return max(names, key=lambda name: self.scores[name]["score"], default=None)

    def better(self, a: str, b: str) -> bool:
        pair = self.pairs.get((a, b))
        return pair is not None and pair["verdict"] == Verdict.BETTER

    def gain(self, a: str, b: str) -> Mapping[str, Any] | None:
        """Difference a − b with its interval, whichever way it was measured."""
        if (a, b) in self.pairs:
            return self.pairs[a, b]
        if (pair := self.pairs.get((b, a))) is None:
            return None
        return {**pair, "difference": -pair["difference"], "low": -pair["high"], "high": -pair["low"]}

    def told(self, name: str) -> str:
        row = self.scores[name]
        return f"{row['title']} {_percent(row['score'])} [{_percent(row['low'])}, {_percent(row['high'])}]"


@dataclass(frozen=True, slots=True)
class Rule:
    verdict: str
    asks: str  # the condition in words
    source: str  # where the rule comes from
    holds: Callable[[Facts], str | None]  # the reason with its numbers, or None


def _nothing_to_see(facts: Facts) -> str | None:
    if facts.detectable is not None or any(pair["verdict"] != Verdict.CANT_TELL for pair in facts.pairs.values()):
        return None
    return f"{facts.test_rows} test rows can show no difference at all, however large: get more test rows"


def _enough_already(facts: Facts, family: str) -> str | None:
    name = facts.untrained
    if facts.target is None or name is None or facts.best.get(family) != name or facts.scores[name]["low"] < facts.target:
        return None
    return f"{facts.told(name)} reaches the target of {_percent(facts.target)} without any training"


def _out_of_reach(facts: Facts) -> str | None:
    names = [name for family, name in facts.best.items() if family != "larger"]
    if not names or "tuned" not in facts.best or any(facts.scores[name]["high"] >= facts.of_use for name in names):
        return None
    best = max(names, key=lambda name: facts.scores[name]["score"])
    text = f"nothing on this base is of use (the best, {facts.told(best)}, cannot reach {_percent(facts.of_use)}), and the probe shows that training does not change that"
    if (larger := facts.best.get("larger")) is not None:
        return f"{text}; the larger model reaches {facts.told(larger)}"
    return f"{text}: try a larger base model (--bases), or measure one behind an endpoint (evaluation.endpoint)"


def _larger_wins(facts: Facts) -> str | None:
    larger, tuned = facts.best.get("larger"), facts.best.get("tuned")
    if larger is None or tuned is None:
        return None
    pair = facts.gain(tuned, larger)
    if pair is None or pair["verdict"] != Verdict.WORSE:
        return None
    rest = [facts.best[family] for family in ("prompt", "retrieve") if family in facts.best]
    if any(not facts.better(larger, name) for name in rest):
        return None
    return f"the larger model is better than the tuned one and than all that needs no training: {facts.told(larger)} against {facts.told(tuned)}"


def _tuned_wins(facts: Facts) -> str | None:
    tuned = facts.best.get("tuned")
    untrained = [name for family in ("prompt", "retrieve") for name in [facts.best.get(family)] if name is not None]
    if (
        tuned is None
        or not untrained
        or not all(
            facts.better(tuned, baseline) for (one, baseline) in facts.pairs if one == tuned and baseline != facts.best.get("larger")
        )
    ):
        return None
    best = facts.untrained
    assert best is not None
    return f"a short training is better than everything that needs none: {facts.told(tuned)} against {facts.told(best)}, {_gain(facts.pairs[tuned, best])}"


def _not_worth_it(facts: Facts, family: str) -> str | None:
    """The best of this family leads all that needs no training, is worth something, and training cannot be shown to add what is worth having."""
    name, tuned = facts.best.get(family), facts.best.get("tuned")
    if name is None or name != facts.untrained or tuned is None or not facts.better(name, "constant"):
        return None
    pair = facts.gain(tuned, name)
    if pair is None or pair["high"] >= facts.worth_having:
        return None
    return (
        f"{facts.told(name)} needs no training, and a short training does not add what is worth having: {facts.told(tuned)}, {_gain(pair)}"
    )


def _retrieval_leads(facts: Facts) -> str | None:
    """Training may yet add something, but looking things up is already better than prompting, and nobody can tell that training is better still."""
    name, tuned, prompt = facts.best.get("retrieve"), facts.best.get("tuned"), facts.best.get("prompt")
    if name is None or name != facts.untrained or prompt is None or not facts.better(name, prompt) or not facts.better(name, "constant"):
        return None
    if tuned is None:
        return None
    pair = facts.gain(tuned, name)
    if pair is None or pair["verdict"] == Verdict.BETTER or pair["difference"] > 0:
        return None
    return f"looking things up is better than prompting ({facts.told(name)} against {facts.told(prompt)}), and a short training is not ahead of it: {facts.told(tuned)}, {_gain(pair)}"


def _promising(facts: Facts) -> str | None:
    tuned, name = facts.best.get("tuned"), facts.untrained
    if tuned is None or name is None or facts.train_rows >= FEW_ROWS:
        return None
    pair = facts.gain(tuned, name)
    if pair is None or pair["high"] < facts.worth_having or pair["verdict"] == Verdict.WORSE:
        return None
    return f"training may help, {_gain(pair)} over {facts.scores[name]['title']}, but {facts.train_rows} training rows and {facts.test_rows} test rows do not show it: collect more of both"


def _cant_tell(facts: Facts) -> str | None:
    tuned, name = facts.best.get("tuned"), facts.untrained
    if tuned is None:
        best = f": the best without it is {facts.told(name)}" if name is not None else ""
        return f"no training was tried, so nobody knows what it would add{best}. Give a larger --budget"
    if name is None:
        return "no candidate without training was measured, so there is nothing to compare with"
    pair = facts.gain(tuned, name)
    seen = f" ({facts.test_rows} test rows show differences of about {100 * facts.detectable:.0f} points)" if facts.detectable else ""
    return f"{facts.told(tuned)} against {facts.told(name)}: {_gain(pair) if pair else 'not compared'}{seen}. More test rows, or a longer probe, would tell"


RULES: tuple[Rule, ...] = (
    Rule(CANT_TELL, "no difference could be shown by so few test rows", "power of a paired test (McNemar 1947)", _nothing_to_see),
    Rule(PROMPT, "a prompt alone surely reaches the target that was stated", "the user's own --target", lambda f: _enough_already(f, "prompt")),
    Rule(RETRIEVE, "looking things up surely reaches the target that was stated", "the user's own --target", lambda f: _enough_already(f, "retrieve")),
    Rule(NO, "nothing on this base, trained or not, can reach what is of use", "capability must be in the base: LIMA (arXiv 2305.11206), section 2", _out_of_reach),
    Rule(NO, "a larger model is better than the tuned one and than everything untrained", "measured", _larger_wins),
    Rule(FINE_TUNE, "a short training is better than every candidate without one", "measured; paired tests, Holm (1979)", _tuned_wins),
    Rule(RETRIEVE, "looking things up leads, and training surely adds less than is worth having", "new knowledge comes by retrieval (arXiv 2312.05934)", lambda f: _not_worth_it(f, "retrieve")),
    Rule(PROMPT, "prompting leads, and training surely adds less than is worth having", "prompt first: OpenAI's guide to fine-tuning", lambda f: _not_worth_it(f, "prompt")),
    Rule(RETRIEVE, "looking things up is better than prompting, and training is not ahead of it", "new knowledge comes by retrieval (arXiv 2312.05934)", _retrieval_leads),
    Rule(MORE_DATA, f"training may help, but nobody can tell, and there are fewer than {FEW_ROWS} training rows", "data before methods: OpenAI's guide to fine-tuning", _promising),
    Rule(CANT_TELL, "none of the above", "the numbers do not decide", _cant_tell),
)  # fmt: skip


def _gain(pair: Mapping[str, Any]) -> str:
    return f"{100 * pair['difference']:+.1f} points [{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
