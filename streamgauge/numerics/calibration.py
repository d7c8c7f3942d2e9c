"""Bands from sound checkpoints: where another one of their kind will lie."""

from dataclasses import dataclass

import numpy as np

from streamgauge.numerics.student_t import quantile

LEAST = 4  # checkpoints; of three the interval is a hundred times their spread and excludes nothing


@dataclass(frozen=True)
class Calibrated:
    """A law's interval for another checkpoint, and which of the given ones would have lain outside
    of what the others give.
    """

    low: float
    high: float
    outside: tuple[int, ...]


def prediction_interval(
    values: np.ndarray, level: float, *, ratios: bool = False, above: bool = False
) -> tuple[float, float]:
    """Where another value lies but for a chance of `level`, half of it on either side: Student's t
    for one more draw of a normal distribution (Hahn and Meeker 1991, §4.7).

    ratios: whether they are rates, ratios or norms, which are positive by what they are; their
    logarithms are taken then. above: whether only a value above is wrong, which has all the chance.
    """
    if ratios:
        low, high = prediction_interval(np.log(values), level, above=above)
        return float(np.exp(low)), float(np.exp(high))
    n = len(values)
    tail = level if above else level / 2
    reach = quantile(1 - tail, n - 1) * values.std(ddof=1) * (1 + 1 / n) ** 0.5
    low = -np.inf if above else float(values.mean() - reach)
    return low, float(values.mean() + reach)


def calibrated(
    values: np.ndarray, level: float, *, ratios: bool = False, above: bool = False
) -> Calibrated:
    """The interval of a law's values, one by checkpoint, and its check by leaving each out."""
    outside = []
    for n in range(len(values)):
        others = np.delete(values, n)
        low, high = prediction_interval(others, level, ratios=ratios, above=above)
        if not low <= values[n] <= high:
            outside.append(n)
    interval = prediction_interval(values, level, ratios=ratios, above=above)
    return Calibrated(*interval, tuple(outside))
