"""The norm of the stream is what the block's first norm divides by: ‖c(resid_pre)‖² / d_model + ε =
scale².

With LayerNorm scale² is variance + ε of the raw stream, with RMSNorm mean square + ε; scale is read
off the norm's own output; the error is relative to the raw vectors, as rounding is. What scaling
and gain do not explain of that output must be rounding.
Source: definition of LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019); Heimersheim
and Turner 2023 use ‖x‖ = √d_model · std(x), 40 std on gpt2-xl.
Applies to: blocks with a norm between the stream and the attention, or another mixer.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import UNIT
from streamgauge.record import Record


def _raw_over_centred(record: Record) -> np.ndarray:
    """By how much the mean makes the raw vectors larger, (n_layers, n_tokens): rounding of a
    variance is relative to them.
    """
    centred = record.resid_pre + sum(record.added(kind) for kind in ("attn", "mlp", "other"))
    raw = record.array("sublayers/raw_norm")
    larger: np.ndarray = np.maximum(raw / np.maximum(centred, np.finfo(float).tiny), 1)
    return larger


@pytest.mark.theorem
def test_moments(record: Record, check) -> None:
    layers, scale = record.rows("stream/ln1_scale")
    resid = record.resid_pre[layers].astype(float)
    d_model, epsilon = record.metadata["d_model"], record.metadata["epsilon"]
    # Mean, variance and our own norm are each a sum of d_model terms, with relative error at most
    # d_model roundings.
    rounding = below(
        3 * d_model * UNIT,
        f"three sums of {d_model} terms in fp32, d_model roundings each (Higham 2002, §4.2)",
    )
    error = np.abs((resid**2 / d_model + epsilon) / scale.astype(float) ** 2 - 1)
    larger = _raw_over_centred(record)[layers]
    error = (error / larger).max()
    check(
        error,
        within=rounding,
        what="relative error of ‖resid_pre‖² against the norm's scale",
        of="every token and layer",
    )
    rest = (record.rows("stream/ln1_residual")[1] / larger).max()
    check(
        rest,
        within=rounding,
        what="part of the norm's output that scaling does not explain",
        of="every token and layer",
    )
