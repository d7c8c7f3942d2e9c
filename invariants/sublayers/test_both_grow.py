"""Attention and MLP both write more with depth: attn_out and mlp_out grow over the layers as the
stream does.

rate = exp(least-squares slope of log ‖attn_out‖ against the layer), mean of slopes over text
tokens; likewise mlp_out.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl: both at about the stream's rate,
attn_out until about layer 30).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import log_slopes, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_both_grow(record: Record, band: Band, check) -> None:
    for name in ("attn_out", "mlp_out"):
        norms = record.text(f"stream/{name}")
        window = measured_window(norms, band.window)
        rate = np.exp(log_slopes(norms, window).mean())
        check(
            rate,
            within=replace(band, layers=window),
            what=f"growth of {name}",
            unit="a layer",
            of=record.count_text,
        )
