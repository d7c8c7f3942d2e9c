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
