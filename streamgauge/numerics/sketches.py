"""What sketches say: how far two tensors of one shape lie apart, from sixteen numbers of each.

A sketch is s_k = aᵀ_k W b_k with vectors of random signs that depend on the shape alone. For two
tensors of one shape, the sketch of their difference D is the difference of their sketches, and the
mean of s_k² is ‖D‖²_F: how far a tensor moved is seen from two records, whatever the change left
alone of its norm.
"""

from functools import cache

import numpy as np

SKETCHES = 16


HEADS = ("W_Q", "W_K", "W_V", "W_O")


@cache
def signs(length: int, side: int) -> np.ndarray:
    """Random signs, (SKETCHES, length), the same for every axis of this length on this side (0
    left, 1 right).
    """
    # RandomState, because its stream is frozen: sketches must be comparable for years.
    return (
        np.random.RandomState([length % 2**32, side])
        .randint(0, 2, (SKETCHES, length))
        .astype(np.int8)
        * 2
        - 1
    )


def sketch_of_ones(shape: tuple[int, ...]) -> np.ndarray:
    """The sketch of a tensor of ones: a vector counts as a row, a batch of matrices as one below
    the other.
    """
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    return np.asarray(signs(rows, 0).sum(1) * signs(columns, 1).sum(1), float)


def moved(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Distance of tensors by their sketches, (…,): root mean square, which estimates ‖new - old‖_F
    to about a fifth.
    """
    return np.asarray(np.sqrt(((new - old) ** 2).mean(-1)))


def surely_moved(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What ‖new - old‖_F surely exceeds, but for one tensor in 10⁷: a seventh of the fourth largest
    |s_new - s_old| of sixteen, or a fortieth of the largest.

    E s⁸ ≤ 105² ‖D‖⁸ for signs on two sides (Khinchine's inequality for the eighth moment, once a
    side), so |s| > t ‖D‖ has a probability of q = 105² / t⁸ at most (Markov): four of sixteen do
    for t = 7 with one of C(16, 4) q⁴ = 3·10⁻⁸ at most, one of them for t = 40 with 16 q = 3·10⁻⁸.
    The largest counts because two rows that changed places leave every sketch with equal signs
    there as it was.
    """
    sizes = np.sort(np.abs(new - old), axis=-1)
    return np.asarray(np.maximum(sizes[..., -4] / 7, sizes[..., -1] / 40))


def factor(old: np.ndarray, new: np.ndarray) -> tuple[float, float]:
    """The factor c that brings a tensor closest to another, by sketches, and what is left, relative
    to it.
    """
    size = float(old @ old)
    if size == 0:
        return float("nan"), float("inf")
    c = float(new @ old) / size
    return c, float(np.linalg.norm(new - c * old) / np.linalg.norm(old))
