"""The norm of the stream is what the block's first norm divides by: ‖c(resid_pre)‖² / d_model + ε =
scale².

With LayerNorm scale² is variance + ε of the raw stream, with RMSNorm mean square + ε; scale is read
off the norm's own output. What scaling and gain do not explain of that output must be rounding.
Source: definition of LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019); Heimersheim
and Turner 2023 use ‖x‖ = √d_model · std(x), 40 std on gpt2-xl.
Applies to: models with a norm between the stream and the attention.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.record import Record

UNIT = 2.0**-24  # rounding of fp32


@pytest.mark.theorem
def test_moments(record: Record, check) -> None:
    scale, resid = record.array("stream/ln1_scale").astype(float), record.resid_pre.astype(float)
    d_model, epsilon = record.metadata["d_model"], record.metadata["epsilon"]
    # Mean, variance and our own norm are each a sum of d_model terms, with relative error at most
    # d_model roundings.
    rounding = below(
        3 * d_model * UNIT,
        f"three sums of {d_model} terms in fp32, d_model roundings each (Higham 2002, §4.2)",
    )
    error = np.abs((resid**2 / d_model + epsilon) / scale**2 - 1).max()
    check(
        error,
        within=rounding,
        what="relative error of ‖resid_pre‖² against the norm's scale",
        of="every token and layer",
    )
    rest = record.array("stream/ln1_residual").max()
    check(
        rest,
        within=rounding,
        what="part of the norm's output that scaling does not explain",
        of="every token and layer",
    )
