"""Blocks add to the stream and do nothing else to it: resid_post = resid_pre + attn_out + mlp_out.

error = ‖resid_post - resid_pre - attn_out - mlp_out‖ / (‖resid_pre‖ + ‖attn_out‖ + ‖mlp_out‖),
every token and layer of the prompts, and of sequences that hypothesis draws. attn_out is what all
mixers of a block add, mlp_out all its MLPs, and what is neither (per-layer inputs, a factor on the
stream) is a third term, other_out.
Source: definition of the pre-norm block (Elhage et al. 2021).
Applies to: every block whose norms act on what is read, not on the stream; sequential, parallel and
sandwich.
"""

import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import additivity_rounding
from streamgauge.record import Record


@pytest.mark.theorem
def test_additivity(record: Record, check, check_draws) -> None:
    error = record.array("stream/additivity_error").max()
    terms = max((len(layer) for layer in record.metadata.get("sublayers", [])), default=2)
    rounding = below(
        additivity_rounding(terms),
        "an addition a term and a scaling in the block, as many subtractions and two norms in "
        "ours, "
        "fp32",
    )
    check(error, within=rounding, what="relative error of the sum", of="every token and layer")
    check_draws("additivity")
