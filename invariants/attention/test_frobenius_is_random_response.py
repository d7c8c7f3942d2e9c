"""The Frobenius norm of W_OV is the root-mean-square response to random input.

For x Gaussian, normalised to mean 0 and variance 1 over d coordinates, E‖x W‖² = d/(d-1) · ‖W‖²_F
for W centred on its reading side; for x normalised to unit RMS (RMSNorm models) E‖x W‖² = ‖W‖²_F.
Every head of every layer is held to it, on inputs of its layer's own, and heads that hypothesis
draws on as many inputs as it draws, or on an orthonormal basis, over which the squared responses
sum to ‖W‖²_F. The tolerance follows from the sample count, a false-alarm rate of 1e-6 a model, and
what rounding does to squared norms of W_OV, which is all that a basis leaves.
Source: footnote 5 of Heimersheim and Turner 2023 asked; second moments of the sphere answer.
Tolerance: Laurent and Massart 2000, lemma 1.
Applies to: every model whose W_V and W_O lie in its files as matrices.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import below, between
from streamgauge.numerics.convention import (
    ov_grams,
    product_eigenvalues,
    product_rounding,
    random_inputs,
    response_tolerance,
)
from streamgauge.numerics.draws import HeadDraw
from streamgauge.numerics.matrices import Matrices
from streamgauge.record import Record

FALSE_ALARM = 1e-6
OF_A_DRAW = FALSE_ALARM / 10**4  # of which a run makes thousands at most
SAMPLES = 256
SOURCE = f"{SAMPLES} samples, false-alarm rate {FALSE_ALARM} a model (Laurent and Massart 2000)"
OF_DRAWS = f"false-alarm rate {OF_A_DRAW:g} a draw (Laurent and Massart 2000); of a basis rounding"


@pytest.mark.theorem
def test_frobenius_is_random_response(record: Record, weights: Matrices, check, hardest) -> None:
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

    def off(draw: HeadDraw) -> float:
        return _distance(record, weights, draw)

    draw = hardest(off)
    given = f"{draw.samples} inputs of seed {draw.seed}" if draw.samples else "a basis"
    check(
        off(draw),
        within=below(1, OF_DRAWS),
        what="distance of the mean squared response from ‖W_OV‖²_F",
        unit="times the tolerance",
        of=f"layer {draw.layer}, head {draw.head} on {given}, drawn",
    )


def _distance(record: Record, weights: Matrices, draw: HeadDraw) -> float:
    """How far a drawn head's mean squared response lies from its expectation, in tolerances."""
    W_V, W_O = weights.head(draw.layer, draw.head)
    d_model, d_head = W_V.shape
    norm = record.partial("weights/W_OV_frobenius")[draw.layer, draw.head]
    sizes = weights.squared_sizes(draw.layer)[draw.head]
    rounding = float(2 * product_rounding(d_model, d_head) * sizes)
    if draw.samples:
        per_norm = d_model / (d_model - 1) if weights.centres else 1.0
        x = random_inputs(draw.samples, d_model, weights.centres, draw.seed)
        response = float(np.square(x @ W_V @ W_O).sum(-1).mean()) / per_norm
        forms = product_eigenvalues(*ov_grams(W_V, W_O))
        tolerance = response_tolerance(forms, draw.samples, OF_A_DRAW) + rounding
    else:  # the mirror images of the coordinates, whose responses W_OV's rows sum up to
        v = np.random.default_rng(draw.seed).standard_normal((d_model, 1))
        v = v / np.linalg.norm(v)
        response = float((((W_V - 2 * v @ (v.T @ W_V)) @ W_O) ** 2).sum())
        tolerance = rounding
    off = abs(response - norm**2)
    return float(off / tolerance) if off else 0.0
