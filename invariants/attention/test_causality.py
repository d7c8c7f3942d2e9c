"""Later tokens change nothing before them, and attention shares itself out among what is there.

Two runs whose first tokens are the same, of a prompt and of sequences of any length that hypothesis
draws: largest relative difference of the stream at these tokens,
over layers; largest attention weight on a later position, which must be none at all; largest
|Σ - 1| over rows of attention patterns, or Σ - 1 where attention has a sink, which takes the rest.
Source: definition of causal attention (Vaswani et al. 2017, §3.2.3) and of softmax.
Applies to: every causal language model; rows where attention shows its weights.
"""

import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import UNIT
from streamgauge.record import Record


@pytest.mark.theorem
def test_causality(record: Record, check, check_draws) -> None:
    changes = record.array("prediction/later_changes")
    d_model, length = record.metadata["d_model"], int(record.array("stream/position").max()) + 1
    # What is computed for a token is the same sum; batched libraries may add it up in another
    # order, once a layer.
    order = below(
        len(changes) * d_model * UNIT,
        "sums of d_model terms in another order, once a layer (Higham 2002, §4.2)",
    )
    of = f"largest in the stream behind {int(changes.argmax())} layers"
    check(changes.max(), within=order, what="change of the stream by later tokens, relative", of=of)
    check_draws("causality")
    if "prediction/row_sum_error" not in record.arrays:
        return
    layers, future = record.rows("prediction/future_weight")
    _, error = record.rows("prediction/row_sum_error")
    nothing = below(UNIT, "a masked score is -∞, its weight 0")
    check(
        future.max(),
        within=nothing,
        what="attention weight on a later position",
        of=f"largest at layer {layers[int(future.argmax())]}",
    )
    rounding = below(
        4 * length * UNIT, f"quotients of a sum of up to {length} terms in fp32 (Higham 2002, §4.2)"
    )
    check(
        error.max(),
        within=rounding,
        what="|Σ - 1| of attention rows",
        of=f"largest at layer {layers[int(error.argmax())]}",
    )
