"""Questions answered by measuring: how much would more data bring, which rows help or hurt.

in          numbers that short trainings brought, row by row; texts of rows
out         an answer with its interval, a sentence, and whether it can be trusted
invariant   pure functions of numbers, texts and a seed; what cannot be told is told as such
"""

from burnish.advice.curve import FRACTIONS, Answer, Fit, answer_curve, fit_curve, nested
from burnish.advice.draws import row_draws, seed_draws
from burnish.advice.neighbours import Neighbours, find_neighbours
from burnish.advice.value import SIGNALS, Proof, Signals, judge_kept, kept_rows, rank_rows, reasons

__all__ = [
    "FRACTIONS", "SIGNALS", "Answer", "Fit", "Neighbours", "Proof", "Signals", "answer_curve", "find_neighbours", "fit_curve", "judge_kept", "kept_rows", "nested", "rank_rows",
    "reasons", "row_draws", "seed_draws",
]  # fmt: skip
