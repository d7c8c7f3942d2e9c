"""The Frobenius norm of W_OV is the root-mean-square response to random input.

For x Gaussian, normalised to mean 0 and variance 1 over d coordinates, E‖x W‖² = d/(d-1) · ‖W‖²_F for W centred on its
reading side; for x normalised to unit RMS (RMSNorm models) E‖x W‖² = ‖W‖²_F. Layer, seed and sample count are
drawn, and every head of the layer is held to it; the tolerance follows from the sample count and a false-alarm rate of
1e-6 a head.
Source: footnote 5 of Heimersheim and Turner 2023 asked; second moments of the sphere answer. Tolerance: Laurent and
Massart 2000, lemma 1.
Applies to: every model whose W_V and W_O lie in its files as matrices.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgauge.bands import between
from streamgauge.convention import ov_grams, product_eigenvalues, random_inputs, response_tolerance
from streamgauge.matrices import Matrices
from streamgauge.record import Record

FALSE_ALARM = 1e-6


@pytest.mark.theorem
@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(data=st.data())
def test_frobenius_is_random_response(record: Record, weights: Matrices, check, data: st.DataObject) -> None:
    norms = record.array("weights/W_OV_frobenius")
    layer = data.draw(st.integers(0, len(norms) - 1), "layer")
    seed, n = data.draw(st.integers(0, 2**32), "seed"), data.draw(st.sampled_from([64, 128, 512]), "samples")

    W_V, W_O = weights.W_V(layer), weights.W_O(layer)
    d_model = W_V.shape[1]
    x = random_inputs(n, d_model, weights.centres, seed)
    per_norm = d_model / (d_model - 1) if weights.centres else 1.0
    for head, (reading, writing) in enumerate(zip(*ov_grams(W_V, W_O), strict=True)):
        response = (((x @ W_V[head]) @ W_O[head]) ** 2).sum(1).mean()
        eigenvalues = per_norm * product_eigenvalues(reading, writing)
        expected = per_norm * norms[layer, head] ** 2
        if not expected and not eigenvalues.any():
            continue  # 0 = 0; a dead head is the integrity law's to report
        tolerance = response_tolerance(eigenvalues, n, FALSE_ALARM) / eigenvalues.sum()
        band = between(
            1 - tolerance, 1 + tolerance, f"{n} samples, false-alarm rate {FALSE_ALARM} a head (Laurent and Massart 2000)"
        )
        check(response / expected, within=band, what="mean squared response over ‖W_OV‖²_F", of=f"layer {layer}, head {head}")
