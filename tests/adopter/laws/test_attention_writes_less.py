"""Attention writes less than the MLP, in every layer.

max over layers of median ‖attn_out‖ / median ‖mlp_out‖ < 1.
Source: our own models.
Applies to: our models.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below


@pytest.mark.phenomenon
def test_attention_writes_less(record, check):
    attn, mlp = (
        np.median(record.array(f"stream/{name}"), axis=1) for name in ("attn_out", "mlp_out")
    )
    check(
        (attn / mlp).max(),
        within=below(1e-3, "our own models"),
        what="attn_out over mlp_out",
        of="worst layer",
    )
