"""Questions answered by measuring.

in          what the steps of a run measured, on rows that no choice was made on; seconds and bytes of a few steps and answers
out         Advice: what to do, the reason with its numbers, what would change it; a forecast with a range, part by part
invariant   a rule reads numbers with intervals and nothing else; "no" and "can't tell" are answers; what is assumed is said beside what was measured
"""

from burnish.advice.bases import choose_base
from burnish.advice.decide import decide
from burnish.advice.estimate import Estimate, Forecast, forecast_here
from burnish.advice.gpus import GPUS, find_gpu, forecast_on
from burnish.advice.rules import OF_USE, RULES, Facts, Rule

__all__ = [
    "GPUS", "OF_USE", "RULES", "Estimate", "Facts", "Forecast", "Rule", "choose_base", "decide", "find_gpu", "forecast_here", "forecast_on",
]  # fmt: skip
