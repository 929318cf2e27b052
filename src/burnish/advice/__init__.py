"""Questions answered by measuring.

in          what the steps of a run measured, on rows that no choice was made on
out         Advice: what to do, the reason with its numbers, what would change it
invariant   a rule reads numbers with intervals and nothing else; "no" and "can't tell" are answers
"""

from burnish.advice.bases import choose_base
from burnish.advice.decide import decide
from burnish.advice.rules import OF_USE, RULES, Facts, Rule

__all__ = ["OF_USE", "RULES", "Facts", "Rule", "choose_base", "decide"]
