"""The norm of the residual stream grows at a steady rate a layer.

rate = (‖resid[b]‖ / ‖resid[a]‖) ** (1 / (b - a)) for each token over a window of layers a to b,
position 0 left out, then the geometric mean over tokens.
Source: Heimersheim and Turner 2023, figure 1 (gpt2-xl: 1.045 over layers 5 to 41).
Applies to: pre-norm decoders of 12 layers or more.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import bootstrap_rate, growth_rates, mean_rate, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_growth_rate(record: Record, band: Band, check) -> None:
    resid = record.text_resid
    window = measured_window(resid, band.window)
    rates = growth_rates(resid, window)
    interval = bootstrap_rate(rates, record.array("stream/prompt")[record.is_text])
    of = (
        f"mean of {record.count_text}, position 0 left out, 95% interval {interval.low:.4f} to "
        f"{interval.high:.4f}"
    )
    check(
        mean_rate(rates), within=replace(band, layers=window), what="growth", unit="a layer", of=of
    )
