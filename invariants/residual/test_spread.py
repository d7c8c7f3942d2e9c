"""Tokens of one layer are alike: norms are spread less over prompts and positions than they grow
over the layers.

spread = largest over the window's layers of log(95% quantile of ‖resid‖ / 5% quantile) over text
tokens, divided by the log of the stream's growth over the whole window; < 1. The histogram itself
is on the page.
Source: Heimersheim and Turner 2023, the histogram of norms, and the authors' data (gpt2-xl: 0.34).
Applies to: the models whose single tokens were published, where the stream grows.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import growth_rates, mean_rate, measured_window
from streamgauge.record import Record

QUANTILES = (0.05, 0.95)


@pytest.mark.phenomenon
def test_spread(record: Record, band: Band, check) -> None:
    record.require_tokens()
    resid = record.text_resid
    window = measured_window(resid, band.window)
    layers = [n for n in range(window[0], window[1] + 1) if not np.isnan(resid[n]).all()]
    growth = float(np.log(mean_rate(growth_rates(resid, window)))) * (window[1] - window[0])
    if not growth > 0:
        raise NotApplicable("the stream does not grow over the window")
    low, high = np.log(np.quantile(resid[layers], QUANTILES, axis=1))
    widest = int((high - low).argmax())
    of = (
        f"{record.count_text}, widest at layer {layers[widest]}, where 95% over 5% is "
        f"{np.exp((high - low)[widest]):.3f}"
    )
    check(
        (high - low)[widest] / growth,
        within=replace(band, layers=window),
        what="spread over tokens, part of the growth",
        of=of,
    )
