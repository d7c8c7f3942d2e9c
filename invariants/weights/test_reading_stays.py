"""What reads from the stream stays as large as it is: W_in has about the same norm in the last
layer as in the first.

ratio = ‖W_in‖_F of the last layer / ‖W_in‖_F of the first, as the file has them. W_Q, W_K and W_V
are on the page beside it: the claim is made of them too, but no number is published.
Source: pythia_tools, MLP weights of four Pythias: 0.93 to 1.01.
Applies to: the Pythias.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_reading_stays(record: Record, band: Band, check) -> None:
    first, last = record.array("weights/W_in_raw")[[0, -1]]
    ratio = last / max(first, np.finfo(float).tiny)
    check(
        ratio, within=band, what="‖W_in‖ of the last layer over the first's", of="Frobenius norms"
    )
