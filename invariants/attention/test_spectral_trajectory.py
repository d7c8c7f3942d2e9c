"""Spectral norms of W_OV and W_QK have a shape over the layers: they rise, they fall, or they are
flat, and peak somewhere.

slope of log mean over heads of σ₁ against the layer, all layers; flat where it cannot be told from
0 at 95%. σ₁(W_QK) is that of the part without positions, where these are rotary.
Source: mechanistic-validity, B05 Norm Trajectory, which asks for peak layer, slope and flatness and
published Frobenius norms.
Applies to: no model by a published number; measured on every model whose attention can be read by
head.
"""

import pytest

from streamgauge.numerics.bands import Band
from streamgauge.numerics.circuits import trajectory
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_spectral_trajectory(record: Record, band: Band, check) -> None:
    for name in ("W_OV", "W_QK"):
        if name == "W_OV" or f"weights/{name}_spectral" in record.arrays:
            found = trajectory(record.array(f"weights/{name}_spectral"))
            of = (
                f"{found.reading}, ± {2 * found.error:.4f}; largest at layer {found.peak} of "
                f"{record.n_layers}"
            )
            check(found.slope, within=band, what=f"slope of log σ₁({name})", unit="a layer", of=of)
