"""No head amplifies beyond its spectral norm: ‖x W_OV‖ ≤ σ₁ ‖x‖, and σ₁ ≤ ‖W_OV‖_F ≤ √rank · σ₁
with rank at most d_head.

Every head of every layer is held to it, on Gaussian x and on the same x after steps of power
iteration, which bring ‖x W_OV‖ / ‖x‖ close to σ₁ from below; and heads that hypothesis draws, on
inputs of its choice. Where ‖W_V‖‖W_O‖ is much larger than
their product, what rounding does to squared norms of that is allowed.
Source: definition of the spectral norm; Golub and Van Loan 2013, §2.3.
Applies to: every model whose W_V and W_O lie in its files as matrices.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.convention import product_rounding
from streamgauge.numerics.draws import HeadDraw
from streamgauge.numerics.matrices import Matrices
from streamgauge.record import Record

STEPS, SAMPLES = 3, 8
SUMS = "sums and eigenvalues in fp64 (Higham 2002, §4.2)"


@pytest.mark.theorem
def test_amplification_bound(record: Record, weights: Matrices, check, hardest) -> None:
    for layer in weights.layers:
        W_V, W_O = weights.W_V(layer), weights.W_O(layer)
        heads, d_model, d_head = W_V.shape
        spectral, frobenius = (
            record.partial(f"weights/W_OV_{name}")[layer, :heads]
            for name in ("spectral", "frobenius")
        )
        part = product_rounding(d_model, d_head)
        rounding = part * weights.squared_sizes(layer)
        bound = below(1 + part, SUMS)
        largest = _at_most(spectral, rounding)
        x = np.random.default_rng(layer).standard_normal((SAMPLES, d_model))
        for what, ratios in {
            "σ₁ over ‖W_OV‖_F": spectral / _at_most(frobenius, rounding),
            "‖W_OV‖_F over √d_head σ₁": frobenius / largest / min(d_head, d_model) ** 0.5,
            "‖x W_OV‖ over σ₁ ‖x‖": _largest_gains(x, W_V, W_O) / largest,
        }.items():
            head = int(ratios.argmax())  # a NaN where there is one
            check(ratios[head], within=bound, what=what, of=f"layer {layer}, head {head}")

    draw = hardest(lambda draw: _gain(record, weights, draw))
    check(
        _gain(record, weights, draw),
        within=below(1 + product_rounding(*weights.head(draw.layer, draw.head)[0].shape), SUMS),
        what="‖x W_OV‖ over σ₁ ‖x‖",
        of=f"layer {draw.layer}, head {draw.head} on inputs of seed {draw.seed}, drawn",
    )


def _gain(record: Record, weights: Matrices, draw: HeadDraw) -> float:
    """The largest gain of a drawn head on inputs of its seed, over σ₁."""
    W_V, W_O = weights.head(draw.layer, draw.head)
    spectral = record.partial("weights/W_OV_spectral")[draw.layer, draw.head]
    rounding = product_rounding(*W_V.shape) * weights.squared_sizes(draw.layer)[draw.head]
    x = np.random.default_rng(draw.seed).standard_normal((SAMPLES, len(W_V)))
    return float(_largest_gains(x, W_V[None], W_O[None])[0] / _at_most(spectral, rounding))


def _at_most(norms: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """Norms, as large as rounding of their squares, and of those that they are compared with, lets
    them be.
    """
    allowed: np.ndarray = np.maximum(np.sqrt(norms**2 + 2 * rounding), np.finfo(float).tiny)
    return allowed


def _largest_gains(x: np.ndarray, W_V: np.ndarray, W_O: np.ndarray) -> np.ndarray:
    """Of each head, (n_heads,), over all samples and steps."""
    gains = np.zeros(len(W_O))
    for _ in range(STEPS):
        size = np.linalg.norm(x, axis=-1, keepdims=True)
        x = x / np.where(size > 0, size, 1)
        answer = (x @ W_V) @ W_O
        gains = np.maximum(gains, np.linalg.norm(answer, axis=-1).max(-1))
        x = (answer @ W_O.swapaxes(1, 2)) @ W_V.swapaxes(1, 2)
    return gains
