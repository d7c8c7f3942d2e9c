"""How far rounding to a grid of few bits can move a tensor."""

import numpy as np


def even_grid(values: np.ndarray, bits: int, block: int) -> float:
    """The most that rounding to 2^bits steps, as wide as each block of numbers, can have moved a
    tensor, relative to its norm.

    A grid that reaches from -p to p in 2^bits - 1 steps is p / (2^bits - 1) from any number between
    at most, p the largest absolute number of the block; narrower grids are finer. values: the
    rounded numbers, (…, n), blocks along the last axis; 0 for a tensor of zeros.
    """
    flat = np.abs(np.asarray(values, np.float32)).reshape(-1, values.shape[-1])
    norm = float(np.linalg.norm(flat))
    if not norm:
        return 0.0
    starts = np.arange(0, flat.shape[1], block)
    widths = np.diff([*starts, flat.shape[1]])
    peaks = np.maximum.reduceat(flat, starts, axis=1)
    return float(np.sqrt((peaks.astype(np.float64) ** 2 @ widths).sum()) / (2**bits - 1) / norm)


def float_grid(values: np.ndarray, mantissa: int, smallest: float) -> float:
    """The same of a float format: half a step of so many bits of mantissa, and of its smallest
    numbers. smallest: root mean square of half the smallest step, over the tensor's numbers.
    """
    norm = float(np.linalg.norm(np.asarray(values, np.float32)))
    return float(2.0 ** -(mantissa + 1) + smallest * np.sqrt(values.size) / norm) if norm else 0.0
