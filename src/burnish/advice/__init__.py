"""Questions answered by measuring.

in          what the steps of a run measured, on rows that no choice was made on; seconds and bytes of a few steps and answers
out         Advice: what to do, the reason with its numbers, what would change it; a forecast with a range, part by part
invariant   a rule reads numbers with intervals and nothing else; "no" and "can't tell" are answers; what is assumed is said beside what was measured
"""

from burnish.advice.bases import choose_base
from burnish.advice.curve import FRACTIONS, Answer, Fit, answer_curve, fit_curve, nested
from burnish.advice.decide import decide
from burnish.advice.draws import row_draws, seed_draws
from burnish.advice.estimate import Estimate, Forecast, forecast_here
from burnish.advice.gpus import GPUS, find_gpu, forecast_on
from burnish.advice.neighbours import Neighbours, find_neighbours
from burnish.advice.repair import ENOUGH_GAIN, RULE, Point, choose, compare_points, next_scale
from burnish.advice.retain import Gate, Pair, change_interval, halves, judge_gate, judge_retention, retention_sentence
from burnish.advice.rules import OF_USE, RULES, Facts, Rule
from burnish.advice.value import SIGNALS, Proof, Signals, judge_kept, kept_rows, rank_rows, reasons

__all__ = [
    "ENOUGH_GAIN", "FRACTIONS", "GPUS", "OF_USE", "RULE", "RULES", "SIGNALS", "Answer", "Estimate", "Facts", "Fit", "Forecast", "Gate", "Neighbours",
    "Pair", "Point", "Proof", "Rule", "Signals", "answer_curve", "change_interval", "choose", "choose_base", "compare_points", "decide", "find_gpu",
    "find_neighbours", "fit_curve", "forecast_here", "forecast_on", "halves", "judge_gate", "judge_kept", "judge_retention", "kept_rows", "nested",
    "next_scale", "rank_rows", "reasons", "retention_sentence", "row_draws", "seed_draws",
]  # fmt: skip
