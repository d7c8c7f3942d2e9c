"""In small GPT-2s the residual stream grows faster than exponentially: the growth rate itself rises
with depth.

curvature = slope of log(‖resid[n+1]‖ / ‖resid[n]‖) against n, log norms averaged over tokens; it
must exceed what the scatter of the rates about that slope explains at the 1% level (one-sided t
test).
Source: Heimersheim and Turner 2023 (distilgpt2 and gpt2).
Applies to: the models named there.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import curvature, measured_window
from streamgauge.record import Record

LEVEL = 0.01


@pytest.mark.phenomenon
def test_super_exponential(record: Record, band: Band, check) -> None:
    window = measured_window(record.text_resid, band.window)
    slope, by_chance = curvature(record.text_resid, window, LEVEL)
    rising = replace(band, low=by_chance, layers=window)
    check(
        slope,
        within=rising,
        what="rise of the log growth rate",
        unit="a layer",
        of=record.count_text,
    )
