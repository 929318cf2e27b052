"""The repair, in order of cost: less of the adapter, then trainings that forget less. REPAIRS is the table.

    scale     the trained weights at a share of their strength: no training
    replay    general rows mixed in              kl      held near the base
    layers    only the upper half of the layers  rank    a quarter of the rank

Each training is a run of its own in RUN/retain/NAME, of the run's recipe changed in that one respect. All points are compared on validation rows and on one half of the rows of
each suite; the chosen one is told on the test rows and on the other half.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish import training
from burnish.advice import Pair, Point, change_interval, choose, compare_points, halves, judge_gate, next_scale
from burnish.errors import BurnishError, DataError, RecipeError
from burnish.evaluation import Measured, TaskRows, openings
from burnish.models import Limits, generate, layer_count, publish_scaled, tokens_of, trained_hash, verify_adapter, weights_hash
from burnish.pipeline.retention import Bench, RetainOptions, State, pairs_of
from burnish.pipeline.steps import PROBE_ROWS, prepare, train_once
from burnish.recipe import Recipe, build_recipe, differences, load_recipe
from burnish.run import Run
from burnish.tasks import bootstrap_interval
from burnish.types import Dataset

SuiteRows = dict[str, dict[str, Measured]]

KL_WEIGHT, MORE_KL = 0.1, 3.0  # nats per nat; where the recipe has a weight already, so many times that
MORE_REPLAY, MOST_REPLAY = 2.0, 0.5  # likewise: so many times the share, up to half of the rows
RANK_DIVISOR = 4
REFINEMENTS = 2  # scales besides those asked for: each halves the span in which the smallest that keeps enough must lie
REPLAY_TOKENS = 64  # of each answer that the base writes for replay


def _replay(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    settings = recipe.training
    if settings.replay_data is not None and bench.options.replay_data is None:
        share = min(MOST_REPLAY, MORE_REPLAY * settings.replay_fraction)
        if share <= settings.replay_fraction:
            raise RecipeError("half of the rows are replayed already")
        return {"training.replay_fraction": share}
    return {"training.replay_data": bench.options.replay_data or str(_written_by_the_base(bench).resolve())}


def _kl(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    weight = recipe.training.kl_weight
    return {"training.kl_weight": MORE_KL * weight if weight else KL_WEIGHT}


def _layers(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    count = layer_count(recipe.model.name)
    if recipe.training.layers != "all":
        raise RecipeError(f"training.layers is {recipe.training.layers} already: choose fewer in a recipe of your own")
    if count < 2:
        raise RecipeError("the model has one layer")
    return {"training.layers": f"last-{count // 2}"}


def _rank(recipe: Recipe, bench: Bench) -> dict[str, Any]:
    rank = recipe.lora.rank
    if recipe.training.method == "full":
        raise RecipeError("training.method full has no rank")
    if rank < RANK_DIVISOR:
        raise RecipeError(f"lora.rank is {rank} already")
    # The scale alpha ÷ rank is held: a lower rank is the one respect in which this training differs.
    return {"lora.rank": rank // RANK_DIVISOR, "lora.alpha": recipe.lora.alpha * (rank // RANK_DIVISOR) / rank}


@dataclass(frozen=True, slots=True)
class Repair:
    title: str
    change: Callable[[Recipe, Bench], dict[str, Any]] | None  # none: no training
    cost: float = 1.0  # of the training, in trainings of the run


REPAIRS: dict[str, Repair] = {
    "scale": Repair("the adapter at a share of its strength", None, 0.0),
    "replay": Repair("general rows mixed in", _replay, 1.1),
    "kl": Repair("held near the base by a KL term", _kl, 1.4),
    "layers": Repair("the upper half of the layers", _layers),
    "rank": Repair("a quarter of the rank", _rank),
}


def check_repairs(options: RetainOptions) -> None:
    """Refuse what is no repair, before anything is measured."""
    if unknown := [name for name in options.repairs if name not in REPAIRS]:
        raise RecipeError(f"--try {unknown[0]}: expected some of {', '.join(REPAIRS)}, separated by commas")
    if bad := [scale for scale in options.scales if not 0 < scale <= 2]:
        raise RecipeError(f"--scales {bad[0]:g}: expected numbers above 0 (the base) up to 2 (twice what was trained)")
    if options.replay_data is not None and not Path(options.replay_data).exists():
        raise RecipeError(f"--replay-data {options.replay_data}: no such file")


@dataclass(slots=True)
class _Selection:
    """The rows for choosing."""

    bench: Bench
    half: dict[str, frozenset[str]]
    before: SuiteRows
    judging: Mapping[str, Any]
    points: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    states: dict[str, State]
    began: float

    def measure(self, state: State, kind: str, **facts: Any) -> None:
        """Add a point."""
        started = time.monotonic()
        values = list(self.bench.task_values(state, "validation").values())
        if not values:
            raise DataError("no validation row can be scored: there is no gain to be kept")
        pairs = pairs_of(self.bench.suites, self.before, self.bench.suite_rows(state, self.half), self.half)
        low, high = bootstrap_interval(values, **self.judging)
        change = _change(state.name, pairs, self.judging)
        task = {"task": float(np.mean(values)), "task_low": low, "task_high": high, "task_rows": len(values)}
        self.points.append({"name": state.name, "kind": kind, **facts, **task, **change, "seconds": round(time.monotonic() - started, 1)})
        self.states[state.name] = state
        self.bench.tell(f"point {state.name}", 0, 0, f"task {task['task']:.4f}, retention {100 * change['change']:+.1f} points")

    def fits(self, seconds: float = 0.0) -> bool:
        """Whether the budget has room for so many more."""
        budget = self.bench.options.budget_seconds
        return budget is None or time.monotonic() - self.began + seconds <= budget

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append({"name": name, "reason": reason})
        self.bench.tell(f"left out: {name}", 0, 0, reason)


def repair(bench: Bench, before: SuiteRows, after: SuiteRows, *, judging: Mapping[str, Any], max_drop: float | None) -> dict[str, Any]:
    """Make points, choose one, tell it on rows that nothing was chosen on, publish it. Returns what retain.json holds under `repair`."""
    parts = {suite.name: halves(list(before[suite.name])) for suite in bench.suites}
    chosen_on = {name: part[0] for name, part in parts.items()}
    seen = _Selection(bench, chosen_on, before, judging, [], [], {}, time.monotonic())
    seen.measure(bench.base, "base")
    seen.measure(bench.tuned, "tuned")
    for name in (name for name in REPAIRS if name in bench.options.repairs):
        if REPAIRS[name].change is None:
            _scales(seen)
        else:
            _train(seen, name)
    found = choose([Point(point["name"], point["task"], point["change"]) for point in seen.points])
    for point in seen.points:
        point |= {f"{what}_kept": found["kept"][point["name"]][what] for what in ("gain", "loss")}
    told = _told(seen, found["chosen"], {name: part[1] for name, part in parts.items()}, max_drop)
    content = {
        "rule": found["rule"], "chosen": found["chosen"], "why": found["why"], "task_title": _task_title(bench), "task_percent": bench.task is not None,
        "points": seen.points, "left_out": seen.left_out, **told, "published": _publish(seen, found["chosen"]),
        "rows": {"validation": seen.points[0]["task_rows"], "test": told["task"]["rows"], "choosing": sum(map(len, chosen_on.values()))},
    }  # fmt: skip
    content["sentence"] = repair_sentence(content)
    return content


def _scales(seen: _Selection) -> None:
    """The scales asked for, the nearest to 1 first; then REFINEMENTS more, where the smallest that keeps enough of the gain must lie."""
    for scale in sorted({scale for scale in seen.bench.options.scales if scale != 1}, key=lambda scale: (scale > 1, abs(1 - scale))):
        if not _scale(seen, scale):
            return
    for _ in range(REFINEMENTS):
        tasks = {point["name"]: point["task"] for point in seen.points}
        gain = tasks["tuned"] - tasks["base"]
        measured = (
            {point["scale"]: (point["task"] - tasks["base"]) / gain for point in seen.points if point["kind"] == "scale"}
            if gain > 0
            else {}
        )
        further = next_scale({**measured, 1.0: 1.0}) if measured else None
        if further is None or not seen.fits() or not _scale(seen, further):
            return


def _scale(seen: _Selection, scale: float) -> bool:
    """Measure one scale. False: this adapter cannot be scaled."""
    if not seen.fits():
        seen.leave_out(f"scale {scale:g}", "the time is up")
        return True
    try:
        seen.measure(seen.bench.at(scale), "scale", scale=scale)
    except BurnishError as problem:
        if "cannot be scaled" not in str(problem):
            raise
        seen.leave_out("scale", str(problem))
        return False
    return True


def _train(seen: _Selection, name: str) -> None:
    """A training of its own with the recipe changed in one respect, and its point."""
    bench, job = seen.bench, seen.bench.job
    asked = job.recipe_as_asked()
    expected = REPAIRS[name].cost * float(job.read_json(job.training_file)["seconds"])
    done = (job.retain_folder / name / "adapter" / "burnish.json").exists()
    try:
        if asked.stages:
            raise RecipeError("the run is a chain of stages; train its last stage again in a recipe of its own")
        if not done and not seen.fits(expected):
            raise RecipeError(f"the training would take about {expected / 60:.0f} minutes, more than the budget has left")
        changes = REPAIRS[name].change(job.recipe(), bench)  # type: ignore[misc]
        recipe = _changed(job, asked, changes)
    except RecipeError as problem:
        seen.leave_out(name, str(problem).replace("\n", " ")[:300])
        return
    bench.release()
    folder = job.retain_folder / name
    stale = (folder / "recipe.yaml").exists() and bool(differences(load_recipe(folder / "recipe.yaml"), recipe))
    with Run.working(folder, recipe, fresh=stale) as place:
        rows = prepare(place, chat=bench.chat, tell=_titled(name, bench))
        _refuse_other_rows(rows, bench.dataset, name)
        summary = train_once(place, dataset=rows, chat=bench.chat, tell=_titled(name, bench))
    facts = {"changed": changes, "training_seconds": summary["seconds"], "folder": str(folder)}
    seen.measure(bench.trained(name, place.recipe(), place.adapter_folder), name, **facts)


def _changed(job: Run, asked: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The run's recipe with these values; the learning rate is the run's, though it was found by a test."""
    content = asked.to_dict() | {"retain": {"suites": None, "max_drop": None}}
    content["training"]["learning_rate"] = job.recipe().training.learning_rate
    for key, value in changes.items():
        section, leaf = key.split(".")
        content[section][leaf] = value
    return build_recipe(content, origin="repair")


