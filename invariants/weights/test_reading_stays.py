"""What reads from the stream stays as large as it is: W_in, W_Q, W_K and W_V have about the same norm in the last layer.

ratio = ‖W‖_F of the last layer / ‖W‖_F of the first, as the file has them; for each reading matrix.
Source: pythia_tools, MLP weights of four Pythias: 0.93 to 1.01 for W_in; no number is published for W_Q, W_K and W_V.
Applies to: the Pythias.
"""

import numpy as np
import pytest

from streamgauge.bands import Band
from streamgauge.record import Record

READING = ("W_in", "W_gate", "W_Q", "W_K", "W_V")


@pytest.mark.phenomenon
def test_reading_stays(record: Record, band: Band, check) -> None:
    record.array("weights/W_in_raw")  # says why there is none
    for name in READING:
        norms = record.arrays.get(f"weights/{name}_raw")  # published numbers are of the MLP alone
        if norms is not None:
            first, last = np.linalg.norm(norms.reshape(len(norms), -1)[[0, -1]], axis=1)
            check(
                last / max(first, np.finfo(float).tiny),
                within=band,
                what=f"‖{name}‖ of the last layer over the first's",
                of="Frobenius norms",
            )
