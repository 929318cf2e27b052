"""Questions answered by measuring.

in          numbers that were measured: seconds and bytes of a few steps and answers
out         a forecast with a range, part by part
invariant   pure functions of numbers; what is assumed is said beside what was measured
"""

from burnish.advice.estimate import Estimate, Forecast, forecast_here
from burnish.advice.gpus import GPUS, find_gpu, forecast_on

__all__ = ["GPUS", "Estimate", "Forecast", "find_gpu", "forecast_here", "forecast_on"]
