"""Updates grow over the depth: the last layer's attn_out and mlp_out are larger than the first's.

ratio = geometric mean over text tokens of ‖mlp_out‖ in the last layer / in the first; likewise
attn_out.
Source: pythia_tools notes 2023: both rise over two orders of magnitude across a Pythia, which one
is not said.
Applies to: the Pythias, as a direction.
"""

import numpy as np
import pytest

from streamgauge.numerics.bands import Band
from streamgauge.record import Record


@pytest.mark.phenomenon
def test_update_norms_rise(record: Record, band: Band, check) -> None:
    record.require_text()
    for name in ("mlp_out", "attn_out"):
        norms = record.text(f"stream/{name}").astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.exp((np.log(norms[-1]) - np.log(norms[0])).mean())
        check(
            ratio,
            within=band,
            what=f"‖{name}‖ of the last layer over the first's",
            of=record.count_text,
        )
