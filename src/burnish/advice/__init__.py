"""Advice: questions answered by measuring.

in          numbers that were measured: values of rows, seconds, bytes
out         a verdict or a choice, with an interval, the rule by which it was made, and a sentence
invariant   pure functions of numbers and a seed; what the numbers cannot tell is said to be so
"""

from burnish.advice.repair import ENOUGH_GAIN, RULE, Point, choose, compare_points, next_scale
from burnish.advice.retain import Gate, Pair, change_interval, halves, judge_gate, judge_retention, retention_sentence

__all__ = [
    "ENOUGH_GAIN", "RULE", "Gate", "Pair", "Point", "change_interval", "choose", "compare_points", "halves", "judge_gate", "judge_retention", "next_scale",
    "retention_sentence",
]  # fmt: skip
