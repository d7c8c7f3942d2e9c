"""More neurons fire with depth: the fraction of MLP pre-activations above 0 rises over the window.

rate = exp(least-squares slope of log(fraction, mean over text tokens) against the layer); > 1.
Source: Heimersheim and Turner 2023, a figure (gpt2-xl, layers 5 to 20); pythia_browser's numbers
for four Pythias, where the fraction rises in the first half of the layers and then stays.
Applies to: gpt2-xl and pythia-70m, -160m, -410m and -1b.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import layer_slope, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_activation_rate(record: Record, band: Band, check) -> None:
    tokens = record.text("neurons/activation_rate")
    window = measured_window(tokens, band.window)
    fraction = tokens.mean(1).astype(float)
    rate = np.exp(layer_slope(fraction, window))
    of = (
        f"{fraction[window[0]]:.3f} at layer {window[0]}, {fraction[window[1]]:.3f} at layer "
        f"{window[1]}"
    )
    check(
        rate,
        within=replace(band, layers=window),
        what="growth of the activation rate",
        unit="a layer",
        of=of,
    )
