"""Growth has to come from somewhere: no block changes the norm by more than its two contributions
allow.

|‖resid_post‖ / ‖resid_pre‖ - 1| ≤ (‖attn_out‖ + ‖mlp_out‖) / ‖resid_pre‖, by the triangle
inequality, for every token and layer. Growth of 1.05 a layer needs contributions of at least 5%.
Source: Heimersheim and Turner 2023, appendix 1.
Applies to: every block that only adds to the stream, sequential or parallel.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import UNIT
from streamgauge.record import Record


@pytest.mark.theorem
def test_contribution_bound(record: Record, check) -> None:
    pre, post = (
        record.array(f"stream/{name}").astype(float) for name in ("resid_pre", "resid_post")
    )
    outputs = sum(record.added(kind) for kind in ("attn", "mlp", "other"))
    # A zero vector to which nothing is added stays one: 0 / 0 is 0 here.
    size = np.maximum(pre + outputs, np.finfo(float).tiny)
    excess = (np.abs(post - pre) - outputs) / size
    layer = int(excess.max(1).argmax())
    rounding = below(
        record.metadata["d_model"] * UNIT,
        "each norm is a sum of d_model squares in fp32 (Higham 2002, §4.2)",
    )
    check(
        excess.max(),
        within=rounding,
        what="change of norm beyond the contributions, relative",
        of=f"largest at layer {layer}",
    )
