"""Where the growth of W_OV sits: part of it in the norm's gain that is folded into it, the rest in
the matrix of the file.

share = 1 - slope of log ‖W_OV as the file has it‖ / slope of log ‖W_OV folded‖, least squares over
the window. Weight decay usually acts on matrices and not on gains. Centring, the other difference,
changes a norm by about 1 / (2 d_model).
Source: Heimersheim and Turner 2023, footnote 3, asks; no number is published.
Applies to: LayerNorm and RMSNorm models whose folded W_OV grows over the window.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import layer_slope, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_gain_share(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    folded, raw = (
        record.array(f"weights/{name}").mean(1) for name in ("W_OV_frobenius", "W_OV_raw_frobenius")
    )
    window = measured_window(folded[:, None], band.window)
    slope = layer_slope(folded, window)
    if not slope > 0:
        raise NotApplicable(f"‖W_OV‖ does not grow over layers {window[0]} to {window[1]}")
    share = 1 - layer_slope(raw, window) / slope
    of = f"folded it grows by {np.exp(slope):.4f} a layer"
    check(
        share,
        within=replace(band, layers=window),
        what="share of the growth of ‖W_OV‖ that is the gain's",
        of=of,
    )
