"""`burnish value`: which training rows help or hurt, and whether training without the worst is better. The test rows are never read.

Short trainings on all folds but one give each row a loss and a gradient under a model that has not seen it. Half of the validation rows choose
checkpoints and show the gradients where to go; the other half judges the proof, since rows chosen by their help to some validation rows look good on those.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from burnish import advice, report, training
from burnish import data as data_room
from burnish.advice.value import KEPT, RANDOM, to_json
from burnish.errors import DataError, RecipeError
from burnish.models import Chat, base_state, load_chat
from burnish.pipeline.judged import Judge, metric_for, seeded
from burnish.pipeline.steps import prepare_once, rows_of, task_of, with_rate
from burnish.recipe import Recipe
from burnish.run import Run, append_line, hash_of, read_lines
from burnish.training import ShortTrainings, Trained
from burnish.types import Dataset, Example, Tell, Verdict, silent

SHOWN_CHARACTERS = 200  # of a question or an answer in the table


@dataclass(frozen=True, slots=True)
class ValuePlan:
    drop: float = 0.2  # share of the rows that is left out
    folds: int = 3
    seeds: int = 3  # trainings of each arm of the proof; 0: no proof
    objective: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.drop < 1:
            raise RecipeError(f"--drop {100 * self.drop:g}: expected a per cent above 0 and below 100")
        if self.folds < 2:
            raise RecipeError(
                f"--folds {self.folds}: expected 2 or more: each row is judged by a model that was trained on the other folds"
            )
        if self.seeds < 0:
            raise RecipeError(f"--seeds {self.seeds}: expected 0 (no proof) or more; a verdict needs 2")


def value(job: Run, *, plan: ValuePlan | None = None, tell: Tell = silent) -> dict[str, Any]:
    """Rank the training rows from worst to best, and prove what leaving out the worst is worth. Returns what value.json holds.

    Goes on where an earlier call was cut off: each short training is a line in value-work.jsonl.
    """
    asked, plan = job.recipe_as_asked(), plan or ValuePlan()
    if asked.stages:
        raise RecipeError("rows are valued for one training: give the recipe of one stage, without `stages:`")
    if asked.training.objective == "preference":
        raise RecipeError(
            "training.objective: preference: a pair has no loss and no answer of its own to be valued by; use `supervised` on the chosen answers"
        )
    chat = load_chat(asked.model, tell)
    prepare_once(job, chat=chat, tell=tell)
    dataset = rows_of(job, without=("test",))
    recipe = with_rate(job, dataset, chat, tell=tell)
    task = None if asked.training.objective == "text" else task_of(recipe, dataset)
    metric = metric_for(plan.objective, asked, task.metric if task else "")
    guides, judges = halves(dataset.validation)
    key = hash_of(
        asked.to_dict(), [part["file_sha256"] for split, part in dataset.manifest["splits"].items() if split != "test"], base_state(asked), plan.folds
    )  # fmt: skip
    work = _Work(job, key, recipe, replace(dataset, validation=guides), chat, tell)
    signals = _signals(work, plan, labels=bool(task and task.labels))
    badness, by_signal = advice.rank_rows(signals)
    kept = advice.kept_rows(badness, plan.drop)
    examples = list(dataset.train)
    job.write_jsonl(job.kept_file, (data_room.example_to_row(examples[place]) for place in kept))
    rows = _write_rows(job, examples, badness, signals, by_signal, set(kept))
    judge = Judge(replace(dataset, validation=judges), chat, metric, tell)
    proof = _prove(work, judge, kept, plan) if plan.seeds else None
    content: dict[str, Any] = {
        "key": key,
        "plan": asdict(plan),
        "signals": {name: name in by_signal for name in advice.SIGNALS},
        "rows": {"train": len(examples), "kept": len(kept), "guides": len(guides), "judges": len(judges)},
        "objective": "validation_loss" if metric is None else metric.name,
        "metric_title": judge.title,
        "lower_is_better": judge.lower_is_better,
        "confidence": recipe.evaluation.confidence,
        "proof": proof,
        "seconds": round(sum(row["seconds"] for row in work.done()), 1),
        "kept_file": str(job.kept_file),
        "worst": rows[:20],
    }
    content["sentence"] = sentence(content)
    job.write_json(job.value_file, content)
    report.value_report(job)
    return content


def halves(validation: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(those that guide, those that judge): whole groups, by turns in the order of a hash. Raises DataError where there is one group."""
    groups = sorted({example.group for example in validation}, key=lambda group: hash_of("judge", group))
    if len(groups) < 2:
        raise DataError(
            "all validation rows are of one group: rows cannot be chosen on one half and judged on another. Give more validation rows"
        )
    judging = set(groups[1::2])
    parts = [tuple(example for example in validation if (example.group in judging) is judges) for judges in (False, True)]
    return parts[0], parts[1]


