"""How far rounding to a grid of few bits moves a tensor."""

import math
from collections.abc import Sequence

import numpy as np

MARGIN = 1.5  # for scales that are rounded themselves, and levels that are not all used
ROWS = 2048  # of a matrix that are looked at at once


def even_grid(values: np.ndarray, bits: int, block: int, margin: float = MARGIN) -> float:
    """How far rounding to 2^bits steps, as wide as each block of numbers, moves a tensor, relative
    to its norm, times a margin.

    A grid that reaches from -p to p, p the largest absolute number of the block, has steps of
    2 p / (2^bits - 2) at most, and rounding to the nearest is off by step / √12, root mean square
    (uniform noise, Widrow 1956). values: the rounded numbers, (…, n), blocks along the last axis;
    0 for a tensor of zeros.
    """
    step = 2 / ((1 << bits) - 2)
    return margin * _of_peaks(values, step / math.sqrt(12), block)


def uneven_grid(values: np.ndarray, levels: Sequence[float], block: int) -> float:
    """The same of a grid of levels, ends included, from the block's largest number downwards and up
    again: each as likely as every other, as such grids are made.
    """
    gaps = np.diff(np.sort(np.asarray(levels, float)))
    return _of_peaks(values, float(np.sqrt((gaps**2).mean() / 12)), block) * MARGIN


def without_grid(rate: float) -> float:
    """The same of formats that round many numbers together, of so many bits a number: what no code
    of that rate goes below for Gaussian numbers, 2^-rate (Shannon 1959), twice.
    """
    return float(2 * 2.0**-rate)


def _of_peaks(values: np.ndarray, share: float, block: int) -> float:
    """The norm of each block's largest number, for each of its numbers, times a share, relative to
    that of the tensor.
    """
    flat = np.asarray(values).reshape(-1, values.shape[-1])
    starts = np.arange(0, flat.shape[1], block)
    widths = np.diff([*starts, flat.shape[1]])
    steps = total = 0.0
    for first in range(0, len(flat), ROWS):  # no copy of a large table
        rows = np.abs(flat[first : first + ROWS].astype(np.float64))
        peaks = np.maximum.reduceat(rows, starts, axis=1)
        steps, total = steps + float((peaks**2 @ widths).sum()), total + float((rows**2).sum())
    return float(np.sqrt(steps / total) * share) if total else 0.0


def float_grid(values: np.ndarray, mantissa: int, smallest: float) -> float:
    """The same of a float format: half a step of so many bits of mantissa, and of its smallest
    numbers. smallest: root mean square of half the smallest step, over the tensor's numbers.
    """
    norm = float(np.linalg.norm(np.asarray(values, np.float32)))
    return float(2.0 ** -(mantissa + 1) + smallest * np.sqrt(values.size) / norm) if norm else 0.0