def _refuse_other_rows(rows: Dataset, own: Dataset, name: str) -> None:
    for split in ("validation", "test"):
        if {row.id for row in getattr(rows, split)} != {row.id for row in getattr(own, split)}:
            raise DataError(
                f"repair {name}: the {split} rows are not the run's: its source has changed since. Run the recipe anew with --fresh"
            )


def _written_by_the_base(bench: Bench) -> Path:
    """Rows for replay that need no data: what the base itself answers to general questions (they are in no suite)."""
    path = bench.job.replay_file
    if path.exists():
        return path
    asked = openings()
    prompts = [bench.chat.prompt_ids([{"role": "user", "content": text}]) for text in asked]
    answers: dict[int, str] = {}
    for batch in generate(
        bench.base.model(),
        bench.chat,
        prompts,
        Limits(REPLAY_TOKENS),
        batch_size=bench.ground.batch_size,
        tell=_titled("replay rows by the base", bench),
    ):
        answers |= {index: answer.text for index, answer in batch}
    rows = [{"prompt": text, "completion": answers[index]} for index, text in enumerate(asked) if answers[index].strip()]
    if not rows:
        raise RecipeError("the base model answers nothing to general questions: give rows with --replay-data")
    bench.job.write_jsonl(path, rows)
    return path


