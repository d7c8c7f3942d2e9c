"""What writes to the stream grows with depth: W_out and W_O have larger norms in the last layer than in the first.

ratio = ‖W‖_F of the last layer / ‖W‖_F of the first, as the file has them; for W_out and W_O.
Source: pythia_tools, MLP weights of four Pythias: 1.39 to 1.86 for W_out; Heimersheim and Turner 2023 for W_O, no number.
Applies to: the Pythias.
"""

import numpy as np
import pytest

from streamgauge.bands import Band
from streamgauge.record import Record

WRITING = ("W_out", "W_O")


@pytest.mark.phenomenon
def test_writing_grows(record: Record, band: Band, check) -> None:
    record.array("weights/W_out_raw")  # says why there is none
    for name in WRITING:
        norms = record.arrays.get(f"weights/{name}_raw")  # published numbers are of the MLP alone
        if norms is not None:
            first, last = np.linalg.norm(norms.reshape(len(norms), -1)[[0, -1]], axis=1)
            check(
                last / max(first, np.finfo(float).tiny),
                within=band,
                what=f"‖{name}‖ of the last layer over the first's",
                of="Frobenius norms",
            )
