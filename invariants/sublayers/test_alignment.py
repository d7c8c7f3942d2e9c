"""Blocks push along the stream: the norm grows by more than outputs that do not correlate with it
would make it grow.

ratio = ‖resid_post‖ / √(‖resid_pre‖² + ‖attn_out‖² + ‖mlp_out‖²), geometric mean over the window's
blocks and text tokens. It is 1 where no two of the three correlate (which is no lower bound:
opposed vectors shrink).
Source: Heimersheim and Turner 2023, appendix 2: uncorrelated outputs would have to be larger than
they are.
Applies to: gpt2-xl, and the bundled model.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_alignment(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    record.require_tokens()  # medians of outputs and of the stream do not add up
    pre, post, attn, mlp = (
        record.text(f"stream/{name}").astype(float)
        for name in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    )
    first, last = measured_window(pre, band.window)
    blocks = slice(first, last)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = (
            np.log(post[blocks])
            - np.log(pre[blocks] ** 2 + attn[blocks] ** 2 + mlp[blocks] ** 2) / 2
        )
    within = replace(band, layers=(first, last))
    check(
        np.exp(logs.mean()),
        within=within,
        what="growth a block over that of uncorrelated outputs",
        of=record.count_text,
    )
