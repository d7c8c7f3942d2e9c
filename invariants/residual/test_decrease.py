"""In some models the stream shrinks late: over the last layers the norm of text tokens falls.

rate = (‖resid[n]‖ / ‖resid[a]‖) ** (1 / (n - a)) from a = 85% of the depth to the end n, geometric
mean over text tokens; < 1.
Source: Heimersheim and Turner 2023, a figure alone, of models by EleutherAI.
Applies to: models whose data show it; no published number does, so it is claimed of none until you
declare it of yours.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band, default_window
from streamgauge.numerics.growth import growth_rates, mean_rate, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_decrease(record: Record, band: Band, check) -> None:
    resid = record.text_resid
    window = measured_window(resid, (default_window(record.n_layers)[1], record.n_layers))
    rate = mean_rate(growth_rates(resid, window))
    check(
        rate,
        within=replace(band, layers=window),
        what="growth over the last layers",
        unit="a layer",
        of=record.count_text,
    )
