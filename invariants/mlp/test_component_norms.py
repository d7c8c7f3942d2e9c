"""The MLP's growth is not its components': norms of its matrices and biases grow more slowly than
the stream.

For each of ‖W_in‖, ‖W_in W_out‖_F, ‖b_in W_out‖ and ‖b_out‖: exp(least-squares slope of its log
against the layer), over the stream's growth a layer in the same window; < 1.
Source: Heimersheim and Turner 2023, a figure (gpt2-xl); activation_additions for gpt2.
Applies to: gpt2 and gpt2-xl.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import layer_slope, log_slopes, measured_window
from streamgauge.record import Record

COMPONENTS = {
    "W_in": "‖W_in‖",
    "W_in_W_out": "‖W_in W_out‖_F",
    "b_in_W_out": "‖b_in W_out‖",
    "b_out": "‖b_out‖",
}


@pytest.mark.phenomenon
def test_component_norms(record: Record, band: Band, check) -> None:
    record.array(
        "weights/W_in_W_out"
    )  # not applicable to gated MLPs, through whose W_in alone nothing flows
    resid = record.text_resid[: record.n_layers]
    window = measured_window(resid, band.window)
    stream = float(log_slopes(resid, window).mean())
    for name, what in COMPONENTS.items():
        norms = record.arrays.get(f"weights/{name}")  # published numbers lack some
        if norms is not None and norms.any():  # an architecture without biases has zeros
            ratio = np.exp(layer_slope(norms, window) - stream)
            of = f"the stream grows by {np.exp(stream):.4f}"
            check(
                ratio,
                within=replace(band, layers=window),
                what=f"growth of {what} over the stream's",
                of=of,
            )
