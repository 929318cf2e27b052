"""What a run will cost, from what a probe measured: seconds for each step, money, memory part by part, and a range.

prepare      measured: the rows are prepared before the probe
baselines    the base read, every setting answered on the selection rows, every candidate on the test rows (evaluation/speed.py)
train        steps × seconds of a step, validations, what comes before the first step (training/measure.py)
evaluate     base and adapter read, the test rows answered by the tuned model
compare      and the report: no model is needed; an allowance
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from burnish.evaluation import AnswerCost
from burnish.training import StepTimes

# The same step took up to so much more or less a minute later on a shared machine of two cores; no forecast is narrower.
NOISE = 0.10
# Answers end where a model ends them, and its prompts are chosen later: beyond the cheapest and the dearest setting, so much of them.
ANSWER_NOISE = 0.20
# Of 150 to 500 test rows it took 0.2 to 2 s, of BLEU and chrF some seconds more.
COMPARE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """For one machine. `memory` has the parts in bytes, and `total`: their sum."""

    machine: str
    measured: bool  # on this machine, or reckoned from a table
    seconds: dict[str, float]  # step → seconds
    low_seconds: float  # of all steps together
    high_seconds: float
    step_seconds: float  # one optimizer update
    steps: int
    memory: dict[str, int]
    memory_available: int  # bytes of the machine or of the GPU
    assumptions: tuple[str, ...]
    price_per_hour: float | None = None

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return self.memory["total"] <= self.memory_available

    def money(self) -> dict[str, float] | None:
        """In the price's own currency: expected, low, high. None where no price was given."""
        if self.price_per_hour is None:
            return None
        hours = {"expected": self.total_seconds, "low": self.low_seconds, "high": self.high_seconds}
        return {name: round(seconds / 3600 * self.price_per_hour, 4) for name, seconds in hours.items()}

    def to_dict(self) -> dict[str, Any]:
        """What estimate.json holds of it; seconds to the millisecond."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        ends = {"total_seconds": self.total_seconds, "low_seconds": self.low_seconds, "high_seconds": self.high_seconds}
        return {
            **asdict(self),
            "seconds": seconds,
            **{name: round(value, 3) for name, value in ends.items()},
            "step_seconds": round(self.step_seconds, 4),
            "fits": self.fits,
            "money": self.money(),
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """The forecast for this machine, from a probe; that for a GPU of the table, where one was asked for; what the test rows can show."""

    here: Forecast
    elsewhere: Forecast | None
    test_rows: int
    detectable_difference: float | None  # as a fraction; None: no difference at all, or plain text
    probe_seconds: float
    probe: Mapping[str, Any]  # what was measured, for who wants to reckon differently

    def to_dict(self) -> dict[str, Any]:
        return {
            "here": self.here.to_dict(),
            "elsewhere": None if self.elsewhere is None else self.elsewhere.to_dict(),
            "test_rows": self.test_rows,
            "detectable_difference": self.detectable_difference,
            "probe_seconds": round(self.probe_seconds, 1),
            "probe": dict(self.probe),
        }


def forecast_here(
    steps: StepTimes | None,
    answers: AnswerCost,
    *,
    prepare_seconds: float,
    machine: str,
    memory_available: int,
    peak_bytes: int,
    price_per_hour: float | None = None,
) -> Forecast:
    """From what was measured on this machine. `steps` is None where nothing is trained.

    `peak_bytes`: the largest that the probe's process held. What the counted parts do not explain of it (the interpreter, libraries, a model while it
    is read, answers) is the part `everything_else`, so that the parts add up to what a run of this recipe will hold.
    """
    train = 0.0 if steps is None else steps.training_seconds
    tuned = answers.tuned > 0
    seconds = {
        "prepare": prepare_seconds,
        "baselines": answers.load_seconds + answers.baselines,
        "train": train,
        "evaluate": answers.load_seconds + answers.tuned if tuned else 0.0,
        "compare": COMPARE_SECONDS,
    }
    fixed = prepare_seconds + seconds["compare"] + answers.load_seconds * (2 if tuned else 1)
    part = NOISE + (0.0 if steps is None else steps.spread)
    parts = (
        {} if steps is None else {name: value for name, value in steps.memory.to_dict().items() if name not in ("total", "largest_tokens")}
    )
    parts["everything_else"] = max(0, peak_bytes - sum(parts.values()))
    return Forecast(
        machine=machine,
        measured=True,
        seconds=seconds,
        low_seconds=(1 - NOISE) * fixed + (1 - part) * train + (1 - ANSWER_NOISE) * answers.low,
        high_seconds=(1 + NOISE) * fixed + (1 + part) * train + (1 + ANSWER_NOISE) * answers.high,
        step_seconds=0.0 if steps is None else steps.seconds_per_step,
        steps=0 if steps is None else steps.steps,
        memory={**parts, "total": sum(parts.values())},
        memory_available=memory_available,
        assumptions=(
            "the machine stays as busy as it was during the probe",
            "untrained candidates answer the test rows with the mean of the settings that are tried",
            "the tuned model's answers are as long as the references",
            "no early stopping, no resume",
        ),
        price_per_hour=price_per_hour,
    )
