"""What rounding does to numbers in fp32."""

import numpy as np

UNIT = 2.0**-24  # largest relative error of one rounding of fp32
STEPS = 8  # of a block: products and norms, one after the other, each a sum of d_model terms


def other_order(gain: np.ndarray, d_model: int) -> np.ndarray:
    """By how much a block's output may differ, relatively, when its sums are added up in another
    order: (n_layers,).

    Such a sum of d_model terms is off by a relative √d_model roundings (Higham 2002, §4.2), which
    is a change of what the next step reads. gain: by how much a block enlarges a relative change of
    its input; where it makes it smaller, the last step's own rounding is left.
    """
    return np.asarray(STEPS * np.sqrt(d_model) * UNIT * np.maximum(gain, 1.0))


def additivity_rounding(terms: int) -> float:
    """Of resid_pre and so many outputs of sublayers: an addition a term and a scaling in the block,
    as many subtractions and two norms in ours.
    """
    return (4 + 2 * max(terms, 2)) * UNIT


def contribution_rounding(d_model: int) -> float:
    """Of norms, each the root of a sum of d_model squares (Higham 2002, §4.2)."""
    return d_model * UNIT


def scale_rounding(d_model: int, shift: float) -> float:
    """Of a norm: shift, mean and variance are sums of d_model terms up to 1 + shift root mean
    squares (Higham 2002, §4.2).
    """
    return 3 * d_model * UNIT * (1 + shift)


def beyond_contributions(pre: np.ndarray, post: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """By how much a norm changes beyond what was added, relatively: norms of resid_pre and
    resid_post, and the sum of those of what the block adds.
    """
    # A zero vector to which nothing is added stays one: 0 / 0 is 0 here.
    size = np.maximum(pre + outputs, np.finfo(float).tiny)
    return np.asarray((np.abs(post - pre) - outputs) / size)
