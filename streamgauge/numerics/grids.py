"""How far rounding to a grid of few bits can move a tensor."""

import numpy as np

ROWS = 2048  # of a matrix that are looked at at once


def even_grid(values: np.ndarray, bits: int, block: int) -> float:
    """The most that rounding to 2^bits steps, as wide as each block of numbers, can have moved a
    tensor, relative to its norm.

    A grid that reaches from -p to p in 2^bits - 1 steps is p / (2^bits - 1) from any number between
    at most, p the largest absolute number of the block; narrower grids are finer. values: the
    rounded numbers, (…, n), blocks along the last axis; 0 for a tensor of zeros.
    """
    flat = np.asarray(values).reshape(-1, values.shape[-1])
    starts = np.arange(0, flat.shape[1], block)
    widths = np.diff([*starts, flat.shape[1]])
    steps = total = 0.0
    for first in range(0, len(flat), ROWS):  # no copy of a large table
        rows = np.abs(flat[first : first + ROWS].astype(np.float64))
        peaks = np.maximum.reduceat(rows, starts, axis=1)
        steps, total = steps + float((peaks**2 @ widths).sum()), total + float((rows**2).sum())
    return float(np.sqrt(steps / total) / (2**bits - 1)) if total else 0.0


def float_grid(values: np.ndarray, mantissa: int, smallest: float) -> float:
    """The same of a float format: half a step of so many bits of mantissa, and of its smallest
    numbers. smallest: root mean square of half the smallest step, over the tensor's numbers.
    """
    norm = float(np.linalg.norm(np.asarray(values, np.float32)))
    return float(2.0 ** -(mantissa + 1) + smallest * np.sqrt(values.size) / norm) if norm else 0.0
