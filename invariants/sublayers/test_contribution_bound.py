"""Growth has to come from somewhere: no block changes the norm by more than its two contributions
allow.

|‖resid_post‖ / ‖resid_pre‖ - 1| ≤ (‖attn_out‖ + ‖mlp_out‖) / ‖resid_pre‖, by the triangle
inequality, for every token and layer of the prompts, and of sequences that hypothesis draws. Growth
of 1.05 a layer needs contributions of at least 5%.
Source: Heimersheim and Turner 2023, appendix 1.
Applies to: every block that only adds to the stream, sequential or parallel.
"""

import pytest

from streamgauge.numerics.bands import below
from streamgauge.numerics.rounding import beyond_contributions, contribution_rounding
from streamgauge.record import Record


@pytest.mark.theorem
def test_contribution_bound(record: Record, check, check_draws) -> None:
    pre, post = (
        record.array(f"stream/{name}").astype(float) for name in ("resid_pre", "resid_post")
    )
    outputs = record.added("attn") + record.added("mlp") + record.added("other")
    excess = beyond_contributions(pre, post, outputs)
    layer = int(excess.max(1).argmax())
    rounding = below(
        contribution_rounding(record.metadata["d_model"]),
        "each norm is a sum of d_model squares in fp32 (Higham 2002, §4.2)",
    )
    check(
        excess.max(),
        within=rounding,
        what="change of norm beyond the contributions, relative",
        of=f"largest at layer {layer}",
    )
    check_draws("contribution_bound")
