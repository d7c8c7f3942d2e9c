"""Attention fades at the end: attn_out stops growing with the stream in the last third of the
layers.

ratio = growth a layer of ‖attn_out‖ over the window / growth a layer of ‖resid_pre‖ over it, least
squares; < 1.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl: attn_out falls off from about layer
30).
Applies to: gpt2-xl, layers 30 to 46.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import log_slopes, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_fall_off(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    attn, pre = record.text("stream/attn_out"), record.text("stream/resid_pre")
    window = measured_window(attn, band.window)
    ratio = np.exp(log_slopes(attn, window).mean() - log_slopes(pre, window).mean())
    check(
        ratio,
        within=replace(band, layers=window),
        what="growth of attn_out over the stream's",
        of=record.count_text,
    )
