"""Every token grows: not only on average does the stream gain norm over the window, but at each
position but 0.

min over tokens of (‖resid[b]‖ / ‖resid[a]‖) ** (1 / (b - a)) > 1.
Source: Heimersheim and Turner 2023, the authors' data (gpt2-xl: the slowest of 1,061 tokens grows
by 1.027 a layer).
Applies to: the models whose single tokens were published; delimiters with massive activations stand
still in others.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import growth_rates, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_every_token_grows(record: Record, band: Band, check) -> None:
    record.require_tokens()
    window = measured_window(record.text_resid, band.window)
    rates = growth_rates(record.text_resid, window)
    check(
        rates.min(),
        within=replace(band, layers=window),
        what="slowest growth",
        unit="a layer",
        of=f"minimum over {record.count_text}",
    )
