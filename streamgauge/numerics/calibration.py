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
    values: np.ndarray, level: float, *, ratios: bool = False
) -> tuple[float, float]:
    """Where another value lies but for a chance of `level`, half of it on either side: Student's t
    for one more draw of a normal distribution (Hahn and Meeker 1991, §4.7).

    ratios: whether they are rates, ratios or norms, which are positive by what they are; their
    logarithms are taken then.
    """
    if ratios:
        low, high = _interval(np.log(values), level)
        return float(np.exp(low)), float(np.exp(high))
    return _interval(values, level)


def _interval(values: np.ndarray, level: float) -> tuple[float, float]:
    n = len(values)
    reach = quantile(1 - level / 2, n - 1) * values.std(ddof=1) * (1 + 1 / n) ** 0.5
    return float(values.mean() - reach), float(values.mean() + reach)


def calibrated(values: np.ndarray, level: float, *, ratios: bool = False) -> Calibrated:
    """The interval of a law's values, one by checkpoint, and its check by leaving each out."""
    outside = []
    for n in range(len(values)):
        low, high = prediction_interval(np.delete(values, n), level, ratios=ratios)
        if not low <= values[n] <= high:
            outside.append(n)
    return Calibrated(*prediction_interval(values, level, ratios=ratios), tuple(outside))
