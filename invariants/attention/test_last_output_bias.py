"""Attention's output bias leaps in the last layer, where it is far larger than before.

ratio = ‖b_O‖ of the last layer / median of ‖b_O‖ over the layers before it, value biases folded
into b_O.
Source: Heimersheim and Turner 2023, a figure (gpt2-xl); activation_additions for gpt2: 248.6 in
layer 11.
Applies to: gpt2 and gpt2-xl.
"""

import numpy as np
import pytest

from streamgauge.errors import NotApplicable
from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_last_output_bias(record: Record, band: Band, check) -> None:
    b_O = record.array("weights/b_O")
    before = np.median(b_O[:-1]) if len(b_O) > 1 else 0.0
    if not before:
        raise NotApplicable("no layer before the last has a bias in attention, or few have")
    check(
        b_O[-1] / before,
        within=band,
        what="‖b_O‖ of the last layer over the median of the others",
        of=f"{len(b_O)} layers",
    )