def _told(seen: _Selection, chosen: str, half: dict[str, frozenset[str]], max_drop: float | None) -> dict[str, Any]:
    """Base, tuned and the chosen point on the test rows and on the other half of each suite's."""
    bench = seen.bench
    names = list(dict.fromkeys(("base", "tuned", chosen)))
    suites = {name: bench.suite_rows(seen.states[name], half) for name in names}
    tasks = {name: bench.task_values(seen.states[name], "test") for name in names}
    rows = list(tasks["base"])
    values = {name: [tasks[name][row] for row in rows] for name in names}
    pairs = {name: pairs_of(bench.suites, suites["base"], suites[name], half) for name in names}
    points = {}
    for name in names:
        low, high = bootstrap_interval(values[name], **seen.judging)
        change = _change(name, pairs[name], seen.judging)
        points[name] = {"task": float(np.mean(values[name])), "task_low": low, "task_high": high, **change}
    shares = compare_points((values["base"], values["tuned"], values[chosen]), (pairs["tuned"], pairs[chosen]), **seen.judging)
    gate = None if max_drop is None or chosen == "tuned" else judge_gate(pairs[chosen], max_drop, **seen.judging)
    return {"reported": points, **shares, "task": {"rows": len(rows)}, "gate": gate}


def _change(name: str, pairs: Sequence[Pair], judging: Mapping[str, Any]) -> dict[str, float]:
    """The change against the base with its interval; the base itself did not change, and that is certain."""
    found = (0.0, 0.0, 0.0) if name == "base" else change_interval(pairs, **judging)
    return dict(zip(("change", "change_low", "change_high"), found, strict=True))


