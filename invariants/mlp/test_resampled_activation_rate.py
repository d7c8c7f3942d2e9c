"""Inputs resampled from the stream lie between text and noise in how many neurons they make fire.

place = log(resampled / text) / log(random / text) of the activation rates, geometric means over the
window, between 0 and 1. Resampled: each coordinate of resid_mid drawn by itself from the values it
takes at positions 1 to 6, then normalised.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import mean_ratio, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_resampled_activation_rate(record: Record, band: Band, check) -> None:
    tokens = record.text("neurons/activation_rate")
    window = measured_window(tokens, band.window)
    text = tokens.mean(1).astype(float)
    resampled, random = (
        record.array(f"random_input/{name}_activation_rate") for name in ("resampled", "mlp")
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        place = np.log(mean_ratio(resampled, text, window)) / np.log(
            mean_ratio(random, text, window)
        )
    of = "0 is text, 1 is Gaussian input"
    check(
        place,
        within=replace(band, layers=window),
        what="place of the resampled activation rate",
        of=of,
    )
