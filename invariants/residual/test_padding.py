"""Padding positions follow a curve of their own: their norm falls from the first blocks on, and
rises again at the end.

depth = min(first, last) / lowest of the mean log norms at padding positions, exponentiated, from
layer 1 to after the last block; > 1 means that the curve is U-shaped.
Source: Heimersheim and Turner 2023, a figure alone (gpt2-xl).
Applies to: gpt2-xl.
"""

from dataclasses import replace

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_padding(record: Record, band: Band, check) -> None:
    record.require_pre_norm()
    padding = record.array("padding/resid").astype(float)
    with np.errstate(divide="ignore"):
        logs = np.log(padding[1:]).mean(1)
    depth = np.exp(min(logs[0], logs[-1]) - logs.min())
    whole = replace(band, layers=(1, record.n_layers))
    check(
        depth,
        within=whole,
        what="lower end of the curve over its lowest point",
        of=f"{padding.shape[1]} padding positions",
    )
