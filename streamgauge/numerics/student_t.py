"""Quantiles of Student's t distribution, for laws about a stored record: scipy's take a fifth of a
second to import.
"""

import math


def quantile(level: float, freedom: int) -> float:
    """Where the distribution function reaches `level`, in (0, 1), to fp64's rounding of it."""
    low, high = -math.pi / 2, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _below(middle, freedom) < level else (low, middle)
    return math.tan(middle) * math.sqrt(freedom)


def _below(angle: float, freedom: int) -> float:
    """The distribution function at t = √freedom · tan(angle): a finite sum (Abramowitz and Stegun
    1964, 26.7.3 and 26.7.4).
    """
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for j in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (j - 1) / j
        total += term
    central = math.sin(angle) * total
    return (1 + (2 / math.pi * (angle + central) if odd else central)) / 2
