"""What an early layer wrote fades: the first MLP's share of the stream falls as the stream grows.

fall = exp(slope of log share over the window), share = mean over text tokens of the cosine of
resid_pre and the mlp_out of layer 0. Kept as it was written, among outputs that have nothing to do
with it, it falls as 1 / growth: beside it stands what the stream grows by.
Source: Heimersheim and Turner 2023: 1.05³⁰ makes a share of 100 one of 432, so later layers need
not clear what they ignore.
Applies to: gpt2-xl, as a direction.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.numerics.growth import layer_slope, log_slopes, measured_window
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_earlier_outputs_fade(record: Record, band: Band, check) -> None:
    record.require_text()
    norms = record.text("stream/resid_pre").astype(float)
    first, last = measured_window(norms, (max(1, band.window[0]), band.window[1]))
    written = record.text("stream/mlp_out")[0].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nanmean(record.text("sublayers/pre_dot_mlp_0") / (norms * written), axis=1)
    if not (share[first : last + 1] > 0).all():
        raise NotApplicable(
            f"the stream points away from the first mlp_out somewhere between layers {first} "
            f"and {last}"
        )
    fall = np.exp(layer_slope(share, (first, last)))
    growth = np.exp(log_slopes(norms, (first, last)).mean())
    of = (
        f"from {share[first]:.3f} at layer {first} to {share[last]:.3f} at layer {last}; the "
        f"stream grows by {growth:.4f}"
    )
    check(
        fall,
        within=replace(band, layers=(first, last)),
        what="share of the first mlp_out",
        unit="a layer",
        of=of,
    )