# ------------------------------------------------------------------------------------------------------------ trainings


class _Work:
    """The short trainings, each done once and kept as a line."""

    def __init__(self, job: Run, key: str, recipe: Recipe, dataset: Dataset, chat: Chat, tell: Tell) -> None:
        self.path, self.key, self.recipe, self.dataset, self.tell = job.value_work_file, key, recipe, dataset, tell
        # What guides is a part of the validation rows: their tokens are not those that a run keeps.
        self.trainings = ShortTrainings(dataset, chat, folder=job.tokens_folder / "value", reference=job.reference_file, tell=tell)

    def done(self) -> list[dict[str, Any]]:
        """Lines of these rows, weights and folds."""
        return [row for row in (read_lines(self.path) if self.path.exists() else ()) if row["key"] == self.key]

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is known under this name, else what `make` returns, kept."""
        known = next((row for row in self.done() if row["part"] == name), None)
        if known is None:
            started = time.monotonic()
            known = {"key": self.key, "part": name, **make()}
            known["seconds"] = round(time.monotonic() - started, 3)
            append_line(self.path, known, sync=True)
            self.tell("value", 0, 0, f"{name}: {known['seconds']:.0f} s")
        return known


def _signals(work: _Work, plan: ValuePlan, *, labels: bool) -> advice.Signals:
    examples = list(work.dataset.train)
    count = len(examples)
    neighbours = advice.find_neighbours(examples, labels=labels, tell=work.tell)
    base = work.once("base", lambda: work.trainings.untrained(work.recipe, lambda trained: _losses(trained, range(count), work.tell)))
    held_out, gradient = np.full(count, np.nan), np.full(count, np.nan)
    for number, fold in enumerate(folds([example.group for example in examples], plan.folds, work.recipe.seed)):
        others = sorted(set(range(count)) - set(fold))
        found = work.once(f"fold {number}", _fold(work, others, fold, number))
        held_out[fold], gradient[fold] = found["losses"], found["cosines"]
    return advice.Signals(held_out, np.asarray(base["losses"]), gradient, neighbours)


def folds(groups: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Places of the rows in `count` parts of about the same size; whole groups. Raises DataError where there are fewer groups."""
    members: dict[str, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    if len(members) < count:
        raise DataError(f"the training rows are of {len(members)} groups, which do not make {count} folds: choose fewer with --folds")
    parts: list[list[int]] = [[] for _ in range(count)]
    for group in sorted(members, key=lambda group: (-len(members[group]), hash_of("fold", seed, group))):
        min(parts, key=len).extend(members[group])
    return [sorted(part) for part in parts]


def _fold(work: _Work, others: Sequence[int], fold: Sequence[int], number: int) -> Callable[[], dict[str, Any]]:
    def after(trained: Trained) -> dict[str, Any]:
        losses = _losses(trained, fold, work.tell)
        rows = training.train_items(trained, fold)
        cosines, norms = training.gradient_cosines(trained, rows, training.validation_items(trained), tell=work.tell)
        return {**trained.facts(), **losses, "cosines": _rounded(cosines), "norms": _rounded(norms)}

    return lambda: work.trainings.run(work.recipe, after, rows=others, title=f"fold {number}")


def _losses(trained: Trained, places: Sequence[int], tell: Tell) -> dict[str, Any]:
    return {"losses": _rounded(training.row_losses(trained, training.train_items(trained, places), tell=tell).means)}


def _rounded(values: Any) -> list[float]:
    return [round(float(one), 6) for one in values]


def _prove(work: _Work, judge: Judge, kept: Sequence[int], plan: ValuePlan) -> dict[str, Any]:
    """Kept rows against as many random ones, with the same seeds; each seed draws other random rows."""
    confidence = work.recipe.evaluation.confidence
    arms, measured = [], []
    for number in range(plan.seeds):
        drawn = np.random.default_rng([work.recipe.seed, number]).permutation(len(work.dataset.train))[: len(kept)]
        for arm, places in ((KEPT, list(kept)), (RANDOM, sorted(drawn.tolist()))):
            name = f"{arm} {len(kept)} {hash_of(places)} seed {number} {judge.title}"
            arms.append(arm)
            measured.append(work.once(name, _arm(work, judge, places, number, f"{arm}, seed {number}")))
    values = [one["value"] for one in measured]
    proof = advice.judge_kept(
        arms, values, judge.draw(measured, seed=work.recipe.seed), lower_is_better=judge.lower_is_better, confidence=confidence, seed=work.recipe.seed
    )  # fmt: skip
    trained = [
        {"arm": arm, "value": one["value"], "validation_loss": one.get("validation_loss")} for arm, one in zip(arms, measured, strict=True)
    ]
    return {**to_json(proof), "trainings": trained}


def _arm(work: _Work, judge: Judge, places: Sequence[int], number: int, title: str) -> Callable[[], dict[str, Any]]:
    recipe = seeded(work.recipe, number)
    return lambda: work.trainings.run(recipe, lambda trained: {**trained.facts(), **judge.measure(trained)}, rows=places, title=title)


# --------------------------------------------------------------------------------------------------------------- answers


def _write_rows(
    job: Run, examples: Sequence[Example], badness: Any, signals: advice.Signals, by_signal: Mapping[str, Any], kept: set[int]
) -> list[dict[str, Any]]:  # fmt: skip
    """value.jsonl and value.csv, the worst row first. Returns the rows."""
    sources = [example.source for example in examples]
    values = {name: read(signals) for name, read in advice.SIGNALS.items() if name in by_signal}
    order = sorted(range(len(examples)), key=lambda place: (-badness[place], -place))
    rows = []
    for rank, place in enumerate(order, 1):
        said = advice.reasons(place, signals, by_signal, sources)
        rows.append(
            {
                "rank": rank,
                "id": examples[place].id,
                "source": sources[place],
                "badness": round(float(badness[place]), 4),
                "kept": place in kept,
                "signals": {name: _number(one[place]) for name, one in values.items() if one is not None},
                "reason": "; ".join(said) or "nothing stands out",
                "question": examples[place].question[:SHOWN_CHARACTERS],
                "answer": examples[place].reference[:SHOWN_CHARACTERS],
            }
        )
    job.write_jsonl(job.value_rows_file, rows)
    job.write_text(job.value_table_file, _table(rows, list(values)))
    return rows


def _number(found: Any) -> float | None:
    return round(float(found), 6) if np.isfinite(found) else None


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """CSV. Texts that a spreadsheet would take for a formula get an apostrophe in front (OWASP, CSV injection)."""
    text = io.StringIO()
    columns = ("rank", "id", "source", "badness", "kept")
    written = csv.writer(text, lineterminator="\n")
    written.writerow([*columns, *names, "reason", "question", "answer"])
    for row in rows:
        texts = [_inert(row[name]) for name in ("reason", "question", "answer")]
        written.writerow(
            [
                *(_inert(row[name]) if isinstance(row[name], str) else row[name] for name in columns),
                *(row["signals"][name] for name in names),
                *texts,
            ]
        )
    return text.getvalue()


def _inert(text: str) -> str:
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") or text[:1] in ("\t", "\r") else text


def sentence(content: Mapping[str, Any]) -> str:
    """What the proof says, as a person would say it."""
    rows, proof, seeds = content["rows"], content["proof"], content["plan"]["seeds"]
    ranked = f"{rows['train']} training rows ranked"
    if proof is None:
        return f"{ranked}; whether training without the worst is better was not tried."
    low, high, difference = proof["low"], proof["high"], proof["difference"]
    if content["lower_is_better"]:
        numbers = f"{difference:+.3f} [{low:+.3f}, {high:+.3f}] nats per token less loss"
    else:
        numbers = f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points"
    measured = (
        f"{numbers}, {seeds} {'training' if seeds == 1 else 'trainings'} each, {rows['judges']} validation rows, {content['metric_title']}"
    )
    arms = f"the {rows['kept']} rows kept against as many random ones"
    said = {
        Verdict.BETTER: f"BETTER: leaving out the worst {rows['train'] - rows['kept']} rows helps. Training on {arms}: {measured}.",
        Verdict.WORSE: f"WORSE: do not leave these rows out, the hard ones are needed. Training on {arms}: {measured}.",
        Verdict.CANT_TELL: f"CAN'T TELL whether leaving out the worst {rows['train'] - rows['kept']} rows helps. Training on {arms}: {measured}.",
    }
    return said[Verdict(proof["verdict"])]
