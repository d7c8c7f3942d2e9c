"""Norms add up by the law of cosines: what a block does to the norm follows from its outputs' norms
and inner products.

‖resid_post‖² = ‖resid_pre‖² + ‖attn_out‖² + ‖mlp_out‖² + 2 resid_pre·attn_out + 2 resid_mid·mlp_out
for each token and layer; in a parallel block the last is 2 resid_pre·mlp_out + 2 attn_out·mlp_out.
Divided by the sum of the three norms, times that of the three raw vectors.
Source: Heimersheim and Turner 2023, appendix 2, σ²(a+b) = σ_a² + σ_b² + 2ρσ_aσ_b, for vectors of
mean 0.
Applies to: every block that only adds to the stream, sequential or parallel.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.record import Record

UNIT = 2.0**-24  # rounding of fp32


@pytest.mark.theorem
def test_addition_law(record: Record, check) -> None:
    names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "pre_dot_attn", "mid_dot_mlp")
    pre, post, attn, mlp, pre_attn, mid_mlp = (
        record.array(f"stream/{name}").astype(float) for name in names
    )
    products = pre_attn + mid_mlp
    if record.metadata["parallel"]:
        products += record.array("sublayers/attn_dot_mlp")
    # Rounding is relative to the raw vectors, whose mean the convention takes away.
    size = (pre + attn + mlp) * record.array("sublayers/raw_norm")
    error = np.abs(post**2 - pre**2 - attn**2 - mlp**2 - 2 * products) / np.maximum(
        size, np.finfo(float).tiny
    )
    layer = int(error.max(1).argmax())
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
