"""The Frobenius norm of W_OV is the root-mean-square response to random input.

For x Gaussian, normalised to mean 0 and variance 1 over d coordinates, E‖x W‖² = d/(d-1) · ‖W‖²_F
for W centred on its reading side; for x normalised to unit RMS (RMSNorm models) E‖x W‖² = ‖W‖²_F.
Every head of every layer is held to it, on inputs of its layer's own; the tolerance follows from
the sample count, a false-alarm rate of 1e-6 a model, and what rounding does to squared norms of
W_OV.
Source: footnote 5 of Heimersheim and Turner 2023 asked; second moments of the sphere answer.
Tolerance: Laurent and Massart 2000, lemma 1.
Applies to: every model whose W_V and W_O lie in its files as matrices.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import between
from streamgauge.numerics.convention import (
    ov_grams,
    product_eigenvalues,
    product_rounding,
    random_inputs,
    response_tolerance,
)
from streamgauge.numerics.matrices import Matrices
from streamgauge.record import Record

FALSE_ALARM = 1e-6
SAMPLES = 256
SOURCE = f"{SAMPLES} samples, false-alarm rate {FALSE_ALARM} a model (Laurent and Massart 2000)"


@pytest.mark.theorem
def test_frobenius_is_random_response(record: Record, weights: Matrices, check) -> None:
    norms, all_dead = record.partial("weights/W_OV_frobenius"), True
    for layer in weights.layers:
        W_V, W_O = weights.W_V(layer), weights.W_O(layer)
        d_model, d_head = W_V.shape[1:]
        x = random_inputs(SAMPLES, d_model, weights.centres, seed=layer)
        per_norm = d_model / (d_model - 1) if weights.centres else 1.0
        rounding = per_norm * product_rounding(d_model, d_head) * weights.squared_sizes(layer)
        responses = ((x @ W_V @ W_O) ** 2).sum(-1).mean(-1) + rounding
        expected = per_norm * norms[layer, : len(W_O)] ** 2 + rounding
        forms = per_norm * product_eigenvalues(*ov_grams(W_V, W_O))
        for head in range(len(W_O)):
            if not responses[head] and not expected[head]:
                continue  # 0 = 0: a head whose W_V or W_O is zero
            all_dead = False
            tolerance = (
                response_tolerance(forms[head], SAMPLES, FALSE_ALARM / norms.size) + rounding[head]
            )
            relative = tolerance / max(forms[head].sum() + rounding[head], np.finfo(float).tiny)
            band = between(1 - relative, 1 + relative, SOURCE)
            what = "mean squared response over ‖W_OV‖²_F"
            check(
                responses[head] / expected[head],
                within=band,
                what=what,
                of=f"layer {layer}, head {head}",
            )
    if all_dead:
        raise NotApplicable("every head is dead, which weights/integrity reports")
