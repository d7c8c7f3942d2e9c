"""What writes to the stream grows with depth: W_out has a larger norm in the last layer than in the
first.

ratio = ‖W_out‖_F of the last layer / ‖W_out‖_F of the first, as the file has them. W_O is on the
page beside it: the claim is made of it too, but no number is published.
Source: pythia_tools, MLP weights of four Pythias: 1.39 to 1.86.
Applies to: the Pythias.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_writing_grows(record: Record, band: Band, check) -> None:
    first, last = record.array("weights/W_out_raw")[[0, -1]]
    ratio = last / max(first, np.finfo(float).tiny)
    check(
        ratio, within=band, what="‖W_out‖ of the last layer over the first's", of="Frobenius norms"
    )
