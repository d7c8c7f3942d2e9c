"""The MLP answers random input ever more strongly with depth, and more strongly than it answers
text.

rate = exp(least-squares slope of log mean ‖MLP(x)‖ over normalised Gaussian x against the layer)
over the window; > 1. Then mean ‖MLP(x)‖ / mean ‖mlp_out‖ over text tokens, geometric mean over the
window; > 1.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl, layers 30 to 43).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import layer_slope, mean_ratio, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_random_input_growth(record: Record, band: Band, check) -> None:
    random, mlp_out = record.array("random_input/mlp_norm"), record.text("stream/mlp_out")
    window = measured_window(mlp_out, band.window)
    within = replace(band, layers=window)
    rate = np.exp(layer_slope(random, window))
    check(
        rate,
        within=within,
        what="growth of ‖MLP(x)‖ on random x",
        unit="a layer",
        of="normalised Gaussian vectors",
    )
    ratio = mean_ratio(random, mlp_out.mean(1), window)
    check(
        ratio,
        within=within,
        what="‖MLP(x)‖ on random x over ‖mlp_out‖",
        of=f"mean of {record.count_text}",
    )
