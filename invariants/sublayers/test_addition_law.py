"""Norms add up by the law of cosines: what a block does to the norm follows from its outputs' norms
and inner products.

‖resid_post‖² = ‖resid_pre‖² + ‖attn_out‖² + ‖mlp_out‖² + 2 resid_pre·attn_out + 2 resid_mid·mlp_out
for each token and layer; in a parallel block the last is 2 resid_pre·mlp_out + 2 attn_out·mlp_out.
Where a block lacks one of the two, its terms are 0. Blocks that add something else are left out.
Divided by the sum of the three norms, times that of the three raw vectors.
Source: Heimersheim and Turner 2023, appendix 2, σ²(a+b) = σ_a² + σ_b² + 2ρσ_aσ_b, for vectors of
mean 0.
Applies to: every block that only adds to the stream, sequential or parallel.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import UNIT
from streamgauge.record import Record


@pytest.mark.theorem
def test_addition_law(record: Record, check) -> None:
    layers = _layers(record)
    pre, post = (
        record.array(f"stream/{name}").astype(float) for name in ("resid_pre", "resid_post")
    )
    attn, mlp = record.added("attn"), record.added("mlp")
    products = sum(
        np.nan_to_num(record.partial(name).astype(float)) if name in record.arrays else 0.0
        for name in ("stream/pre_dot_attn", "stream/mid_dot_mlp", "sublayers/attn_dot_mlp")
    )
    # Rounding is relative to the raw vectors, whose mean the convention takes away.
    size = (pre + attn + mlp) * record.array("sublayers/raw_norm")
    left = np.abs(post**2 - pre**2 - attn**2 - mlp**2 - 2 * products)
    error = (left / np.maximum(size, np.finfo(float).tiny))[layers]
    layer = layers[int(error.max(1).argmax())]
    d_model = record.metadata["d_model"]
    rounding = below(
        3 * d_model * UNIT,
        f"mean, norm and inner product, each a sum of {d_model} terms in fp32 (Higham 2002, §4.2)",
    )
    check(
        error.max(),
        within=rounding,
        what="relative error of the addition law",
        of=f"largest at layer {layer}",
    )


def _layers(record: Record) -> list[int]:
    """Those whose every term and inner product the record holds. Raises NotApplicable for none."""
    n_layers = record.n_layers
    record.array("stream/additivity_error")  # says why no sum closes
    others = set(range(n_layers)) - set(record.lacks("stream/other_out"))
    mlps = set(range(n_layers)) - set(record.lacks("stream/mlp_out"))
    unknown = others | (mlps & set(record.lacks("stream/mid_dot_mlp")))
    layers = [layer for layer in range(n_layers) if layer not in unknown]
    if not layers:
        raise NotApplicable("every block adds something whose inner products are not measured")
    return layers