def _publish(seen: _Selection, chosen: str) -> dict[str, Any] | None:
    """The chosen adapter as RUN/adapter-repaired; None where it is the tuned model or the base."""
    bench, folder = seen.bench, seen.bench.job.repaired_folder
    point = next(point for point in seen.points if point["name"] == chosen)
    if point["kind"] in ("base", "tuned"):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if point["kind"] == "scale":
        rows = bench.dataset.validation or tuple(bench.dataset.train[:PROBE_ROWS])
        probe = [tokens.input_ids for example in rows[:PROBE_ROWS] for tokens in tokens_of(bench.chat, example, bench.recipe)]
        found = publish_scaled(bench.scaled, point["scale"], bench.chat, folder, probe)
        proof = {"probe_tokens": found.probe_tokens, "logits_error": found.error, "logits_spread": found.spread, "scale": found.scale}
        return {"folder": str(folder), "adapter_sha256": found.sha256, **proof}
    training.adopt(folder, Run(point["folder"]).adapter_folder)
    manifest = verify_adapter(folder, weights_hash(bench.recipe.model.name))
    return {"folder": str(folder), "adapter_sha256": trained_hash(manifest)}


def repair_sentence(content: Mapping[str, Any]) -> str:
    """What the repair brought, as a person would say it."""
    if content["chosen"] == "tuned":
        return f"Nothing is repaired: {content['why']}."
    told = content["reported"][content["chosen"]]
    tuned = content["reported"]["tuned"]
    unit = 100 if content["task_percent"] else 1
    rows = f"{content['task']['rows']} test rows and the half of the suites' rows that it was not chosen on"
    return (
        f"{content['chosen']} keeps {_share(content['gain_kept'])} of the gain with {_share(content['loss_kept'])} of the loss, on {rows}: task {unit * told['task']:.3g} "
        f"(tuned {unit * tuned['task']:.3g}), retention {100 * told['change']:+.1f} points (tuned {100 * tuned['change']:+.1f})."
    )


def _share(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "an unknown share"
    interval = f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]" if found["low"] is not None else " (too uncertain for an interval)"
    return f"{100 * found['value']:.0f} %{interval}"


def _task_title(bench: Bench) -> str:
    return TaskRows(bench.dataset, (), bench.recipe, bench.chat, bench.task, bench.job.retain_rows_file).title


def _titled(name: str, bench: Bench) -> Callable[[str, int, int, str], None]:
    return lambda what, done, total, detail: bench.tell(f"{name}: {what}", done, total, detail)
