"""Blocks add to the stream and do nothing else to it: resid_post = resid_pre + attn_out + mlp_out.

error = ‖resid_post - resid_pre - attn_out - mlp_out‖ / (‖resid_pre‖ + ‖attn_out‖ + ‖mlp_out‖),
every token and layer.
Source: definition of the pre-norm block (Elhage et al. 2021).
Applies to: every block whose norms act on what is read, not on the stream; sequential, parallel and
sandwich.
"""

import pytest

from streamgauge.numerics.bands import below
from streamgauge.record import Record

UNIT = 2.0**-24  # rounding of fp32


@pytest.mark.theorem
def test_additivity(record: Record, check) -> None:
    error = record.array("stream/additivity_error").max()
    rounding = below(
        8 * UNIT,
        "two additions and a scaling in the block, three subtractions and two norms in ours, fp32",
    )
    check(error, within=rounding, what="relative error of the sum", of="every token and layer")
