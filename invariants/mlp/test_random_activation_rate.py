"""Random input makes more neurons fire than text does.

ratio = activation rate on normalised Gaussian inputs / activation rate on text tokens, geometric
mean over the window.
Source: Heimersheim and Turner 2023, a figure (gpt2-xl: about 4 times).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import mean_ratio, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_random_activation_rate(record: Record, band: Band, check) -> None:
    tokens = record.text("neurons/activation_rate")
    window = measured_window(tokens, band.window)
    text = tokens.mean(1).astype(float)
    random = record.array("random_input/mlp_activation_rate")
    ratio = mean_ratio(random, text, window)
    of = f"mean of {record.count_text}"
    check(
        ratio,
        within=replace(band, layers=window),
        what="activation rate on random input over that on text",
        of=of,
    )
