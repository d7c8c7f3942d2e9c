"""Attention's output bias is small: through the window ‖b_O‖ stays below what attention writes.

ratio = largest over the window's layers of ‖b_O‖ / mean ‖attn_out‖, value biases folded into b_O; <
1.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_output_bias(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    b_O, attn = record.array("weights/b_O"), record.text("stream/attn_out")
    if not b_O.any():
        raise NotApplicable("attention has no biases")
    first, last = measured_window(attn, band.window)
    ratio = b_O[first : last + 1] / attn[first : last + 1].mean(1)
    of = f"largest at layer {first + int(ratio.argmax())}, mean of {record.count_text}"
    check(
        ratio.max(), within=replace(band, layers=(first, last)), what="‖b_O‖ over ‖attn_out‖", of=of
    )
