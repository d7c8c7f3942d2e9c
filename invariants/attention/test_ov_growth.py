"""Attention writes more with depth because its weights do: the Frobenius norm of W_OV grows over
the layers.

rate = growth a layer of ‖W_V W_O‖_F, folded and centred, averaged over the heads of a layer.
Source: Heimersheim and Turner 2023; for gpt2 two independent sets of published norms.
Applies to: the pre-norm models for which it was published, and the bundled one.
"""

from dataclasses import replace

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import growth_rates, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_ov_growth(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    norms = record.array("weights/W_OV_frobenius").mean(1, keepdims=True)
    window = measured_window(norms, band.window)
    rate = growth_rates(norms, window)[0]
    check(
        rate,
        within=replace(band, layers=window),
        what="growth of ‖W_OV‖",
        unit="a layer",
        of="mean over heads",
    )
