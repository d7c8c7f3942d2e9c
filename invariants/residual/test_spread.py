"""Tokens of one layer are alike: the stream's norm is spread over prompts and positions far less than over layers.

spread = largest over the window's layers of the 95% quantile of ‖resid‖ over its 5% quantile, text tokens.
Source: Heimersheim and Turner 2023, the histogram of norms, and the authors' data.
Applies to: the models whose single tokens were published.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.bands import Band
from streamgauge.growth import measured_window
from streamgauge.record import Record

QUANTILES = (0.05, 0.95)


@pytest.mark.phenomenon
def test_spread(record: Record, band: Band, check) -> None:
    record.require_tokens()
    resid = record.text_resid
    window = measured_window(resid, band.window)
    layers = [n for n in range(window[0], window[1] + 1) if not np.isnan(resid[n]).all()]
    low, high = np.quantile(resid[layers], QUANTILES, axis=1)
    widest = int((high / low).argmax())
    of = f"{record.count_text}, widest at layer {layers[widest]}"
    check(
        (high / low)[widest], within=replace(band, layers=window), what="95% quantile of the norm over its 5% quantile", of=of
    )
